"""Measure speed and memory beside MiniMind's own step and transformers' Trainer with PEFT.

    python evaluation/bench/bench.py                     # or: make bench
    python evaluation/bench/bench.py --sizes xs --turns 1 --output quick.json   # does it run?

An arm is a process of one engine: "ours", a script of trainer/, compiled or not; "minimind",
MiniMind's own step and loading; "trainer", Trainer with PEFT. The last two are not compiled, as
their users run them. MiniMind's computes in float32 on every CPU. Arms take turns, so that a
machine which slows down or speeds up does so for all. Numbers are medians without first steps, and
tokens/s are those of real tokens, padding aside. MFU is "% of the peak", of a large product.
"Batches" needs a GPU, and "Threads" a CPU.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
import torch
from torch.utils.benchmark import Timer

from dataset.lm_dataset import encode_conversations, read_jsonl, write_records
from dataset.world.generate import ensure_world
from evaluation.bench.engines import METHODS, Arm, run_turn
from evaluation.study.settings import read_study
from model.checkpoint import TOKENIZER_DIR, load_tokenizer, save_model
from model.cli import make_parser, run_script
from model.files import write_json
from model.machine import DEVICES, choose_device, choose_dtype, describe_machine, git_state
from model.model_minimind import MiniMindForCausalLM, minimind_config

# How each engine runs by default. MiniMind's loads some batches before the clock starts: a favor.
# Its rows are padded to one length, so a single step tells its speed.
ENGINE_SETTINGS = {
    "ours": {},
    "ours, not compiled": {"compiles": "off"},
    "minimind": {"workers": 8, "steps": 1},
    "trainer": {},
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
WORKERS = (0, 2, 8)
THREADS = (1, 2)
SAMPLES = 1_024  # a multiple of each batch size
# Of a sample. A processor's code for batches of over 4,096 tokens is compiled when the first such
# batch comes, which may be within the timed steps; 32 of these samples stay below.
MOST_TOKENS = 128
PARTS = ("Training", "Start", "Batches", "Loading", "Threads")
ARM_KEYS = ["size", "method", "batch", "workers", "engine"]  # what tells arms apart
MEASURED = ["turn", "seconds", "tokens", "flops", "peak", "kernels"]  # for what is computed
THREADS_KEYS = ["size", "threads", "beside"]
TABLE_COLUMNS = ["MiB", "% outside products", "% waiting for data"]
SPAWN = multiprocessing.get_context("spawn")
start_process = partial(ProcessPoolExecutor, 1, SPAWN)


def run_in_turns(arms: list[Arm], turns: int) -> pd.DataFrame:
    """Train the arms, each in its process, in turns; a row is a turn of an arm.

    All processes live until the last turn, so pass only so many arms as fit into the memory.
    """
    processes = [start_process() for _ in arms]
    pairs = list(zip(processes, arms, strict=True))
    for process, arm in pairs:  # not timed: they compile; one by one, for the memory
        process.submit(run_turn, arm).result()
    rows = []
    for turn in range(turns + 1):
        profiles = turn == turns  # a last turn is not timed, since a profiler slows it down
        for process, arm in pairs:
            report = process.submit(run_turn, arm, profiles).result()
            rows.append({**asdict(arm), **report, "turn": turn})
    for process in processes:
        process.shutdown()
    return pd.DataFrame(rows)


def compare_methods(arm: Arm, turns: int) -> pd.DataFrame:
    """Return a row for each method and engine; the engines of a method take turns."""
    rows = []
    for method in METHODS:
        arms = cross(arm, [method], ENGINE_SETTINGS)
        rows.append(run_in_turns(arms, turns))
    return take_medians(pd.concat(rows))


def compare_loading(arm: Arm, workers: int) -> pd.DataFrame:
    """Return a row for our loading and one for MiniMind's, both with so many workers."""
    engines = {"ours": {"workers": workers}, "minimind": {"workers": workers}}
    arms = cross(arm, ["FFT"], engines)
    return take_medians(run_in_turns(arms, turns=1))


def compare_batches(arm: Arm, batch: int) -> pd.DataFrame:
    """Return a row for each method of ours, at one batch size."""
    arms = cross(replace(arm, batch=batch), METHODS, {"ours": {}})
    return take_medians(run_in_turns(arms, turns=1))


def take_medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Return medians over turns, a row an arm; `rows` has a row for each turn of an arm.

    Our engine and FFT stand before the arms that are compared with them in the same turn. Times
    are compared for a token, since arms differ in their steps.
    """
    frame = rows.reindex(columns=[*ARM_KEYS, *MEASURED, *TABLE_COLUMNS])
    turn = frame["turn"]
    frame["tokens/s"] = frame["tokens"] / frame["seconds"]
    token_time = 1 / frame["tokens/s"]
    ours = token_time.groupby([turn, frame["method"]]).transform("first")
    full = token_time.groupby([turn, frame["engine"]]).transform("first")
    frame["time / ours"] = token_time / ours
    frame["time / FFT"] = token_time / full
    frame["% of the peak"] = 100 * frame["tokens/s"] * frame["flops"] / frame["peak"]
    table = frame.groupby(ARM_KEYS, sort=False).median()
    table["% GPU busy"] = 100 * table["kernels"] / table["seconds"]
    return table.drop(columns=MEASURED).reset_index()


def measure_start(arm: Arm) -> pd.DataFrame:
    """Time a process from its start to its first step's end, with and without compiled code."""
    rows = []
    for engine in ("ours", "ours, not compiled", "trainer"):
        folder = f"{arm.size}-{engine}"  # of its own
        started = replace(arm, engine=engine, compiled_code=folder, **ENGINE_SETTINGS[engine])
        for code in ("cold", "warm"):  # the second process finds what the first has compiled
            start = time.time()
            with start_process() as process:
                report = process.submit(run_turn, started).result()
            seconds = report["first_step_at"] - start
            rows.append({"size": arm.size, "engine": engine, "compiled code": code, "s": seconds})
    return pd.DataFrame(rows)


