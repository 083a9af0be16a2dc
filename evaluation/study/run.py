"""Run what is missing of the study: train with the training scripts, measure, append the result.

    python evaluation/study/run.py --dry_run                    # what is missing, as commands
    python evaluation/study/run.py --jobs 2 --only 'xs-*'       # names, with * and ?
    python evaluation/study/run.py --only 'm26-*' --max_hours 2.5

Each training and each measurement is a process of its own with one thread. Weights and logs go to
--save_dir, results to runs.jsonl and nll.parquet beside this file. A run that is stopped, by
--max_hours or Ctrl-C, keeps its state, and the next call continues it. A run that diverged or
failed has its line, too; the next call repeats a failed one. A rate that becomes known adds runs.
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
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.world.generate import ensure_world
from evaluation.study.plan import Run, make_command, plan_runs
from evaluation.study.results import RESULTS_DIR, append_run, read_runs
from evaluation.study.settings import STUDY_FILE, Study, read_study
from model.checkpoint import load_model, save_model
from model.files import REPO_DIR, UserError, read_json, run_script

COST = ("steps", "tokens", "labeled_tokens", "flops", "train_seconds", "tokens_per_second")
COST += ("peak_memory_bytes", "parameters", "trainable_parameters")
ENDED = ("completed", "diverged")


class Stopped(Exception):
    """A run that was stopped from outside; its state is kept."""


@dataclass
class Runner:
    """Train and measure runs of a study, and file their results."""

    study: Study
    data: dict[str, Path]  # the world's files
    save_dir: Path
    results_dir: Path
    only: list[str]  # names of runs, with * and ?
    study_file: Path = STUDY_FILE
    deadline: float = float("inf")  # of time.monotonic()
    stop: threading.Event = field(default_factory=threading.Event)  # starts nothing after it
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the result files
    errors: list[str] = field(default_factory=list)  # of the runs that failed

    def call(self, words: list, run_id: str) -> bool:
        """Run a script with one thread, its output appended to the run's log; say if it succeeded.

        Raises:
            Stopped: the deadline or a signal came first.
        """
        command, log = [sys.executable, *map(str, words)], self.save_dir / f"{run_id}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("a", encoding="utf-8") as out:
            print("$", shlex.join(command), file=out, flush=True)
            how = {"stdout": out, "stderr": out, "env": environment, "cwd": REPO_DIR}
            process = subprocess.Popen(command, **how)
            while process.poll() is None:
                if self.is_over():
                    process.terminate()  # the training scripts save their state and end
                    process.wait()
                time.sleep(0.5)
        if self.is_over():
            raise Stopped
        return process.returncode == 0

    def is_over(self) -> bool:
        """Say whether no new process may start."""
        return self.stop.is_set() or time.monotonic() > self.deadline

    def train(self, run: Run, folder: Path) -> dict:
        """Train in `folder`, from its saved state if it has one, and return its run.json.

        Raises:
            UserError: training failed; a run that diverged is a result, not a failure.
        """
        path = folder / "run.json"
        if run.data not in self.data:
            raise UserError(f"{run.id}: the world has no data {run.data!r}")
        if read_status(path) not in ENDED:
            resumes = (folder / "resume.pt").is_file()
            how = ["--from_resume"] if resumes else ["--overwrite"] if folder.exists() else []
            self.call([*make_command(self.study, run, self.data, self.save_dir), *how], run.id)
        if read_status(path) not in ENDED:
            raise UserError(f"{run.id}: training failed; see {self.save_dir / run.id}.log")
        return read_json(path)

    def prepare_base(self, run: Run) -> dict:
        """Put a base into --save_dir, rounded to bfloat16, unless it is there."""
        folder = self.save_dir / run.id
        if not folder.is_dir():
            trained = folder.with_name(f"{run.id}-float32")
            if self.train(run, trained)["status"] != "completed":
                raise UserError(f"{run.id}: pretraining diverged; lower its rate in study.toml")
            round_base(trained, folder)
        return read_json(folder / "run.json")

    def file(self, run: Run, folder: Path, record: dict, step: int | None = None) -> None:
        """Measure a checkpoint of a run, if it completed, and append its line."""
        name, settings = f"{run.id}@{step}" if step else run.id, record["settings"]
        keys = ("learning_rate", "seed", "dtype", "device")
        line = describe_run(self.study, run, record["status"])
        line |= {"id": name, "step": step or record.get("step")}
        line |= {key: settings[key] for key in keys}
        line["settings"] = {k: v for k, v in settings.items() if v not in (None, False, "")}
        line["cost"] = {key: record[key] for key in COST if key in record}
        keys = ("base_fingerprint", "train_data", "git", "machine")
        line |= {key: record.get(key) for key in keys}
        nll = []
        if record["status"] == "completed":
            output = self.save_dir / "measured" / f"{name}.json"
            output.parent.mkdir(exist_ok=True)
            words = ["evaluation/study/measure.py", folder, "--output", output]
            words += ["--study", self.study_file]
            words += ["--prompts_csv", self.results_dir / "prompts.csv"]
            only_tune = serves_tuning_alone(self.study, run)
            if not self.call(words + ["--only_tune"] * only_tune, run.id):
                raise UserError(f"{name}: measuring failed; see {self.save_dir / run.id}.log")
            measured = read_json(output)
            line |= {key: measured[key] for key in ("weights", "scalars", "outcomes")}
            for one, found in measured["nll"].items():
                row = {"edition": self.study.edition, "set": one, "part": ""}
                nll.append(row | {"id": name} | {key: found[key] for key in ("nats", "end_nats")})
                if not only_tune:
                    nll.append(row | {"id": ""} | {key: found[key] for key in ("tokens", "ends")})
        with self.lock:
            append_run(self.results_dir, line, nll)

    def perform(self, run: Run) -> None:
        """Train a run, and file its kept checkpoints and itself; a failure is filed as well."""
        folder = self.save_dir / run.id
        try:
            record = self.prepare_base(run) if run.arm == "base" else self.train(run, folder)
            known = set(read_runs(self.results_dir, self.study.edition).id)
            for checkpoint in folder.glob("checkpoints/step_*"):
                step = int(checkpoint.name.removeprefix("step_"))
                is_new = step < record.get("steps", 0) and f"{run.id}@{step}" not in known
                if is_new and record["status"] == "completed":
                    self.file(run, checkpoint, record, step)
            self.file(run, folder, record)
        except Stopped:
            pass
        except UserError as error:
            self.errors.append(str(error))
            with self.lock:
                line = describe_run(self.study, run, "failed") | {"error": str(error)}
                append_run(self.results_dir, line, [])

    def list_missing(self) -> tuple[list[Run], set[str | None]]:
        """Return the runs that --only names and that have not ended, and what they can start from.

        A run can start from nothing (None) or from the weights of a completed run.
        """
        done = read_runs(self.results_dir, self.study.edition)
        ended = set(done.id[done.status != "failed"])
        missing = [run for run in plan_runs(self.study, done) if run.id not in ended]
        missing = [run for run in missing if any(fnmatch(run.id, name) for name in self.only)]
        return missing, {None, *done.id[done.status == "completed"]}

    def run_all(self, jobs: int) -> None:
        """Start runs, `jobs` at once and each once, until none is missing that can start.

        Raises:
            UserError: some runs failed; the others went on.
        """
        started: set[str] = set()
        running: set[Future] = set()
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                missing, starts = self.list_missing()
                ready = [r for r in missing if r.id not in started and r.start_id in starts]
                for run in [] if self.is_over() else ready[: jobs - len(running)]:
                    print(f"{time.strftime('%H:%M:%S')} {run.id} ({len(missing)} missing)")
                    started.add(run.id)
                    running.add(pool.submit(self.perform, run))
                if not running:
                    break
                try:
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:  # the training scripts save their state and end
                    self.stop.set()
                    ended, running = wait(running)
                for future in ended:
                    if future.exception():
                        self.stop.set()
                    future.result()
        print("missing:", ", ".join(run.id for run in missing) or "nothing")
        if self.errors:
            raise UserError("\n".join(self.errors))


def read_status(path: Path) -> str:
    """Return the status of a run.json; nothing before the run began."""
    return read_json(path)["status"] if path.is_file() else ""


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


def describe_run(study: Study, run: Run, status: str) -> dict:
    """Return the part of a line of runs.jsonl that the plan knows."""
    line = {"id": run.id, "edition": study.edition, "status": status} | asdict(run)
    line |= {"base": run.base_id, "data": run.data if run.arm != "base" else "pretrain"}
    return {key: line[key] for key in line if key not in ("checkpoints", "start_id")}


def serves_tuning_alone(study: Study, run: Run) -> bool:
    """Say whether a run serves the choice of a rate alone, so that no test prompt is asked."""
    size = study.sizes[run.size]
    is_shorter = run.epochs == size.tuning_epochs != size.epochs
    return run.arm != "base" and is_shorter and run.data == "sft"


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
    deadline = time.monotonic() + 3600 * args.max_hours
    study, data, study_file = read_study(args.study), ensure_world(), args.study.resolve()
    folders = args.save_dir.resolve(), args.results_dir.resolve()
    runner = Runner(study, data, *folders, args.only, study_file, deadline)
    if args.dry_run:
        for run in runner.list_missing()[0]:
            print(f"# {run.id}")
            if run.data in data:
                print(shlex.join(["python", *make_command(study, run, data, args.save_dir)]))
        return
    signal.signal(signal.SIGTERM, lambda *_: runner.stop.set())
    runner.save_dir.mkdir(parents=True, exist_ok=True)
    runner.run_all(args.jobs)


if __name__ == "__main__":
    run_script(main)
