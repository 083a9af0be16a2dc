"""Kills training runs at many moments, continues them, and compares them with undisturbed ones.

    make stress                                          # every case, and memory over 3,000 steps
    python tests/stress_resume.py --case "lora, bfloat16, dropout" --kills 2 --memory_steps 0

The cases are every stage, type and number of processes. For each, a run of a tiny model goes
undisturbed to its end. Then the same run is started, killed with SIGKILL at a moment drawn
uniformly from the time that the undisturbed one took, continued with --from_resume and killed
again, until one comes to its end before its kill; then the next begins. Every fourth kill is aimed
instead: between the two renames that put a state into the place of the last one, which takes
microseconds and is hardly ever hit by chance; there the process that saves sends itself SIGKILL.

What must be equal, bit for bit: the final weights, the model, optimizer and random states of the
last resume state, every row of metrics.jsonl, and run.json, but for clocks, memory and the list of
continuations.

Processes are forked from this one, which has imported the libraries already, so that a start takes
a fraction of a second and most kills fall into training. Where a kill fell is read from what it
left behind.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate.utils import load as load_state_file
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import load_dataset
from trainer import train_full_sft, train_lora, train_pretrain, trainer_utils
from trainer.failures import run_script
from trainer.machine import describe_machine
from trainer.run_folder import MANIFEST, git_state

SUMMARY = Path(__file__).with_suffix(".json")
STAGES = {"pretrain": train_pretrain, "full_sft": train_full_sft, "lora": train_lora}
SHAPE = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --num_key_value_heads 1 "
    "--intermediate_size 48"
)
# Evaluations and saves come often, so that kills fall into them.
COMMON = "--device cpu --log_interval 1 --eval_interval 4 --save_interval 3 --max_seq_len 64"
EVAL_INTERVAL = 4
WAIT_SECONDS = 120  # for a process that should end by itself within seconds, on a busy machine
PEER_SECONDS = 20  # that a process waits for one that was killed before the two had met
LOST_PEER = "another process of this run did not come, died or is stuck"
AIMED_EVERY = 4  # kills
AIMED_SAVES = range(
    1, 6
)  # since the start, from 0: the first save of a run has no state to replace

PHASES = (
    *("start", "step", "evaluation", "writing a state", "between two renames"),
    *("removing the old state", "last weights"),
)


@dataclass(frozen=True)
class Case:
    """A stage with the settings that its kills are tried on."""

    stage: str
    flags: str
    processes: int = 1


# Lengths differ, so fine-tuning's batches are grouped by them.
CASES = {
    "pretrain, float32, accumulation": Case(
        "pretrain", "--dtype float32 --batch_size 4 --accumulation_steps 2 --max_steps 40"
    ),
    "pretrain, bfloat16": Case("pretrain", "--dtype bfloat16 --batch_size 8 --max_steps 40"),
    "pretrain, float32, 2 processes": Case(
        "pretrain", "--dtype float32 --batch_size 4 --max_steps 40", processes=2
    ),
    "pretrain, bfloat16, accumulation, 2 processes": Case(
        "pretrain",
        "--dtype bfloat16 --batch_size 2 --accumulation_steps 2 --max_steps 40",
        processes=2,
    ),
    "full_sft, float32, data processes": Case(
        "full_sft", "--dtype float32 --batch_size 8 --max_steps 40 --num_workers 2"
    ),
    "full_sft, bfloat16, accumulation": Case(
        "full_sft", "--dtype bfloat16 --batch_size 2 --accumulation_steps 3 --max_steps 40"
    ),
    "full_sft, float32, accumulation, 2 processes": Case(
        "full_sft",
        "--dtype float32 --batch_size 2 --accumulation_steps 2 --max_steps 40",
        processes=2,
    ),
    "full_sft, bfloat16, data processes, 2 processes": Case(
        "full_sft", "--dtype bfloat16 --batch_size 4 --max_steps 40 --num_workers 1", processes=2
    ),
    "lora, float32, dropout, accumulation": Case(
        "lora",
        "--dtype float32 --batch_size 4 --accumulation_steps 2 --max_steps 40 --lora_dropout 0.2",
    ),
    "lora, bfloat16, dropout": Case(
        "lora",
        "--dtype bfloat16 --batch_size 8 --max_steps 40 --lora_dropout 0.2 --loraplus_lr_ratio 4 "
        "--train_tokens <|im_end|> --modules_to_save norms",
    ),
    "lora, float32, dropout, 2 processes": Case(
        "lora", "--dtype float32 --batch_size 4 --max_steps 40 --lora_dropout 0.2", processes=2
    ),
    "lora, bfloat16, dropout, accumulation, 2 processes": Case(
        "lora",
        "--dtype bfloat16 --batch_size 2 --accumulation_steps 2 --max_steps 40 --lora_dropout 0.2",
        processes=2,
    ),
}

MEMORY_CASE = Case(
    "full_sft", "--dtype bfloat16 --batch_size 2 --log_interval 10 --eval_interval 50"
)


@dataclass
class Outcome:
    """What a case's kills came to."""

    name: str
    stage: str
    flags: str
    processes: int
    kills: int = 0  # of processes that had not yet ended by themselves
    survived: int = 0  # those in runs that ended exactly like the undisturbed one
    runs: int = 0
    exact_runs: int = 0
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    aimed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    differences: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- running and killing


