"""A run's folder: its record, its metrics, its one resume file, and the lock that guards them.

run.json        settings, data and base fingerprints, versions, status, cost, final losses
metrics.jsonl   a line per log interval and per evaluation
resume.pt       all that --from_resume continues from; a completed run needs it no longer
"""

import argparse
import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from shutil import rmtree

import torch
from filelock import FileLock, Timeout

from model.cli import UserError
from model.files import REPO_DIR, read_json, write_aside, write_json, write_text
from model.machine import describe_machine, git_state, peak_memory

# Flags that do not change the result, and paths, whose content is compared by its hash.
WITHOUT_EFFECT = {
    "data_path",
    "eval_data_path",
    "eval_interval",
    "from_resume",
    "from_weight",
    "log_interval",
    "num_workers",
    "overwrite",
    "report_to",
    "save_dir",
    "save_interval",
    "show_answers",
    "show_sample",
    "tokenizer_path",
}
# Values of run.json that resume.pt holds, too; train_seconds: steps, loading, compilation.
STARTS = {
    "step": 0,
    "tokens": 0,
    "labeled_tokens": 0,
    "train_seconds": 0.0,
    "train_loss": None,
    "eval_loss": None,
}
LOCK_SECONDS = 6  # the data processes of a killed run may hold its lock for 5 s


class Diverged(Exception):
    """A loss, a gradient or a weight is no longer finite."""


