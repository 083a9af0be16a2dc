"""Measure speed and memory beside transformers' Trainer, PEFT and `generate`, on any device.

    python evaluation/bench/bench.py                     # or: make bench
    python evaluation/bench/bench.py --sizes xs --quick  # does it run? too few turns to report
    python evaluation/bench/bench.py --parts Training --sizes m26

Each arm (arms.py) has a process. All arms take a turn, one after the other, then all take the next
one, of the same batches. The peak is a large matrix product, timed in each turn. Numbers are
medians over turns, of ratios too. Tokens exclude padding. FLOPs are those of `flops_per_token`.
Fused attention counts as outside products. bench.json is written anew: no run adds to another's.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
from transformers import LlamaForCausalLM

from dataset.lm_dataset import StepPlan, chunks, encode_conversations, read_jsonl
from dataset.world.generate import ensure_world
from evaluation.bench.arms import METHODS, Job, run_turn, synchronize
from evaluation.study.settings import read_study
from model.checkpoint import TOKENIZER_DIR, load_model, load_tokenizer, save_model
from model.files import UserError, run_script, write_json
from model.generation import Decoding, generate
from model.model_minimind import MiniMindForCausalLM, minimind_config
from trainer.arguments import DEVICES, choose_device, choose_dtype
from trainer.run_folder import describe_machine, git_state
from trainer.trainer_utils import flops_per_token

RESULT = Path(__file__).with_name("bench.json")
SAMPLES = 1_024  # a multiple of each batch size, so that no batch is smaller
JOINED = {"world": 1, "long": 5}  # pairs in a conversation: 53 and some 260 tokens on average
BATCHES, WORKERS = (1, 2, 4, 8, 16, 32, 64, 128), (0, 1, 2, 4, 8)
PROMPTS, NEW_TOKENS = 100, 64
SPAWN = multiprocessing.get_context("spawn")
# FLOP/s of dense bfloat16 products by a part of the card's name, as its maker states them.
CARD_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
PARTS = ("Training", "Start", "Generation", "Batches", "Loading")
KEYS = ["size", "data", "method", "batch", "workers", "engine"]
# "time / ours" and "time / FFT": how many times as long as our engine, and as FFT, an arm takes.
TRAINING = ["tokens/s", "time / ours", "time / FFT", "MiB", "% of the peak", "% outside products"]
ON_GPU = ["tokens/s", "time / FFT", "MiB", "% MFU", "% GPU busy"]
LOADING = ["tokens/s", "time / ours", "% waiting for data"]


def time_call(function: Callable, device: str) -> float:
    """Return the seconds that a call takes."""
    synchronize(device)
    clock = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - clock


def measure_peak(device: str) -> float:
    """Return the FLOP/s of a large product, the best of 4."""
    width, dtype = 8192 if device == "cuda" else 4096, choose_dtype("auto", device)
    matrix = torch.randn(width, width, device=device).to(getattr(torch, dtype))
    return 2 * width**3 / min(time_call(lambda: matrix @ matrix, device) for _ in range(4))


def run_in_turns(jobs: list[Job], turns: int) -> pd.DataFrame:
    """Train jobs of one data set and batch size in turns, the first not counted; a row for each."""
    first, rows = jobs[0], []
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, SPAWN)) for _ in jobs]
        arms = list(zip(pools, jobs, strict=True))
        for turn in range(1 + turns):
            calls = (pool.submit(run_turn, job) for pool, job in arms)  # one after the other
            if turn == 0 and first.device == "cuda":
                calls = list(calls)  # all at once: they compile
            reports = [call.result() for call in calls]
            shared = {"turn": turn, "peak": measure_peak(first.device)}
            rows += [job.keys | shared | report for job, report in zip(jobs, reports, strict=True)]
        profiles = [pool.submit(run_turn, job, profiles=True).result() for pool, job in arms]
    data = first.load_tokens()
    plan = StepPlan(data.lengths, first.batch)
    name = torch.cuda.get_device_name() if first.device == "cuda" else ""
    facts = pd.DataFrame(profiles)[["products", "waiting"]]
    facts["flops"] = [flops_per_token(job.load_model(), data.lengths) for job in jobs]
    facts["tokens"] = sum(data.lengths[plan[1 + step]].sum() for step in range(first.steps))
    facts["card"] = next((peak for part, peak in CARD_PEAKS.items() if part in name), np.nan)
    frame = pd.DataFrame(rows).join(pd.concat([facts] * (1 + turns), ignore_index=True))
    losses = frame[frame["turn"] == 0].groupby("method")["loss"]
    if (losses.max() > 1.02 * losses.min()).any():
        raise UserError(f"arms do not train alike; their losses: {losses.agg(list).to_dict()}")
    return summarize(frame[frame["turn"] > 0])


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return medians over turns; our engine and FFT stand before the arms that are compared."""
    turn, seconds = frame["turn"], frame["seconds"]
    speed = frame["tokens"] / seconds
    columns = {
        "tokens/s": speed,
        "time / ours": seconds / seconds.groupby([turn, frame["method"]]).transform("first"),
        "time / FFT": seconds / seconds.groupby([turn, frame["engine"]]).transform("first"),
        "MiB": frame["memory"] / 2**20,
        "% of the peak": 100 * speed * frame["flops"] / frame["peak"],
        "% MFU": 100 * speed * frame["flops"] / frame["card"],
        "% GPU busy": frame.get("busy", np.nan),
        "% outside products": 100 * (1 - frame["products"]),
        "% waiting for data": 100 * frame["waiting"],
    }
    frame = frame[KEYS].assign(**columns)
    return frame.groupby(KEYS, sort=False).median().reset_index()


