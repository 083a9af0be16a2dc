"""Kill training runs at random moments, continue them, and compare them with undisturbed ones.

    make stress                                                        # every case
    python tests/trainer/stress_resume.py --case "lora, bfloat16, dropout" --kills 2

For each case a tiny model trains undisturbed. The same run then starts again, gets SIGKILL at a
random moment, continues with --from_resume, and so on, until it ends before its kill. Of two
processes sometimes one is killed, and the other 1 s later, as torchrun does. Processes are forks
of one that has imported the libraries, so most kills fall into training.

What must be equal, bit for bit: the final weights, all of the last resume file, every row of
metrics.jsonl, and run.json, but for clocks, memory and the list of continuations.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import DEVICE
from tests.trainer.runs import SHAPE_FLAGS, record_of, rows_of, start, write_corpora

# Evaluations and saves come often, so that kills fall into them.
COMMON = f"--device {DEVICE} --dtype float32 --log_interval 2 --eval_interval 4 --save_interval 3"
COMMON += " --max_seq_len 64 --max_steps 40"
WAIT_SECONDS = 180  # for a process that should end by itself within seconds, on a busy machine
CASES = {  # name -> (stage, flags, processes)
    "pretrain, float32, accumulation": ("pretrain", "--batch_size 4 --accumulation_steps 2", 1),
    "pretrain, bfloat16, 2 processes": ("pretrain", "--dtype bfloat16 --batch_size 4", 2),
    "full_sft, float32, data processes": ("full_sft", "--batch_size 8 --num_workers 2", 1),
    "lora, float32, dropout, 2 processes": ("lora", "--batch_size 4 --lora_dropout 0.2", 2),
    "lora, bfloat16, dropout": (
        "lora",
        "--dtype bfloat16 --batch_size 4 --accumulation_steps 2 --lora_dropout 0.2 "
        "--train_tokens <|im_end|> --modules_to_save norms --keep_checkpoints 5",
        1,
    ),
}


def flags_of(stage: str, flags: str, home: Path, run: Path) -> str:
    """Return the command line of a run, from the corpora and the base in `home`."""
    data = f"--from_weight {home}/base --data_path {home}/sft.jsonl"
    data += f" --eval_data_path {home}/valid.jsonl --show_answers 1"
    if stage == "pretrain":
        data = f"{SHAPE_FLAGS} --data_path {home}/text.jsonl --eval_data_path {home}/text.jsonl"
    name_flag = "--lora_name" if stage == "lora" else "--run_name"
    return f"{COMMON} {data} {flags} --save_dir {run.parent} {name_flag} {run.name}"


def run_for(seconds: float, case: tuple, flags: str, home: Path, log: Path, alone: bool) -> bool:
    """Start a run and kill it after some seconds; return whether it had ended by itself.

    With `alone` the first process is killed, and the others 1 s later.
    """
    processes = start(case[0], flags, case[2], home, log)
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.is_alive() for process in processes):
        time.sleep(0.001)
    codes = {process.exitcode for process in processes}
    for process in processes:
        process.kill()
        time.sleep(1.0 if alone and len(processes) > 1 else 0.0)
    for process in processes:
        process.join()
    if not codes <= {0, None}:
        raise RuntimeError(f"{flags} ended with {codes}:\n{log.read_text()}")
    return codes == {0}


def try_case(name: str, home: Path, kills: int, draw: random.Random) -> tuple[int, list[str]]:
    """Kill runs of a case; return how many kills were exact, and what differs."""
    case, exact = CASES[name], 0
    folder = home / name.replace(", ", "-").replace(" ", "-")
    folder.mkdir()
    log, whole = folder / "log", folder / "whole"
    begun = time.monotonic()
    run_for(WAIT_SECONDS, case, flags_of(*case[:2], home, whole), home, log, False)
    seconds = time.monotonic() - begun
    while exact < kills:
        run, of_run, ended = folder / f"run{exact}", 0, False
        while not ended:
            flags = flags_of(*case[:2], home, run)
            if (run / "resume.pt").is_file():
                flags += " --from_resume"
            elif run.exists():
                flags += " --overwrite"
            is_last = exact + of_run >= kills
            delay = WAIT_SECONDS if is_last else draw.uniform(0, seconds)
            ended = run_for(delay, case, flags, home, log, draw.random() < 0.3)
            of_run += not ended
        if found := list(compare_runs(whole, run)):
            return exact, found
        exact += of_run
        shutil.rmtree(run)
    print(f"{name}: {exact} kills exact", flush=True)
    return exact, []


def compare_runs(whole: Path, parts: Path) -> Iterator[str]:
    """Yield what differs between an undisturbed run and one that was stopped, a line each."""
    names = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (whole, parts)]
    if names[0] != names[1] - {"resume.pt.tmp"}:
        yield f"files: {sorted(names[0] ^ names[1])}"
    for path in sorted(whole.rglob("*.safetensors")):
        if not is_same(load_file(path), load_file(parts / path.relative_to(whole))):
            yield f"{path.relative_to(whole)}: differs"
    states = [torch.load(run / "resume.pt", weights_only=True) for run in (whole, parts)]
    for state in states:
        state["record"] = drop_clocks(state["record"])
        state.pop("metrics")  # with clocks; the rows are compared below
    if not is_same(*states):
        yield "resume.pt: differs"
    if rows_of(whole) != rows_of(parts):
        yield f"metrics.jsonl: {len(rows_of(whole))} and {len(rows_of(parts))} rows"
    records = [drop_clocks(record_of(run)) for run in (whole, parts)]
    for key in sorted(records[0].keys() | records[1].keys()):
        if records[0].get(key) != records[1].get(key):
            yield f"run.json: {key} {records[0].get(key)!r} and {records[1].get(key)!r}"


def drop_clocks(record: dict) -> dict:
    """Leave out clocks, memory, commit, continuations, and settings free to differ."""
    apart = {"tokens_per_second", "train_seconds", "peak_memory_bytes", "resumed", "git"}
    kept = {name: value for name, value in record.items() if name not in apart}
    if "settings" in kept:
        free = {"save_dir", "run_name", "from_resume", "overwrite", "num_workers"}
        kept["settings"] = {k: v for k, v in kept["settings"].items() if k not in free}
    return kept


def is_same(one: object, other: object) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, torch.Tensor):
        is_alike = one.dtype == other.dtype and one.shape == other.shape
        as_bytes = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
        return is_alike and torch.equal(*as_bytes)
    return one == other


def main(argv: list[str] | None = None) -> int:
    """Try the cases, and say after how many kills a run ended bit for bit the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="all")
    parser.add_argument("--kills", type=int, default=10, help="of each case (10)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (1)")
    args = parser.parse_args(argv)
    exact = 0
    with tempfile.TemporaryDirectory(prefix="stress") as folder:
        home = Path(folder)
        write_corpora(home)
        base = flags_of("pretrain", "--batch_size 8", home, home / "base")
        run_for(WAIT_SECONDS, ("pretrain", "", 1), base, home, home / "log", False)
        for name in args.case:
            survived, found = try_case(name, home, args.kills, random.Random(f"{args.seed} {name}"))
            exact += survived
            for line in found:
                print(f"{name}: differs: {line}")
    total = args.kills * len(args.case)
    print(f"{exact} of {total} kills left the run bit for bit the same")
    return 0 if exact >= total else 1


if __name__ == "__main__":
    sys.exit(main())