def multiply_forever(sender: Connection) -> None:
    """Multiply matrices with one thread; send a word after the first product."""
    torch.set_num_threads(1)
    matrix = torch.ones(1024, 1024)
    torch.mm(matrix, matrix)
    sender.send("computing")
    while True:
        torch.mm(matrix, matrix)


@contextmanager
def run_busy_process() -> Iterator[None]:
    """Let another process compute, from before the block until its end."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=multiply_forever, args=(sender,), daemon=True)
    process.start()
    sender.close()  # the process has its own; if it fails, the next line ends with an error
    try:
        receiver.recv()
        yield
    finally:
        process.terminate()
        process.join()


NEIGHBORS = {"nothing": nullcontext, "one busy process": run_busy_process}


def measure_threads(arm: Arm, turns: int) -> pd.DataFrame:
    """Time our training with 1 and 2 threads, alone and beside a process that computes."""
    processes = {}
    for threads in THREADS:
        processes[replace(arm, threads=threads)] = start_process()
    for timed, process in processes.items():  # not timed: they compile
        process.submit(run_turn, timed).result()
    rows = []
    for _ in range(turns):
        for timed, process in processes.items():
            for beside, neighbor in NEIGHBORS.items():
                with neighbor():
                    report = process.submit(run_turn, timed).result()
                speed = report["tokens"] / report["seconds"]
                rows.append([arm.size, timed.threads, beside, speed])
    for process in processes.values():
        process.shutdown()
    frame = pd.DataFrame(rows, columns=[*THREADS_KEYS, "tokens/s"])
    return frame.groupby(THREADS_KEYS, sort=False).median().reset_index()


def measure_peak(device: str, dtype: str) -> float:
    """Return the FLOPs a second of a large matrix product."""
    width = 8192 if device == "cuda" else 4096
    matrix = torch.ones(width, width, dtype=getattr(torch, dtype), device=device)
    timer = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    return 2 * width**3 / timer.timeit(4).mean


def write_inputs(folder: Path, sizes: Iterable[str]) -> None:
    """Write what the arms read: pairs of the world, of one turn each, and random models."""
    tokenizer = load_tokenizer()
    pairs = []
    for _, record in read_jsonl(ensure_world()["sft"]):
        turns = record["conversations"][-2:]
        ((ids, _),) = encode_conversations(tokenizer, [turns])
        if len(ids) <= MOST_TOKENS:
            pairs.append({"conversations": turns})
        if len(pairs) == SAMPLES:
            break
    write_records(folder / "chats.jsonl", pairs)
    study = read_study()
    for size in sizes:
        model = MiniMindForCausalLM(minimind_config(**study.sizes[size].shape))
        save_model(model, TOKENIZER_DIR, folder / size)


def cross(arm: Arm, methods: Iterable[str], engines: Mapping[str, dict]) -> list[Arm]:
    """Return the arm with each method and engine, and the engine's settings.

    In a method our engine stands first.
    """
    arms = []
    for method in methods:
        for engine, settings in engines.items():
            arms.append(replace(arm, method=method, engine=engine, **settings))
    return arms


Part = tuple[str, Callable[[], pd.DataFrame]]


def plan_parts(arm: Arm, sizes: list[str], turns: int) -> list[Part]:
    """Return what is measured, in order: the title of a table, and what makes rows of it."""
    parts = []
    for size in sizes:
        parts.append(("Training", partial(compare_methods, replace(arm, size=size), turns)))
    for size in sizes:
        parts.append(("Start", partial(measure_start, replace(arm, size=size))))
    # So many steps that batches loaded before the clock starts do not matter.
    longer = replace(arm, steps=100) if arm.is_gpu else replace(arm, steps=10, size=sizes[0])
    if arm.is_gpu:
        for batch in BATCHES:
            parts.append(("Batches", partial(compare_batches, longer, batch)))
    for workers in WORKERS:
        parts.append(("Loading", partial(compare_loading, longer, workers)))
    if not arm.is_gpu:
        for size in dict.fromkeys((sizes[0], sizes[-1])):  # once, if there is one
            parts.append(("Threads", partial(measure_threads, replace(arm, size=size), turns)))
    return parts


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; by default all is measured."""
    sizes = list(read_study().sizes)
    output = Path(__file__).with_name("bench.json")
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes, help="(all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables (all)")
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each engine (3)")
    parser.add_argument("--output", type=Path, default=output, help="(evaluation/bench/bench.json)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(auto)")
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
        for title, measure in plan_parts(arm, args.sizes, args.turns):
            if title not in args.parts:
                continue
            table = measure().dropna(axis="columns", how="all")
            tables.setdefault(title, []).extend(json.loads(table.to_json(orient="records")))
            write_json(args.output, result)
            text = table.to_markdown(index=False, floatfmt=",.2f")
            print(f"\n**{title}** on {machine['processor']}, {dtype}\n\n{text}", flush=True)


if __name__ == "__main__":
    run_script(main)
