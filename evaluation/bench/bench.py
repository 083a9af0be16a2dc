"""Measure speed and memory beside transformers' Trainer, PEFT and `generate`, on any device.

    python evaluation/bench/bench.py                     # or: make bench
    python evaluation/bench/bench.py --sizes xs --quick --output quick.json   # does it run?

An arm is a process of one engine: "ours", a script of trainer/, compiled; "minimind", the same with
MiniMind's loading; "trainer", Trainer with PEFT, not compiled. Arms take turns, so that a machine
which slows down or speeds up does so for all. Numbers are medians without first steps. MFU is
"% of the peak", of a large product. "Batches" needs a GPU.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
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
from model.machine import (
    DEVICES,
    choose_device,
    choose_dtype,
    describe_machine,
    git_state,
    peak_memory,
)
from model.model_lora import name_roles
from model.model_minimind import IGNORE_INDEX, MiniMindForCausalLM, minimind_config
from trainer import arguments, train_full_sft, train_lora, trainer_utils
from trainer.arguments import MAX_SEQ_LEN

METHODS = {  # and what PEFT calls the layers that get an adapter
    "FFT": None,
    "LoRA square": ["q_proj", "o_proj"],
    "LoRA all-linear": "all-linear",
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
WORKERS = (0, 1, 2, 4, 8)
SAMPLES = 1_024  # a multiple of each batch size
PROMPTS = 100
NEW_TOKENS = 64
LEARNING_RATE = 1e-4
BASE = RESULTS_DIR / "bases" / f"m26-world-{MAIN_BASE}"
PRODUCTS = {  # names of matrix products in a profile
    "cpu": r"^aten::(mm|addmm|bmm|baddbmm)$",
    "cuda": "gemm|gemv|nvjet",
}
PARTS = ("Training", "Start", "Generation", "Batches", "Loading")
ARM_KEYS = ["size", "method", "batch", "workers", "engine"]  # what tells arms apart
MEASURED = ["turn", "seconds", "tokens", "flops", "peak", "kernels"]  # for what is computed
TABLE_COLUMNS = ["MiB", "% outside products", "% waiting for data"]
start_process = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))


@dataclass(frozen=True)
class Arm:
    """One process of the benchmark: what it trains, by which engine and for how long."""

    folder: Path  # of the models, the pairs and all that a run leaves
    device: str
    dtype: str  # of matrix products
    peak: float  # FLOPs a second of a large matrix product
    size: str
    steps: int  # that are timed; one more comes first
    method: str = "FFT"  # of METHODS
    engine: str = "ours"
    batch: int = 32
    workers: int = 0
    compiles: str = "on"
    compiled_code: str = "compiled"  # folder of the compiler's cache, in `folder`

    @property
    def pairs(self) -> Path:
        """The file of pairs."""
        return self.folder / "chats.jsonl"

    @property
    def is_gpu(self) -> bool:
        """Whether it computes on CUDA."""
        return self.device == "cuda"


# ---------------------------------------------------------------- in an arm's process


class MiniMindData:
    """MiniMind's way of loading: a sample is rendered, tokenized, padded and labeled when read."""

    def __init__(self, path: Path, data: TokenDataset) -> None:
        self.targets = data.targets
        self.info = data.info
        self.lengths = pad_lengths(data)
        self.records = [record for _, record in read_jsonl(path)]
        self.tokenizer = load_tokenizer()
        self.opening = self.tokenizer("<|im_start|>assistant\n").input_ids

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        """Return ids and labels, padded to the most that a sample may have."""
        messages = self.records[index]["conversations"]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(text).input_ids
        ids += [self.tokenizer.pad_token_id] * MAX_SEQ_LEN
        ids = ids[:MAX_SEQ_LEN]
        labels = [IGNORE_INDEX] * MAX_SEQ_LEN
        size = len(self.opening)
        in_answer = False
        for i in range(size, MAX_SEQ_LEN):
            if in_answer or ids[i - size : i] == self.opening:
                labels[i] = ids[i]
                in_answer = ids[i] != self.tokenizer.eos_token_id
        return ids, labels


def pad_lengths(data: TokenDataset) -> np.ndarray:
    """Return the lengths of padded samples: all alike, so nothing is grouped by length."""
    return np.full_like(data.lengths, MAX_SEQ_LEN)


