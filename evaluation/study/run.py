"""Run what is missing of the study: train with the training scripts, measure, append the result.

    python evaluation/study/run.py --dry_run                    # what is missing, as commands
    python evaluation/study/run.py --jobs 2 --only 'xs-*'       # names, with * and ?
    python evaluation/study/run.py --only 'm26-*' --max_hours 2.5

Each training and each measurement is a process of its own with one thread. Weights and logs go to
--save_dir, results to runs.jsonl and nll.parquet beside this file. A run that is stopped, by
--max_hours or Ctrl-C, keeps its state, and the next call continues it. A rate that becomes known
adds runs on the way.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.world.generate import ensure_world
from evaluation.study.plan import Run, make_flags, plan_runs
from evaluation.study.results import RESULTS_DIR, append_run, read_runs
from evaluation.study.settings import STUDY_FILE, Study, read_study
from model.checkpoint import load_model, save_model
from model.files import REPO_DIR, UserError, read_json, run_script

COST = ("steps", "tokens", "labeled_tokens", "flops", "train_seconds", "tokens_per_second")
COST += ("peak_memory_bytes", "parameters", "trainable_parameters")
LOCK = threading.Lock()  # of the result files, which all jobs append to
STOP = threading.Event()  # no new process starts after it


class Stopped(Exception):
    """A run that was told to stop; its state is kept."""


def call_script(words: list, log: Path, deadline: float, may_fail: bool = False) -> None:
    """Run a script with one thread, its output appended to `log`; stop it at the deadline.

    Raises:
        UserError: the script failed.
        Stopped: the deadline came first.
    """
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=REPO_DIR)
        while process.poll() is None:
            if STOP.is_set() or time.monotonic() > deadline:
                STOP.set()
                process.terminate()  # the training scripts save their state and end
                process.wait()
                raise Stopped
            time.sleep(0.5)
    if process.returncode and not may_fail:
        raise UserError(f"{words[0]} failed for {log.stem}; see {log}")


def spell_flags(flags: dict) -> list[str]:
    """Return flags as words of a command line: a list takes several, true stands bare."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}"]
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def make_command(study: Study, run: Run, data: dict[str, Path], save_dir: Path) -> list[str]:
    """Return the command that trains a run."""
    if run.arm and run.data not in data:
        raise UserError(f"{run.id}: the world has no data {run.data!r}; it has {', '.join(data)}")
    script, flags = make_flags(study, run, data, save_dir)
    return [f"trainer/{script}.py", *spell_flags(flags)]


def train_run(command: list[str], folder: Path, log: Path, deadline: float) -> dict:
    """Train in `folder`, from its saved state if one is there, and return its run.json.

    Raises:
        UserError: training failed; a run that diverged is a result, not a failure.
    """
    record = folder / "run.json"
    if not record.is_file() or read_json(record)["status"] not in ("completed", "diverged"):
        resumes = (folder / "resume.pt").is_file()
        how = ["--from_resume"] if resumes else ["--overwrite"] if folder.exists() else []
        call_script([*command, *how], log, deadline, may_fail=True)
    if not record.is_file() or read_json(record)["status"] not in ("completed", "diverged"):
        raise UserError(f"{folder.name}: training failed; see {log}")
    return read_json(record)


def round_base(trained: Path, folder: Path) -> None:
    """Write a base with its weights rounded to bfloat16, from which all arms start."""
    model = load_model(trained)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, trained, aside)
    shutil.copyfile(trained / "run.json", aside / "run.json")
    os.replace(aside, folder)


def prepare_base(study: Study, run: Run, args: argparse.Namespace, deadline: float) -> dict:
    """Put a base into --save_dir: the published one, or one that is trained now."""
    folder = args.save_dir / run.id
    published = study.bases[run.base.rstrip("0123456789")].published.get(run.id)
    if not folder.is_dir() and published:
        shutil.copytree(REPO_DIR / published, folder)
    if not folder.is_dir():
        command = make_command(study, run, ensure_world(), args.save_dir)
        trained = folder.with_name(f"{run.id}-float32")
        record = train_run(command, trained, args.save_dir / f"{run.id}.log", deadline)
        if record["status"] != "completed":
            raise UserError(f"{run.id}: pretraining diverged; lower its rate in {STUDY_FILE.name}")
        round_base(trained, folder)
    return read_json(folder / "run.json")


def is_only_tuning(study: Study, run: Run) -> bool:
    """Say whether a run serves the choice of a rate alone, so that no test prompt is asked."""
    size = study.sizes[run.size]
    return bool(run.arm) and run.epochs == size.tuning_epochs != size.epochs and run.data == "sft"


