"""Measure speed and memory beside transformers' Trainer, PEFT and `generate`, on any device.

    python evaluation/bench/bench.py                     # or: make bench
    python evaluation/bench/bench.py --sizes xs --quick --output quick.json   # does it run?

An arm is a process of one engine: "ours", a script of trainer/, compiled; "minimind", the same with
MiniMind's loading; "trainer", Trainer with PEFT, not compiled. Arms take turns. Numbers are medians
without first steps. MFU is "% of the peak", of a large product. "Batches" needs a GPU.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import count, islice, product
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.benchmark import Timer
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, Trainer, TrainingArguments

from dataset.lm_dataset import StepPlan, TokenDataset, load_dataset, read_jsonl, write_records
from dataset.world.generate import ensure_world
from evaluation.study.settings import MAIN_BASE, RESULTS_DIR, read_study
from model.checkpoint import TOKENIZER_DIR, load_model, load_tokenizer, save_model
from model.cli import make_parser, run_script
from model.files import read_json, write_json
from model.generation import Decoding, generate
from model.machine import DEVICES, choose_device, choose_dtype, describe_machine, git_state
from model.model_lora import name_roles
from model.model_minimind import IGNORE_INDEX, MiniMindForCausalLM, minimind_config
from trainer import arguments, train_full_sft, train_lora, trainer_utils
from trainer.arguments import MAX_SEQ_LEN

METHODS = {"FFT": None, "LoRA square": ["q_proj", "o_proj"], "LoRA all-linear": "all-linear"}
BATCHES, WORKERS = (1, 2, 4, 8, 16, 32, 64, 128), (0, 1, 2, 4, 8)
SAMPLES, PROMPTS, NEW_TOKENS = 1_024, 100, 64  # samples: a multiple of each batch size
BASE = RESULTS_DIR / "bases" / f"m26-world-{MAIN_BASE}"
PRODUCTS = {False: r"^aten::(mm|addmm|bmm|baddbmm)$", True: "gemm|gemv|nvjet"}  # by "is GPU"
TABLES = ("Training", "Start", "Generation", "Batches", "Loading")
ARM_KEYS = ["size", "method", "batch", "workers", "engine"]
MEASURED = ["turn", "seconds", "tokens", "flops", "peak", "kernels"]
TABLE_COLUMNS = ["MiB", "% outside products", "% waiting for data"]
start_process = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))


class MiniMindData:
    """MiniMind's way of loading: a sample is rendered, tokenized, padded and labeled when read."""

    def __init__(self, path: Path, data: TokenDataset):
        self.targets, self.info = data.targets, data.info
        self.lengths = data.lengths.clip(MAX_SEQ_LEN)  # all alike: not grouped by length
        self.records = [record for _, record in read_jsonl(path)]
        self.tokenizer = load_tokenizer()
        self.opening = self.tokenizer("<|im_start|>assistant\n").input_ids

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        """Return ids and labels, padded to the most that a sample may have."""
        chat, size = self.records[index]["conversations"], len(self.opening)
        ids = self.tokenizer(self.tokenizer.apply_chat_template(chat, tokenize=False)).input_ids
        ids = (ids + [self.tokenizer.pad_token_id] * MAX_SEQ_LEN)[:MAX_SEQ_LEN]
        labels, in_answer = [IGNORE_INDEX] * MAX_SEQ_LEN, False
        for i in range(size, MAX_SEQ_LEN):
            if in_answer or ids[i - size : i] == self.opening:
                labels[i], in_answer = ids[i], ids[i] != self.tokenizer.eos_token_id
        return ids, labels


def train_ours(job: dict, data: TokenDataset) -> dict:
    """Run a training script as its users do; return mean loss and FLOPs a token."""
    folder, steps, name = job["folder"], job["steps"] + 1, f"run{os.getpid()}"
    words = f"--from_weight {folder / job['size']} --data_path {folder / 'chats.jsonl'} --overwrite"
    words += f" --save_dir {folder} --max_steps {steps} --log_interval {steps} --learning_rate 1e-4"
    words += f" --device {job['device']} --num_workers {job['workers']} --lr_schedule constant"
    words += f" --use_compile {job['compiles']} --batch_size {job['batch']} --dtype {job['dtype']}"
    is_lora, targets = job["method"] != "FFT", job["method"].removeprefix("LoRA ")
    words += f" --lora_name {name} --lora_targets {targets}" if is_lora else f" --run_name {name}"
    if job["engine"] == "minimind":
        stage = arguments.FULL_SFT
        args = arguments.parse_args(arguments.make_stage_parser("", stage), words.split(), stage)
        session = trainer_utils.start_session(args)
        data = trainer_utils.Data(MiniMindData(*args.data_path, data), None)
        method = trainer_utils.Method(stage.name, name_roles(session.model))
        trainer_utils.train(args, session, data, method)
    else:
        (train_lora if is_lora else train_full_sft).main(words.split())
    record = read_json(folder / name / "run.json")
    return {"loss": record["train_loss"], "flops": record["flops"] / record["tokens"]}