def train_ours(arm: Arm, data: TokenDataset) -> dict[str, float]:
    """Run a training script as its users do; return mean loss and FLOPs a token."""
    name = f"run{os.getpid()}"
    steps = arm.steps + 1
    flags = {
        "--from_weight": arm.folder / arm.size,
        "--data_path": arm.pairs,
        "--save_dir": arm.folder,
        "--max_steps": steps,
        "--log_interval": steps,
        "--learning_rate": LEARNING_RATE,
        "--lr_schedule": "constant",
        "--device": arm.device,
        "--dtype": arm.dtype,
        "--use_compile": arm.compiles,
        "--num_workers": arm.workers,
        "--batch_size": arm.batch,
    }
    train = train_full_sft.main
    if arm.method == "FFT":
        flags["--run_name"] = name
    else:
        flags["--lora_name"] = name
        flags["--lora_targets"] = arm.method.removeprefix("LoRA ")
        train = train_lora.main
    if arm.engine == "minimind":
        train = partial(train_minimind, data)
    words = ["--overwrite"]
    for flag, value in flags.items():
        words += [flag, str(value)]
    train(words)
    record = read_json(arm.folder / name / "run.json")
    return {"loss": record["train_loss"], "flops": record["flops"] / record["tokens"]}


def train_minimind(data: TokenDataset, words: list[str]) -> None:
    """Fine-tune by our loop, but load the samples as MiniMind does."""
    stage = arguments.FULL_SFT
    args = arguments.parse_args(arguments.make_stage_parser("", stage), words, stage)
    session = trainer_utils.start_session(args)
    data = trainer_utils.Data(MiniMindData(*args.data_path, data), None)
    method = trainer_utils.Method(stage.name, name_roles(session.model))
    trainer_utils.train(args, session, data, method)


def train_theirs(arm: Arm, data: TokenDataset) -> dict[str, float]:
    """Train by Trainer, and PEFT for adapters, as `train_ours` does; return the mean loss."""
    plan = StepPlan(data.lengths, arm.batch)
    steps = arm.steps + 1
    samples = []
    for step in range(steps):
        for index in plan[step]:
            ids, labels = data[index]
            samples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    model = LlamaForCausalLM.from_pretrained(arm.folder / arm.size, dtype=torch.float32)
    targets = METHODS[arm.method]
    if targets:
        config = LoraConfig(r=8, lora_alpha=32, target_modules=targets)
        model = get_peft_model(model, config)
    settings = TrainingArguments(
        output_dir=arm.folder / "theirs",
        use_cpu=arm.device == "cpu",
        bf16=arm.dtype == "bfloat16",
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=arm.batch,
        train_sampling_strategy="sequential",
        save_strategy="no",
    )
    collator = DataCollatorForSeq2Seq(load_tokenizer())
    output = Trainer(model, settings, collator, samples).train()
    return {"loss": output.training_loss}


class StepClock:
    """Note when the first and the last step end, and profile what lies between, if asked to."""

    def __init__(self, arm: Arm, profiles: bool) -> None:
        self.device = arm.device
        self.last_step = arm.steps + 1
        self.profiler = torch.profiler.profile() if profiles else None
        self.step = 0
        self.first_step_at = 0.0  # seconds, as `time.time` counts
        self.started_at = 0.0
        self.ended_at = 0.0

    def note_step(self, *_: object) -> None:
        """Be called after each step of an optimizer."""
        self.step += 1
        if self.step == 1:
            self.first_step_at = self.read()
            if self.profiler:
                self.profiler.start()
            self.started_at = time.time()
        elif self.step == self.last_step:
            self.ended_at = self.read()
            if self.profiler:
                self.profiler.stop()

    def read(self) -> float:
        """Return the time at which the device has done all its work."""
        torch.get_device_module(self.device).synchronize()
        return time.time()

    @property
    def seconds(self) -> float:
        """How long the timed steps took."""
        return self.ended_at - self.started_at