class RunFolder:
    """`run.json`, `metrics.jsonl` and `resume.pt` of a run; only the main process writes."""

    def __init__(self, args: argparse.Namespace, is_main: bool) -> None:
        """Lock the folder that a run makes or continues; nothing else is written yet."""
        self.args = args
        self.is_main = is_main
        self.path = args.save_dir / args.run_name
        self.record_path = self.path / "run.json"
        self.state_path = self.path / "resume.pt"
        self.metrics_path = self.path / "metrics.jsonl"
        self.lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))  # outlives --overwrite
        self.record: dict = {}
        self.losses: list[float] = []  # of the steps since the last log line
        self.logged = (0, 0.0)  # tokens and seconds at the last log line
        if args.show_sample:
            return
        self.check_place()
        self.acquire_lock()
        if args.from_resume:
            self.record = read_json(self.record_path)

    @property
    def is_complete(self) -> bool:
        """Whether the run that is to be continued has ended."""
        return self.record.get("status") == "completed"

    def check_place(self) -> None:
        """Refuse to continue what is not there, and to write over what is not this run's."""
        args = self.args
        if args.from_resume:
            # A completed run has no state; its record says that there is nothing to do.
            if not (self.state_path.is_file() or self.record_path.is_file()):
                raise UserError(f"--from_resume: no {self.state_path}; drop it or use --overwrite")
            return
        if not args.overwrite:
            if self.path.exists():
                ways = "give another name, --from_resume or --overwrite"
                raise UserError(f"{self.path} exists: {ways}")
            return
        for path in (args.from_weight, args.tokenizer_path, *args.data_path, *args.eval_data_path):
            if path and Path(path).resolve().is_relative_to(self.path.resolve()):
                raise UserError(f"--overwrite: this run reads {path}; give another name")
        if self.path.exists() and not self.metrics_path.is_file():
            raise UserError(f"--overwrite: {self.path} is no run's folder; give another name")

    def acquire_lock(self) -> None:
        """Keep other processes from training the same run."""
        if not self.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise UserError(f"{self.path}: another process trains this run now") from error

    def begin(self, facts: dict) -> dict | None:
        """Make the folder, or return the state to continue from; flags and facts must match it."""
        settings = printable_settings(self.args)
        origin = {"git": git_state(), "machine": describe_machine(self.args.device)}
        state = None
        if self.args.from_resume:
            self.compare(settings, facts)
            state = self.read_state()
            continued = {"step": self.record["step"], **origin}
            origin = {"resumed": [*self.record.get("resumed", []), continued]}
        else:
            origin |= STARTS
            self.make()
        self.write(status="running", settings=settings, reason=None, **facts, **origin)
        return state

    def make(self) -> None:
        """Make the folder anew."""
        if not self.is_main:
            return
        if self.args.overwrite and self.path.exists():
            rmtree(self.path)
        self.path.mkdir()
        self.metrics_path.touch()

    def compare(self, settings: dict, facts: dict) -> None:
        """Refuse to continue as another run: with other flags, data, base or processes."""
        known = {name: self.record.get(name) for name in facts}
        before = list_conditions(self.record["settings"], known)
        now = list_conditions(settings, facts)
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                change = f"{name} was {before.get(name)} and is {now.get(name)} now"
                raise UserError(f"--from_resume: {change}; restore it, or start another run")

    def write(self, **changes: object) -> None:
        """Update `run.json`."""
        self.record |= changes
        if self.is_main:
            write_json(self.record_path, self.record)

    def log(self, row: dict) -> None:
        """Append a line to `metrics.jsonl`."""
        if self.is_main:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def count_step(self, tokens: int, labeled_tokens: int) -> None:
        """Count an optimizer step and what it has read."""
        self.record["step"] += 1
        self.record["tokens"] += tokens
        self.record["labeled_tokens"] += labeled_tokens

    def log_step(self, norm: float, rate: float) -> dict:
        """Log loss and speed since the last log line; return the row."""
        tokens = self.record["tokens"]
        seconds = self.record["train_seconds"]
        tokens_before, seconds_before = self.logged
        speed = (tokens - tokens_before) / max(seconds - seconds_before, 1e-9)
        row = {
            "step": self.record["step"],
            "tokens": tokens,
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": norm if norm < float("inf") else None,  # of a float16 step left out
            "learning_rate": rate,
            "tokens_per_second": round(speed, 1),
        }
        self.losses = []
        self.logged = (tokens, seconds)
        self.record["train_loss"] = row["loss"]
        self.log(row)
        return row

    def save_state(self, state: dict) -> None:
        """Write the resume file: a kill leaves one whole state."""
        state["losses"] = self.losses
        state["record"] = {name: self.record[name] for name in STARTS}
        if self.is_main:
            state["metrics"] = self.metrics_path.read_text(encoding="utf-8")
            write_aside(self.state_path, partial(torch.save, state))

    def read_state(self) -> dict:
        """Read the resume file, and forget what was logged after it."""
        path = self.state_path
        if not path.is_file():
            raise UserError(f"--from_resume: no {path}; drop it or use --overwrite")
        # torch.load does not look at the checksums of the zip file that it reads.
        if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is not None:
            raise UserError(f"{path}: damaged; restore it from a copy or use --overwrite")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.record |= state["record"]
        self.losses = state["losses"]
        self.logged = (self.record["tokens"], self.record["train_seconds"])
        if self.is_main:
            write_text(self.metrics_path, state["metrics"])
        return state

    def discard_state(self) -> None:
        """Delete the resume file of a completed run: 3 times the size of its weights."""
        if self.is_main:
            self.state_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def record_end(self) -> Iterator[None]:
        """Write to `run.json` how an unfinished run ended, and release the lock."""
        try:
            yield
        except Diverged as error:
            self.end("diverged", f"{error}; lower --learning_rate")
        except KeyboardInterrupt:
            self.end("interrupted", "at once")
        except Exception as error:
            is_memory = is_out_of_memory(error)
            with contextlib.suppress(UserError):  # the disk may be full
                self.end("oom" if is_memory else "failed", f"{type(error).__name__}: {error}")
            if is_memory:
                remedy = "halve --batch_size and double --accumulation_steps"
                step = self.record["step"] + 1
                raise UserError(f"out of memory in step {step}: {remedy}") from error
            raise
        finally:
            self.lock.release()

    def end(self, status: str, reason: str | None = None) -> None:
        """Write how the run ended and what it cost; print how it can be continued."""
        seconds = max(self.record["train_seconds"], 1e-9)
        memory = peak_memory(self.args.device)
        self.write(
            status=status,
            reason=reason,
            train_seconds=round(seconds, 2),
            tokens_per_second=round(self.record["tokens"] / seconds, 1),
            peak_memory_bytes=max(self.record.get("peak_memory_bytes", 0), memory),
        )
        if status == "completed":
            self.discard_state()
        if self.is_main:
            place = f"{self.args.run_name}: {status} at step {self.record['step']}"
            words = [place, reason, self.advise(status)]
            print(", ".join(word for word in words if word))

    def advise(self, status: str) -> str:
        """Say where the run's result is, or how to go on."""
        if status == "completed":
            loss = self.record["eval_loss"]
            validation = f", validation loss {loss:.4f}" if loss else ""
            return f"saved to {self.path}{validation}"
        # The same flags would diverge, or need as much memory, once more.
        can_resume = self.state_path.is_file() and status not in ("diverged", "oom")
        return "--from_resume continues" if can_resume else "--overwrite restarts"


def is_out_of_memory(error: Exception) -> bool:
    """Decide whether an error says that memory is short; torch on a CPU has no class for it."""
    is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_known or "can't allocate memory" in str(error)


def list_conditions(settings: dict, facts: dict) -> dict:
    """List by name what a run may not change when it is continued.

    A file counts by its content, not by its name.
    """
    conditions = {}
    for name, value in settings.items():
        if name not in WITHOUT_EFFECT:
            conditions[f"--{name}"] = value
    for name, value in facts.items():
        if isinstance(value, dict):
            for key, part in value.items():
                if key == "files":
                    conditions[f"{name}.sha256"] = [file["sha256"] for file in part]
                else:
                    conditions[f"{name}.{key}"] = part
        else:
            conditions[name] = value
    return conditions


def printable_settings(args: argparse.Namespace) -> dict:
    """Return flags as JSON values: a path in the repository is relative, another is its name."""

    def shorten(path: Path) -> str:
        path = Path(os.path.abspath(path))
        return str(path.relative_to(REPO_DIR)) if path.is_relative_to(REPO_DIR) else path.name

    start = args.from_weight  # a path, `none` or a hub id
    settings = vars(args) | {"from_weight": shorten(start) if Path(start).exists() else start}
    return json.loads(json.dumps(settings, default=shorten, sort_keys=True))