def measure_start(job: Job) -> pd.DataFrame:
    """Time a process from its start to the end of its first step, without and with caches."""
    rows = []
    for engine in ("ours", "trainer"):
        alone = replace(job, engine=engine, folder=job.folder / f"start {engine}")
        row = job.keys | {"engine": engine}
        for state in ("s, cold", "s, warm"):
            started = time.time()
            with ProcessPoolExecutor(1, SPAWN) as pool:
                row[state] = pool.submit(run_turn, alone).result()["first_step_at"] - started
        rows.append(row)
    return pd.DataFrame(rows)


def measure_generation(job: Job, turns: int) -> pd.DataFrame:
    """Time greedy answers that end at no token, ours and transformers' from the same weights."""
    records, tokenizer = [record for _, record in read_jsonl(job.data)][:PROMPTS], load_tokenizer()
    asked = [record["conversations"][:-1] for record in records]
    prompts = [ids for ids, _ in encode_conversations(tokenizer, asked, generation_prompt=True)]
    options = {"padding_side": "left", "return_tensors": "pt"}
    inputs = dict(tokenizer.pad({"input_ids": prompts}, **options).to(job.device))
    inputs |= {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_model(job.weights).to(job.device, dtype).eval()
        theirs = LlamaForCausalLM.from_pretrained(job.weights, dtype=dtype).to(job.device).eval()
        answer = partial(generate, ours, prompts, Decoding("greedy"), 0, NEW_TOKENS, len(prompts))
        calls = {"ours": answer, "transformers": partial(theirs.generate, **inputs)}
        for turn in range(1 + turns):
            seconds = {engine: time_call(call, job.device) for engine, call in calls.items()}
            for engine in calls if turn else ():
                row = {"size": job.weights.name, "type": str(dtype)[6:], "engine": engine}
                row |= {"tokens/s": len(prompts) * NEW_TOKENS / seconds[engine]}
                rows.append(row | {"time / ours": seconds[engine] / seconds["ours"]})
    return pd.DataFrame(rows).groupby(["size", "type", "engine"]).median().reset_index()


def make_jobs(folder: Path, sizes: list[str], device: str) -> list[Job]:
    """Write random weights and both data sets; return a job for each pair of them."""
    records = [record["conversations"] for _, record in read_jsonl(ensure_world()["sft"])]
    pairs = [turns for turns in records if turns[0]["role"] == "user"]
    for name, count in JOINED.items():
        joined = [sum(chunk, []) for chunk in chunks(pairs[: SAMPLES * count], count)]
        lines = pd.DataFrame({"conversations": joined})
        lines.to_json(folder / f"{name}.jsonl", orient="records", lines=True, force_ascii=False)
    jobs, steps = [], 50 if device == "cuda" else 4
    for size in sizes:
        torch.manual_seed(42)
        config = minimind_config(**read_study().sizes[size].shape)
        save_model(MiniMindForCausalLM(config), TOKENIZER_DIR, folder / size)
        for name in JOINED:
            data, runs = folder / f"{name}.jsonl", folder / "runs"
            jobs.append(Job(folder / size, data, runs, device, steps))
    return jobs


def list_parts(jobs: list[Job], turns: int) -> dict[str, Iterator[pd.DataFrame]]:
    """Return the parts by their titles; each is measured when its rows are asked for."""
    is_gpu, smallest, largest = jobs[0].device == "cuda", jobs[0], jobs[-2]  # on the world's pairs
    # So many steps that batches prepared before the clock starts do not matter.
    loading = replace(largest, steps=100) if is_gpu else replace(smallest, steps=20)
    batches, both = BATCHES if is_gpu else (), ("ours", "trainer")

    def measure(columns: list, turns: int, engines: Iterable, methods: Iterable, job: Job):
        arms = [replace(job, method=m, engine=e) for m in methods for e in engines]
        return run_in_turns(arms, turns)[KEYS + columns]

    sweep = partial(measure, ON_GPU, 1, ("ours",), METHODS)
    load = partial(measure, LOADING, 1, ("ours", "minimind"), ("FFT",))
    return {
        "Training": (measure(TRAINING, turns, both, METHODS, job) for job in jobs),
        "Start": (measure_start(job) for job in [largest]),
        "Generation": (measure_generation(job, turns) for job in [largest]),
        "Batches": (sweep(replace(largest, batch=batch, steps=100)) for batch in batches),
        "Loading": (load(replace(loading, workers=workers)) for workers in WORKERS),
    }


def print_tables(result: dict) -> None:
    """Print each table as Markdown under its title and the machine."""
    machine, commit = result["machine"], result["git"].get("commit", "unknown")
    where = f"{machine['processor']}, {machine['threads']} threads, {result['dtype']}"
    where += f", torch {machine['versions']['torch']}, commit {commit[:7]}"
    for title, rows in result["tables"].items():
        table = pd.DataFrame(rows).dropna(axis="columns", how="all")
        table = table.map(lambda x: f"{x:,.{2 if x < 10 else 0}f}" if isinstance(x, float) else x)
        print(f"\n**{title}** on {where}\n")
        print(table.to_markdown(index=False, disable_numparse=True))


def main(argv: list[str] | None = None) -> int:
    """Measure, write the result after each part, and print the tables."""
    formatter, sizes = argparse.RawDescriptionHelpFormatter, list(read_study().sizes)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--sizes", nargs="+", choices=sizes, default=sizes, help="of models (all)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables (all)")
    add("--quick", action="store_true", help="one turn in place of 5")
    add("--output", type=Path, default=RESULT, help="(evaluation/bench/bench.json)")
    add("--device", choices=DEVICES, default="auto", help="(auto)")
    args = parser.parse_args(argv)
    device, started = choose_device(args.device), time.perf_counter()
    result = {"git": git_state(), "machine": describe_machine(device)}
    result |= {"dtype": choose_dtype("auto", device), "tables": {}}
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        jobs = make_jobs(Path(folder), args.sizes, device)
        parts = list_parts(jobs, 1 if args.quick else 5)
        for title in args.parts:
            for frame in parts[title]:
                rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
                result["tables"].setdefault(title, []).extend(rows)
                result["minutes"] = round((time.perf_counter() - started) / 60, 1)
                write_json(args.output, result)
                print(f"{title}: {len(rows)} rows after {result['minutes']} minutes", flush=True)
    print_tables(result)
    print(f"\nwrote {args.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