def run_turn(arm: Arm, profiles: bool = False) -> dict[str, float]:
    """Train a first step and `arm.steps` timed ones; return their cost, or their profile."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(arm.folder / arm.compiled_code)
    data = load_dataset("sft", [arm.pairs], load_tokenizer(), MAX_SEQ_LEN)
    clock = StepClock(arm, profiles)
    train = train_theirs if arm.engine == "trainer" else train_ours
    hook = register_optimizer_step_post_hook(clock.note_step)
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        report = train(arm, data)
    hook.remove()
    if clock.profiler:
        return describe_profile(clock.profiler, clock.seconds, arm)
    report["first_step_at"] = clock.first_step_at
    report["seconds"] = clock.seconds
    report["tokens"] = count_tokens(arm, data)
    report["MiB"] = peak_memory(arm.device) / 2**20
    return report


def count_tokens(arm: Arm, data: TokenDataset) -> int:
    """Count the tokens of the timed steps, padding aside."""
    lengths = pad_lengths(data) if arm.engine == "minimind" else data.lengths
    plan = StepPlan(lengths, arm.batch)
    return sum(data.lengths[plan[step]].sum() for step in range(1, arm.steps + 1))


def describe_profile(
    profiler: torch.profiler.profile, seconds: float, arm: Arm
) -> dict[str, float]:
    """Return what part of the timed steps was spent outside matrix products, and on waiting."""
    # A row is an operation, by its name; times are microseconds, "self" without those inside it.
    events = pd.DataFrame(vars(event) for event in profiler.key_averages()).set_index("key")
    is_kernel = events["device_type"].eq(DeviceType.CUDA) & ~events["is_user_annotation"]
    kernels = events["self_device_time_total"][is_kernel] / 1e6
    operations = kernels if arm.is_gpu else events["self_cpu_time_total"] / 1e6
    products = operations.filter(regex=PRODUCTS["cuda" if arm.is_gpu else "cpu"]).sum()
    waiting = events["cpu_time_total"].filter(like="DataLoader").sum() / 1e6
    return {
        "% outside products": 100 - 100 * products / seconds,
        "% waiting for data": 100 * waiting / seconds,
        "kernels": kernels.sum() if arm.is_gpu else float("nan"),
    }


# ---------------------------------------------------------------- the tables


def run_in_turns(arms: list[Arm], turns: int) -> pd.DataFrame:
    """Train the arms, each in its process, in turns; return their medians, a row an arm."""
    processes = [start_process() for _ in arms]
    pairs = list(zip(processes, arms, strict=True))
    wait([process.submit(run_turn, arm) for process, arm in pairs])  # not timed: they compile
    rows = []
    for turn in range(turns + 1):
        profiles = turn == turns  # a last turn is not timed, since a profiler slows it down
        for process, arm in pairs:
            report = process.submit(run_turn, arm, profiles).result()
            rows.append({**asdict(arm), **report, "turn": turn})
    for process in processes:
        process.shutdown()
    return take_medians(pd.DataFrame(rows))


def take_medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Return medians over turns, a row an arm; `rows` has a row for each turn of an arm.

    Our engine and FFT stand before the arms that are compared with them in the same turn.
    """
    frame = rows.reindex(columns=[*ARM_KEYS, *MEASURED, *TABLE_COLUMNS])
    seconds = frame["seconds"]
    turn = frame["turn"]
    ours = seconds.groupby([turn, frame["method"]]).transform("first")
    full = seconds.groupby([turn, frame["engine"]]).transform("first")
    frame["tokens/s"] = frame["tokens"] / seconds
    frame["time / ours"] = seconds / ours
    frame["time / FFT"] = seconds / full
    frame["% of the peak"] = 100 * frame["tokens/s"] * frame["flops"] / frame["peak"]
    table = frame.groupby(ARM_KEYS, sort=False).median()
    table["% GPU busy"] = 100 * table["kernels"] / table["seconds"]
    return table.drop(columns=MEASURED).reset_index()


def measure_start(arm: Arm) -> pd.DataFrame:
    """Time a process from its start to its first step's end, with and without compiled code."""
    rows = []
    for engine in ("ours", "trainer"):
        started = replace(arm, engine=engine, compiled_code=engine)  # a folder of its own
        for code in ("cold", "warm"):  # the second process finds what the first has compiled
            start = time.time()
            with start_process() as process:
                report = process.submit(run_turn, started).result()
            seconds = report["first_step_at"] - start
            rows.append({"size": arm.size, "engine": engine, "compiled code": code, "s": seconds})
    return pd.DataFrame(rows)


def measure_generation(arm: Arm, base: Path, turns: int) -> pd.DataFrame:
    """Time a model's greedy answers, ours and transformers', of at most 64 tokens each."""
    tokenizer = load_tokenizer(base)
    data = load_dataset("sft", [arm.pairs], tokenizer, MAX_SEQ_LEN)
    prompts = []
    for ids, labels in islice(iter(data), PROMPTS):
        answer_start = (labels != IGNORE_INDEX).argmax()
        prompts.append(ids[:answer_start].tolist())
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    padded = padded.to(arm.device)
    ours = load_model(base).to(arm.device, getattr(torch, arm.dtype))
    theirs = LlamaForCausalLM.from_pretrained(base, dtype=ours.dtype).to(arm.device)
    end_ids = (tokenizer.eos_token_id,)
    calls = {
        "ours": partial(
            generate, ours, prompts, Decoding("greedy"), 0, NEW_TOKENS, PROMPTS, end_ids
        ),
        "transformers": partial(theirs.generate, **padded, max_new_tokens=NEW_TOKENS),
    }
    arm_keys = {"size": base.name, "method": "greedy", "batch": PROMPTS, "workers": 0}
    tokens = sum(len(answer) for answer in calls["ours"]())
    rows = []
    for turn in range(turns + 1):
        for engine, call in calls.items():
            start = time.perf_counter()
            call()  # both wait for the device after each token
            seconds = time.perf_counter() - start
            measured = {"engine": engine, "turn": turn, "seconds": seconds, "tokens": tokens}
            rows.append(arm_keys | measured)
    frame = pd.DataFrame(rows)
    return take_medians(frame[frame["turn"] > 0])  # first turns warm up