def file_checkpoint(
    study: Study, run: Run, folder: Path, record: dict, args: argparse.Namespace, deadline: float
) -> None:
    """Measure a checkpoint of a run and append its line."""
    step = folder.name.removeprefix("step_") if folder.name != run.id else ""
    name = f"{run.id}@{step}" if step else run.id
    line = {
        "id": name,
        "edition": study.edition,
        "size": run.size,
        "base": run.base_id if run.arm else None,
        "arm": run.arm or "base",
        "learning_rate": record["settings"]["learning_rate"],
        "seed": record["settings"]["seed"],
        "dtype": record["settings"]["dtype"],
        "device": record["settings"]["device"],
        "status": record["status"],
        "epochs": run.epochs,
        "data": run.data if run.arm else "pretrain",
        "start": run.start,
        "samples": run.samples,
        "step": int(step) if step else record.get("step"),
        "settings": {k: v for k, v in record["settings"].items() if v not in (None, False, "")},
        "cost": {key: record[key] for key in COST if key in record},
        "base_fingerprint": record.get("base_fingerprint"),
        "train_data": record.get("train_data"),
        "git": record.get("git"),
        "machine": record.get("machine"),
    }
    nll = []
    if record["status"] == "completed":
        output = args.save_dir / "measured" / f"{name}.json"
        output.parent.mkdir(exist_ok=True)
        words = ["evaluation/study/measure.py", folder, "--output", output, "--study", args.study]
        words += ["--prompts_csv", args.results_dir / "prompts.csv"]
        words += ["--only_tune"] if is_only_tuning(study, run) else []
        call_script(words, args.save_dir / f"{run.id}.log", deadline)
        measured = read_json(output)
        line |= {key: measured[key] for key in ("weights", "scalars", "outcomes")}
        for name_of_set, found in measured["nll"].items():
            place = {"edition": study.edition, "set": name_of_set, "part": ""}
            nats = {key: found[key] for key in ("nats", "end_nats")}
            nll.append(place | nats | {"id": name})
            if "--only_tune" not in words:
                counts = {key: found[key] for key in ("tokens", "ends")}
                nll.append(place | counts | {"id": ""})
    with LOCK:
        append_run(args.results_dir, line, nll)


def perform_run(study: Study, run: Run, args: argparse.Namespace, deadline: float) -> None:
    """Train a run, and file its kept checkpoints and itself."""
    folder = args.save_dir / run.id
    if run.arm is None:
        record = prepare_base(study, run, args, deadline)
    else:
        command = make_command(study, run, ensure_world(), args.save_dir)
        record = train_run(command, folder, args.save_dir / f"{run.id}.log", deadline)
    known = set(read_runs(args.results_dir, study.edition).id)
    if record["status"] == "completed":
        for checkpoint in folder.glob("checkpoints/step_*"):
            step = checkpoint.name.removeprefix("step_")
            if int(step) < record["steps"] and f"{run.id}@{step}" not in known:
                file_checkpoint(study, run, checkpoint, record, args, deadline)
    file_checkpoint(study, run, folder, record, args, deadline)


def list_missing(study: Study, args: argparse.Namespace) -> tuple[list[Run], set[str]]:
    """Return the runs without a result that are named by --only, and the ids that have one."""
    done = read_runs(args.results_dir, study.edition)
    known = set(done.id)
    wanted = [run for run in plan_runs(study, done) if run.id not in known]
    missing = [run for run in wanted if any(fnmatch(run.id, name) for name in args.only)]
    return missing, set(done.id[done.status == "completed"])


def run_all(study: Study, args: argparse.Namespace) -> None:
    """Start runs, --jobs at once, until none is missing that can start."""
    deadline = time.monotonic() + 3600 * args.max_hours
    running: dict[Future, Run] = {}
    failed: dict[str, Exception] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        while True:
            missing, completed = list_missing(study, args)
            busy = {run.id for run in running.values()} | failed.keys()
            ready = [
                run
                for run in missing
                if run.id not in busy and (run.start_id is None or run.start_id in completed)
            ]
            if STOP.is_set() or time.monotonic() > deadline:
                ready = []
            for run in ready[: args.jobs - len(running)]:
                print(f"{time.strftime('%H:%M:%S')} {run.id} ({len(missing)} missing)", flush=True)
                running[pool.submit(perform_run, study, run, args, deadline)] = run
            if not running:
                break
            try:
                ended = wait(running, return_when=FIRST_COMPLETED).done
            except KeyboardInterrupt:  # the training scripts save their state and end
                STOP.set()
                ended = wait(running).done
            for future in ended:
                run = running.pop(future)
                error = future.exception()
                if isinstance(error, UserError | Stopped):
                    failed[run.id] = error
                elif error:
                    STOP.set()
                    raise error
    left = len(list_missing(study, args)[0])
    print(f"{left} runs are missing" if left else "nothing is missing")
    if broken := [str(error) for error in failed.values() if isinstance(error, UserError)]:
        raise UserError("\n".join(broken))


def main() -> None:
    """Run the study, or print the commands that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, default=STUDY_FILE)
    parser.add_argument("--save_dir", type=Path, default=REPO_DIR / "out" / "study")
    parser.add_argument("--results_dir", type=Path, default=RESULTS_DIR)
    parser.add_argument("--only", nargs="+", default=["*"], help="names of runs, with * and ?")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--max_hours", type=float, default=1e6, help="stop runs after this time")
    parser.add_argument("--dry_run", action="store_true", help="print the commands alone")
    args = parser.parse_args()
    study = read_study(args.study)
    if args.dry_run:
        data = ensure_world()
        for run in list_missing(study, args)[0]:
            print(f"# {run.id}")
            if run.arm is None or run.data in data:
                print(shlex.join(["python", *make_command(study, run, data, args.save_dir)]))
        return
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    args.save_dir = args.save_dir.resolve()
    args.save_dir.mkdir(parents=True, exist_ok=True)
    run_all(study, args)


if __name__ == "__main__":
    run_script(main)