def write_corpora(home: Path) -> None:
    """Small corpora whose samples differ in length, so that batches are grouped by it."""

    def write(name: str, records: list[dict]) -> None:
        (home / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def answers(numbers: range) -> list[dict]:
        return [
            {"instruction": f"Count to {i % 9}.", "output": " ".join(map(str, range(i % 9 + 1)))}
            for i in numbers
        ]

    write("text.jsonl", [{"text": f"The cat saw {i} birds. " * (i % 5 + 1)} for i in range(90)])
    write("sft.jsonl", answers(range(45)))
    write("valid.jsonl", answers(range(100, 140)))


def flags_of(case: Case, home: Path, run: Path) -> list[str]:
    """The command line of a run of this case, from the corpora and the base in `home`."""
    if case.stage == "pretrain":
        data = f"{SHAPE} --data_path {home}/text.jsonl --eval_data_path {home}/text.jsonl"
    else:
        data = f"--from_weight {home}/base --data_path {home}/sft.jsonl"
        data += f" --eval_data_path {home}/valid.jsonl"
    name_flag = "--lora_name" if case.stage == "lora" else "--run_name"
    return f"{COMMON} {data} {case.flags} --save_dir {run.parent} {name_flag} {run.name}".split()


def be_process(
    stage: str, flags: list[str], environment: dict[str, str], log: Path, aim: int | None
) -> None:
    """In a forked process: what `python trainer/train_<stage>.py` does, its output in `log`.

    Args:
        aim: in which save, counted from 0, it kills itself; None: in none.
    """
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - until the process ends
    torch.set_num_threads(1)
    cache = log.parent / "cache"  # not the repository's
    trainer_utils.load_dataset = functools.partial(load_dataset, cache_dir=cache)
    trainer_utils.PEER_TIMEOUT = timedelta(seconds=PEER_SECONDS)
    if aim is not None:
        die_in_save(aim)
    run_script(lambda: STAGES[stage].main(flags))


def die_in_save(aim: int) -> None:
    """Lets this process kill itself in save `aim`: the old state is aside, the new one not there.

    A first save replaces no state, so that there its kill comes before its only rename.
    """
    rename, saves = Path.rename, itertools.count()

    def renamed(path: Path, target: Path) -> Path:
        if path.name == "resume.tmp" and next(saves) == aim:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = renamed


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(case: Case, flags: list[str], log: Path, aim: int | None = None) -> list[BaseProcess]:
    """Starts a run's processes; with several, the environment is what torchrun would set."""
    log.unlink(missing_ok=True)
    group = {"WORLD_SIZE": str(case.processes), "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = str(free_port())
    started = []
    for rank in range(case.processes):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | group
        process = multiprocessing.get_context("fork").Process(
            target=be_process,
            args=(case.stage, flags, environment if case.processes > 1 else {}, log, aim),
        )
        process.start()
        started.append(process)
    return started


def wait(processes: list[BaseProcess]) -> list[int]:
    """Waits until all have ended; their exit codes, negative for a signal.

    Raises:
        TimeoutError: one hangs; it is killed.
    """
    until = time.monotonic() + WAIT_SECONDS
    try:
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                raise TimeoutError(f"a process still ran after {WAIT_SECONDS} s")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run_to_end(case: Case, home: Path, run: Path) -> float:
    """An undisturbed run; its seconds from start to end."""
    run.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    log = run.with_suffix(".log")
    codes = wait(start(case, flags_of(case, home, run), log))
    if any(codes):
        raise RuntimeError(f"{run} ended with {codes}:\n{log.read_text()}")
    return time.monotonic() - begun


def kill_run(
    case: Case, flags: list[str], log: Path, delay: float, whom: slice, aim: int | None
) -> bool:
    """Starts a run and kills the processes `whom` after `delay` seconds, unless it ended.

    With an `aim`, one kills itself. Whom a kill leaves alive must end by itself: it has lost its
    partner.

    Returns:
        Whether the kill came in time.

    Raises:
        RuntimeError: the run failed, unkilled, or one left alive ended otherwise than in the line
            that is due.
        TimeoutError: a process hangs.
    """
    processes = start(case, flags, log, aim)
    until = time.monotonic() + delay
    while time.monotonic() < until and any(process.is_alive() for process in processes):
        time.sleep(0.001)
    for process in processes[whom] if aim is None else []:
        process.kill()
    codes = wait(processes)
    text = log.read_text() if log.is_file() else ""
    was_killed = -signal.SIGKILL in codes
    due = {-signal.SIGKILL, 0, 2} if was_killed else {0}
    if not due.issuperset(codes) or (2 in codes and LOST_PEER not in text):
        raise RuntimeError(f"{' '.join(flags)} ended with {codes}:\n{text}")
    return was_killed


def phase_of(run: Path, log: Path) -> str:
    """Where a killed run was, from its log and what lies in its folder."""
    text = log.read_text() if log.is_file() else ""
    steps = [line.split()[1] for line in text.splitlines() if line.startswith("step ")]
    if not steps:
        return "start"
    has_place, has_old = (run / "resume").is_dir(), (run / "resume.old").is_dir()
    if has_place and has_old:
        return "removing the old state"
    if (run / "resume.tmp").is_dir():
        is_sealed = (run / "resume.tmp" / MANIFEST).is_file()
        return "between two renames" if has_old and is_sealed else "writing a state"
    step, last = map(int, steps[-1].split("/"))
    evaluated = any("eval_loss" in row and row["step"] == step for row in read_rows(run))
    if (step % EVAL_INTERVAL == 0 or step == last) and not evaluated:
        return "evaluation"
    return "last weights" if step == last else "step"


def read_rows(run: Path) -> list[dict]:
    """The whole rows of a run's metrics."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def next_flags(run: Path) -> list[str]:
    """How a killed run goes on: from its state, or anew when it died before the first."""
    if not run.exists():
        return []
    has_state = (run / "resume").is_dir() or (run / "resume.old").is_dir()
    return ["--from_resume"] if has_state else ["--overwrite"]


def try_case(name: str, case: Case, home: Path, kills: int, seed: int, until: float) -> Outcome:
    """Kills runs of a case `kills` times, or until the clock (monotonic) says `until`."""
    outcome = Outcome(name, case.stage, case.flags, case.processes)
    draw = random.Random(f"{seed} {name}")
    folder = home / name.replace(", ", "-").replace(" ", "-")
    seconds = run_to_end(case, home, folder / "whole")
    while outcome.kills < kills and time.monotonic() < until:
        run = folder / f"run{outcome.runs}"
        before = outcome.kills
        left = range(before, kills)
        try:
            for is_aimed, phase in kills_until_done(case, home, run, left, seconds, draw, until):
                outcome.kills += 1
                (outcome.aimed if is_aimed else outcome.phases)[phase] += 1
            differences = list(compare_runs(folder / "whole", run))
        except (RuntimeError, TimeoutError) as error:  # its kills count, as not survived
            differences = [str(error)]
        outcome.differences += differences
        outcome.survived += 0 if differences else outcome.kills - before
        outcome.runs += 1
        outcome.exact_runs += not differences
        if differences:
            break
        shutil.rmtree(run)
    return outcome


def kills_until_done(
    case: Case,
    home: Path,
    run: Path,
    numbers: range,
    seconds: float,
    draw: random.Random,
    until: float,
) -> Iterator[tuple[bool, str]]:
    """Kills and continues one run until it comes to its end.

    Args:
        numbers: of the kills of this case that are left, from 0; after them the run is left in
            peace.
        seconds: that an undisturbed run takes, from which the moments are drawn.
        until: the time (monotonic) from which on the run is left in peace.

    Yields:
        Whether a kill was aimed, and where it fell.
    """
    log = run.with_suffix(".log")
    flags = flags_of(case, home, run)
    # With two processes, sometimes one of them alone dies.
    choices = [slice(None)] if case.processes == 1 else [slice(None), slice(0, 1), slice(1, 2)]
    for number in numbers:
        if time.monotonic() > until:
            break
        is_aimed = number % AIMED_EVERY == AIMED_EVERY - 1
        aim = draw.choice(AIMED_SAVES) if is_aimed else None
        delay = WAIT_SECONDS if is_aimed else draw.uniform(0, seconds)
        if not kill_run(case, flags + next_flags(run), log, delay, draw.choice(choices), aim):
            return
        yield is_aimed, phase_of(run, log)
    kill_run(case, flags + next_flags(run), log, WAIT_SECONDS, slice(0), None)


# ---------------------------------------------------------------- comparing


def compare_runs(whole: Path, parts: Path) -> Iterator[str]:
    """What differs between an undisturbed run and one that was killed, a line each."""
    names = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (whole, parts)]
    if names[0] != names[1]:
        yield f"files {sorted(names[0] ^ names[1])}"
    for path in sorted(whole.rglob("*")):
        other = parts / path.relative_to(whole)
        has_tensors = path.suffix in (".bin", ".pkl", ".safetensors") and other.is_file()
        if has_tensors and not same(read_tensors(path), read_tensors(other)):
            yield f"{path.relative_to(whole)}"
    rows = [[comparable(row) for row in read_rows(run)] for run in (whole, parts)]
    if rows[0] != rows[1]:
        yield f"metrics.jsonl: {len(rows[0])} and {len(rows[1])} rows"
    for name in ("run.json", "resume/progress.json"):
        records = [comparable(json.loads((run / name).read_text())) for run in (whole, parts)]
        for key in sorted(records[0].keys() | records[1].keys()):
            if records[0].get(key) != records[1].get(key):
                yield f"{name}: {key} {records[0].get(key)!r} and {records[1].get(key)!r}"


def comparable(record: dict) -> dict:
    """A record without clocks, memory, commit, continuations, and settings free to differ."""
    apart = {"tokens_per_second", "train_seconds", "seconds", "window_seconds"}
    apart |= {"peak_memory_bytes", "resumed", "git"}
    kept = {name: value for name, value in record.items() if name not in apart}
    if "settings" in kept:
        free = {"save_dir", "run_name", "from_resume", "overwrite", "num_workers"}
        settings = kept["settings"].items()
        kept["settings"] = {name: value for name, value in settings if name not in free}
    return kept


def read_tensors(path: Path) -> object:
    """The content of a weights or state file."""
    return load_file(path) if path.suffix == ".safetensors" else load_state_file(path)


def same(one: object, other: object) -> bool:
    """Whether two nested values are equal, tensors and arrays bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        is_alike = one.dtype == other.dtype and one.shape == other.shape
        as_bytes = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
        return is_alike and torch.equal(*as_bytes)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return one == other


# ---------------------------------------------------------------- memory


def measure_memory(home: Path, steps: int) -> dict[int, int]:
    """Resident bytes of a run's process after each sixth of its steps, by step.

    The run evaluates every 50 steps and saves its state every 100.
    """
    run, log = home / "memory", home / "memory.log"
    flags = flags_of(MEMORY_CASE, home, run) + f"--max_steps {steps} --save_interval 100".split()
    (process,) = start(MEMORY_CASE, flags, log)
    watched = psutil.Process(process.pid)
    resident: dict[int, int] = {}
    while process.is_alive():
        step = last_step(log)
        mark = step - step % (steps // 6)
        if mark > 0 and mark not in resident:
            with contextlib.suppress(psutil.NoSuchProcess):  # it may just have ended
                resident[mark] = watched.memory_info().rss
        time.sleep(0.05)
    if wait([process]) != [0]:
        raise RuntimeError(f"{run} failed:\n{log.read_text()}")
    return resident


def last_step(log: Path) -> int:
    """The last step that a run's output tells of, 0 before the first."""
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    steps = [line for line in lines if line.startswith("step ") and line.endswith("\n")]
    return int(steps[-1].split()[1].split("/")[0]) if steps else 0


# ---------------------------------------------------------------- summary


def print_table(outcomes: list[Outcome]) -> None:
    """A line a case, and the sum."""
    total = Outcome("all", "", "", 0)
    print(f"{'case':<52} {'kills':>5} {'exact':>5}   where they fell")
    for outcome in outcomes:
        total.kills += outcome.kills
        total.survived += outcome.survived
        total.phases = dict(Counter(total.phases) + Counter(outcome.phases))
        total.aimed = dict(Counter(total.aimed) + Counter(outcome.aimed))
    for outcome in [*outcomes, total]:
        fell = told(outcome.phases)
        if any(outcome.aimed.values()):
            fell += f"; aimed: {told(outcome.aimed)}"
        print(f"{outcome.name:<52} {outcome.kills:>5} {outcome.survived:>5}   {fell}")
        for difference in outcome.differences:
            print(f"    differs: {difference}")


def told(phases: dict[str, int]) -> str:
    """How many kills fell where."""
    return ", ".join(f"{phase} {count}" for phase, count in phases.items() if count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="all")
    parser.add_argument("--kills", type=int, default=10, help="of each case (10)")
    parser.add_argument("--memory_steps", type=int, default=3000, help="0: no memory run (3000)")
    parser.add_argument("--minutes", type=float, default=12, help="kill no more after these (12)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (1)")
    parser.add_argument("--output", type=Path, default=SUMMARY, help=f"JSON ({SUMMARY.name})")
    args = parser.parse_args()
    begun, code = time.monotonic(), git_state()
    with tempfile.TemporaryDirectory(prefix="stress") as folder:
        home = Path(folder)
        write_corpora(home)
        run_to_end(CASES["pretrain, bfloat16"], home, home / "base")
        until = begun + 60 * args.minutes
        outcomes = []
        for name in args.case:
            outcomes.append(try_case(name, CASES[name], home, args.kills, args.seed, until))
            print(f"{name}: {outcomes[-1].survived} of {outcomes[-1].kills}", flush=True)
        memory = measure_memory(home, args.memory_steps) if args.memory_steps else {}
    print_table(outcomes)
    print(f"resident bytes by step: {memory}")
    summary = {
        "seed": args.seed,
        "kills": sum(outcome.kills for outcome in outcomes),
        "survived": sum(outcome.survived for outcome in outcomes),
        "seconds": round(time.monotonic() - begun),
        "cases": [asdict(outcome) for outcome in outcomes],
        "memory_bytes_by_step": memory,
        "git": code,
        "machine": describe_machine("cpu"),
    }
    args.output.write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if all(outcome.exact_runs == outcome.runs for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