def measure_peak(device: str, dtype: str) -> float:
    """Return the FLOPs a second of a large matrix product."""
    width = 8192 if device == "cuda" else 4096
    matrix = torch.ones(width, width, dtype=getattr(torch, dtype), device=device)
    timer = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    return 2 * width**3 / timer.timeit(4).mean


def write_inputs(folder: Path, sizes: Iterable[str]) -> None:
    """Write what the arms read: pairs of the world, of one turn each, and random models."""
    lines = islice(read_jsonl(ensure_world()["sft"]), SAMPLES)
    pairs = [{"conversations": record["conversations"][-2:]} for _, record in lines]
    write_records(folder / "chats.jsonl", pairs)
    study = read_study()
    for size in sizes:
        model = MiniMindForCausalLM(minimind_config(**study.sizes[size].shape))
        save_model(model, TOKENIZER_DIR, folder / size)


def cross(arm: Arm, methods: Iterable[str], engines: Iterable[str]) -> list[Arm]:
    """Return the arm with each method and engine; in a method our engine stands first."""
    arms = []
    for method in methods:
        for engine in engines:
            arms.append(replace(arm, method=method, engine=engine))
    return arms


Part = tuple[str, Callable[[], pd.DataFrame]]


def plan_parts(arm: Arm, sizes: list[str], base: Path, turns: int) -> list[Part]:
    """Return what is measured, in order: the title of a table, and what makes rows of it."""
    parts = []
    for size in sizes:
        arms = cross(replace(arm, size=size), METHODS, ("ours", "trainer"))
        parts.append(("Training", partial(run_in_turns, arms, turns)))
    parts.append(("Start", partial(measure_start, arm)))
    parts.append(("Generation", partial(measure_generation, arm, base, turns)))
    # So many steps that batches loaded before the clock starts do not matter.
    longer = replace(arm, steps=100) if arm.is_gpu else replace(arm, steps=20, size=sizes[0])
    if arm.is_gpu:
        for batch in BATCHES:
            arms = cross(replace(longer, batch=batch), METHODS, ["ours"])
            parts.append(("Batches", partial(run_in_turns, arms, 1)))
    for workers in WORKERS:
        arms = cross(replace(longer, workers=workers), ["FFT"], ("ours", "minimind"))
        parts.append(("Loading", partial(run_in_turns, arms, 1)))
    return parts


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; by default all is measured."""
    sizes = list(read_study().sizes)
    output = Path(__file__).with_name("bench.json")
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes, help="(all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables (all)")
    parser.add_argument("--quick", action="store_true", help="one turn in place of 5")
    parser.add_argument("--output", type=Path, default=output, help="(evaluation/bench/bench.json)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(auto)")
    parser.add_argument("--base", type=Path, default=BASE, help="model of Generation (m26)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, write the result after each step, and print the tables."""
    args = parse_flags(argv)
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    machine = describe_machine(device)
    tables = {}
    result = {"git": git_state(), "machine": machine, "dtype": dtype, "tables": tables}
    peak = measure_peak(device, dtype)
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        folder = Path(name)
        write_inputs(folder, args.sizes)
        steps = 50 if device == "cuda" else 4
        arm = Arm(folder, device, dtype, peak, args.sizes[-1], steps)
        for title, measure in plan_parts(arm, args.sizes, args.base, 1 if args.quick else 5):
            if title not in args.parts:
                continue
            table = measure().dropna(axis="columns", how="all")
            tables.setdefault(title, []).extend(json.loads(table.to_json(orient="records")))
            write_json(args.output, result)
            text = table.to_markdown(index=False, floatfmt=",.2f")
            print(f"\n**{title}** on {machine['processor']}, {dtype}\n\n{text}", flush=True)


if __name__ == "__main__":
    run_script(main)