def train_theirs(job: dict, data: TokenDataset) -> dict:
    """Train by Trainer, and PEFT for adapters, as `train_ours` does; return the mean loss."""
    plan, steps, folder = StepPlan(data.lengths, job["batch"]), job["steps"] + 1, job["folder"]
    samples = [data[i] for step in range(steps) for i in plan[step]]
    samples = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in samples]
    model = LlamaForCausalLM.from_pretrained(folder / job["size"], dtype=torch.float32)
    if targets := METHODS[job["method"]]:
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=targets))
    flags = {"output_dir": folder / "theirs", "use_cpu": job["device"] == "cpu"}
    flags |= {"max_steps": steps, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    flags |= {"train_sampling_strategy": "sequential", "bf16": job["dtype"] == "bfloat16"}
    flags |= {"per_device_train_batch_size": job["batch"], "save_strategy": "no"}
    collator = DataCollatorForSeq2Seq(load_tokenizer())
    return {"loss": Trainer(model, TrainingArguments(**flags), collator, samples).train()[1]}


def run_turn(job: dict, profiles: bool = False) -> dict:
    """Train a first step and `job["steps"]` timed ones; return their cost, or their profile."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job["folder"] / job.get("code", "compiled"))
    data = load_dataset("sft", [job["folder"] / "chats.jsonl"], load_tokenizer(), MAX_SEQ_LEN)
    is_gpu, profiler, clock, steps = job["device"] == "cuda", torch.profiler.profile(), [], count(1)

    def note_step(*_: object) -> None:
        if next(steps) in (1, job["steps"] + 1):
            torch.get_device_module(job["device"]).synchronize()
            clock.append(time.time())
            if profiles:
                (profiler.stop if len(clock) > 1 else profiler.start)()
            clock.append(time.time())

    hook = register_optimizer_step_post_hook(note_step)
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        report = (train_theirs if job["engine"] == "trainer" else train_ours)(job, data)
    hook.remove()
    lengths = data.lengths.clip(MAX_SEQ_LEN) if job["engine"] == "minimind" else data.lengths
    plan, seconds = StepPlan(lengths, job["batch"]), clock[2] - clock[1]
    if profiles:
        events = pd.DataFrame(vars(event) for event in profiler.key_averages()).set_index("key")
        is_kernel = events["device_type"].eq(DeviceType.CUDA) & ~events["is_user_annotation"]
        on_gpu = events["self_device_time_total"][is_kernel] / 1e6
        own = on_gpu if is_gpu else events["self_cpu_time_total"] / 1e6
        inside = own.filter(regex=PRODUCTS[is_gpu]).sum() / seconds
        waiting = events["cpu_time_total"].filter(like="DataLoader").sum() / 1e6 / seconds
        report = {"% outside products": 100 - 100 * inside, "% waiting for data": 100 * waiting}
        return report | {"kernels": on_gpu.sum() if is_gpu else float("nan")}
    kib = torch.cuda.max_memory_allocated() / 1024 if is_gpu else getrusage(RUSAGE_SELF).ru_maxrss
    report["tokens"] = sum(data.lengths[plan[1 + step]].sum() for step in range(job["steps"]))
    return report | {"first_step_at": clock[0], "seconds": seconds, "MiB": kib / 1024}


def run_in_turns(job: dict) -> pd.DataFrame:
    """Train by each engine and method in turns; return medians, a row for each."""
    keys = [{"method": m, "engine": e} for m in job["methods"] for e in job["engines"]]
    arms, rows = [(start_process(), job | key) for key in keys], []
    wait([process.submit(run_turn, arm) for process, arm in arms])  # not timed: they compile
    for turn, (process, arm) in product(range(job["turns"] + 1), arms):
        report = process.submit(run_turn, arm, turn == job["turns"]).result()  # a profile at last
        rows.append(arm | report | {"turn": turn})
    for process, _ in arms:
        process.shutdown()
    return take_medians(pd.DataFrame(rows))


def take_medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Return medians over turns; our engine and FFT stand before the arms that are compared."""
    frame = rows.reindex(columns=[*ARM_KEYS, *MEASURED, *TABLE_COLUMNS])
    seconds, turn = frame["seconds"], frame["turn"]
    frame["tokens/s"] = frame["tokens"] / seconds
    frame["time / ours"] = seconds / seconds.groupby([turn, frame["method"]]).transform("first")
    frame["time / FFT"] = seconds / seconds.groupby([turn, frame["engine"]]).transform("first")
    frame["% of the peak"] = 100 * frame["tokens/s"] * frame["flops"] / frame["peak"]
    table = frame.groupby(ARM_KEYS, sort=False).median()
    table["% GPU busy"] = 100 * table["kernels"] / table["seconds"]
    return table.drop(columns=MEASURED).reset_index()


def measure_start(job: dict) -> pd.DataFrame:
    """Time a process from its start to its first step's end, with and without compiled code."""
    rows = [job | {"engine": e, "code": e} for e in job["engines"] for _ in range(2)]
    for row, compiled in zip(rows, ("cold", "warm") * 2, strict=True):
        row |= {"compiled code": compiled, "s": -time.time()}
        with start_process() as process:
            row["s"] += process.submit(run_turn, row).result()["first_step_at"]
    return pd.DataFrame(rows)[["size", "engine", "compiled code", "s"]]


def measure_generation(job: dict) -> pd.DataFrame:
    """Time a model's greedy answers, ours and transformers', of at most 64 tokens each."""
    tokenizer, device, rows = load_tokenizer(job["base"]), job["device"], []
    data = load_dataset("sft", [job["folder"] / "chats.jsonl"], tokenizer, MAX_SEQ_LEN)
    ids = [a[: (b != IGNORE_INDEX).argmax()].tolist() for a, b in islice(iter(data), PROMPTS)]
    padded = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(device)
    ours = load_model(job["base"]).to(device, getattr(torch, job["dtype"]))
    theirs = LlamaForCausalLM.from_pretrained(job["base"], dtype=ours.dtype).to(device)
    how = Decoding("greedy"), 0, NEW_TOKENS, PROMPTS, (tokenizer.eos_token_id,)
    calls = {"ours": partial(generate, ours, ids, *how)}
    calls["transformers"] = partial(theirs.generate, **padded, max_new_tokens=NEW_TOKENS)
    arm = job | {"size": job["base"].name, "method": "greedy", "batch": PROMPTS}
    arm["tokens"] = sum(map(len, calls["ours"]()))
    for turn, engine in product(range(job["turns"] + 1), calls):
        arm |= {"engine": engine, "turn": turn, "seconds": -time.perf_counter()}
        calls[engine]()  # both wait for the device after each token
        rows.append(arm | {"seconds": arm["seconds"] + time.perf_counter()})
    return take_medians(pd.DataFrame(rows[len(calls) :]).drop(columns="peak"))


def main(argv: list[str] | None = None) -> None:
    """Measure, write the result after each step, and print the tables."""
    sizes, output = read_study().sizes, Path(__file__).with_name("bench.json")
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=list(sizes), help="(all)")
    parser.add_argument("--parts", nargs="+", choices=TABLES, default=TABLES, help="tables (all)")
    parser.add_argument("--quick", action="store_true", help="one turn in place of 5")
    parser.add_argument("--output", type=Path, default=output, help="(evaluation/bench/bench.json)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(auto)")
    parser.add_argument("--base", type=Path, default=BASE, help="model of Generation (m26)")
    args = parser.parse_args(argv)
    device, tables = choose_device(args.device), {}
    is_gpu, machine = device == "cuda", describe_machine(device)
    dtype, width = choose_dtype("auto", device), 8192 if is_gpu else 4096
    result = {"git": git_state(), "machine": machine, "dtype": dtype, "tables": tables}
    lines = islice(read_jsonl(ensure_world()["sft"]), SAMPLES)
    pairs = [{"conversations": record["conversations"][-2:]} for _, record in lines]
    matrix = torch.ones(width, width, dtype=getattr(torch, dtype), device=device)
    timer = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    job = {"device": device, "dtype": dtype, "peak": 2 * width**3 / timer.timeit(4).mean}
    job |= {"engines": ("ours", "trainer"), "methods": METHODS, "method": "FFT", "batch": 32}
    job |= {"turns": 1 if args.quick else 5, "steps": 50 if is_gpu else 4, "workers": 0}
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        job |= {"folder": Path(name), "size": args.sizes[-1], "compiles": "on", "base": args.base}
        write_records(job["folder"] / "chats.jsonl", pairs)
        for size in args.sizes:
            model = MiniMindForCausalLM(minimind_config(**sizes[size].shape))
            save_model(model, TOKENIZER_DIR, job["folder"] / size)
        # So many steps that batches loaded before the clock starts do not matter.
        longer = {"steps": 100} if is_gpu else {"steps": 20, "size": args.sizes[0]}
        sweep = job | longer | {"turns": 1, "engines": ("ours",)}
        load = sweep | {"engines": ("ours", "minimind"), "methods": ("FFT",)}
        plan = [("Training", run_in_turns, job | {"size": size}) for size in args.sizes]
        plan += [("Start", measure_start, job), ("Generation", measure_generation, job)]
        plan += [("Batches", run_in_turns, sweep | {"batch": b}) for b in BATCHES if is_gpu]
        plan += [("Loading", run_in_turns, load | {"workers": w}) for w in WORKERS]
        for title, measure, arms in [each for each in plan if each[0] in args.parts]:
            table = measure(arms).dropna(axis="columns", how="all")
            tables[title] = tables.get(title, []) + json.loads(table.to_json(orient="records"))
            write_json(args.output, result)
            text = table.to_markdown(index=False, floatfmt=",.2f")
            print(f"\n**{title}** on {machine['processor']}, {dtype}\n\n{text}", flush=True)


if __name__ == "__main__":
    run_script(main)
