"""A run's folder: its record, its metrics, its one resume file, and the lock that guards them.

run.json        settings, data and base fingerprints, versions, status, cost, final losses
metrics.jsonl   a line per log interval and per evaluation
resume.pt       all that --from_resume continues from
"""

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree

import torch
from filelock import FileLock, Timeout

from model.files import REPO_DIR, UserError, read_json, write_aside, write_json, write_text

EXIT_CODES = {"completed": 0, "diverged": 3, "interrupted": 130}
# Flags that do not affect the result, and paths, whose content is compared by its hash.
WITHOUT_EFFECT = {"from_resume", "overwrite", "show_sample", "show_answers", "save_dir"}
WITHOUT_EFFECT |= {"report_to", "num_workers", "log_interval", "save_interval", "eval_interval"}
WITHOUT_EFFECT |= {"data_path", "eval_data_path", "from_weight", "tokenizer_path"}
# Values of run.json that resume.pt holds, too; train_seconds: steps, loading, compilation.
STARTS = {"step": 0, "tokens": 0, "labeled_tokens": 0, "train_seconds": 0.0}
STARTS |= {"train_loss": None, "eval_loss": None}
LOCK_SECONDS = 6  # the data processes of a killed run may hold its lock for 5 s


class RunFolder:
    """`run.json`, `metrics.jsonl` and `resume.pt` of a run; only the main process writes."""

    def __init__(self, args: argparse.Namespace, is_main: bool):
        """Lock the folder that a run makes or continues; nothing else is written yet."""
        self.args, self.is_main = args, is_main
        self.path = args.save_dir / args.run_name
        self.state_path, self.metrics_path = self.path / "resume.pt", self.path / "metrics.jsonl"
        self.record: dict = {}
        self.losses: list[float] = []  # of the steps since the last log line
        self.logged = (0, 0.0)  # tokens and seconds at the last log line
        if args.from_resume and not self.state_path.is_file():
            raise UserError(f"--from_resume: no {self.state_path}; drop it or use --overwrite")
        if args.show_sample:
            return
        if self.path.exists() and not (args.from_resume or args.overwrite):
            raise UserError(f"{self.path} exists: give another name, --from_resume or --overwrite")
        reads = (args.from_weight, args.tokenizer_path, *args.data_path, *args.eval_data_path)
        for one in filter(None, reads):
            if args.overwrite and Path(one).resolve().is_relative_to(self.path.resolve()):
                raise UserError(f"--overwrite: this run reads {one}; give another name")
        if args.overwrite and self.path.exists() and not self.metrics_path.is_file():
            raise UserError(f"--overwrite: {self.path} is no run's folder; give another name")
        self.lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))  # outlives --overwrite
        if is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(timeout=LOCK_SECONDS)
            except Timeout as error:
                raise UserError(f"{self.path}: another process trains this run now") from error
        if args.from_resume:
            self.record = read_json(self.path / "run.json")

    def begin(self, facts: dict) -> dict | None:
        """Make the folder, or return the state to continue from; flags and facts must match it."""
        settings, state = printable_settings(self.args), None
        origin = {"git": git_state(), "machine": describe_machine(self.args.device)}
        if self.args.from_resume:
            before = self.record | {f"--{k}": v for k, v in self.record["settings"].items()}
            flags = {f"--{k}": v for k, v in settings.items() if k not in WITHOUT_EFFECT}
            for name, value in (flags | facts).items():
                if before.get(name) != value:
                    change = f"{name} was {before.get(name)} and is {value} now"
                    raise UserError(f"--from_resume: {change}; restore it, or start another run")
            state = self.read_state()
            continued = {"step": self.record["step"], **origin}
            origin = {"resumed": [*self.record.get("resumed", []), continued]}
        else:
            origin |= STARTS
            if self.is_main:
                if self.args.overwrite and self.path.exists():
                    rmtree(self.path)
                self.path.mkdir()
                self.metrics_path.touch()
        self.write(status="running", settings=settings, reason=None, **facts, **origin)
        return state

    def write(self, **changes: object) -> None:
        """Update `run.json`."""
        self.record |= changes
        if self.is_main:
            write_json(self.path / "run.json", self.record)

    def log(self, row: dict) -> None:
        """Append a line to `metrics.jsonl`."""
        if self.is_main:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def log_step(self, norm: float, rate: float) -> dict:
        """Log loss and speed since the last log line; return the row."""
        tokens, seconds = self.record["tokens"], self.record["train_seconds"]
        speed = (tokens - self.logged[0]) / max(seconds - self.logged[1], 1e-9)
        row = {
            "step": self.record["step"],
            "tokens": tokens,
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": norm if norm < float("inf") else None,  # of a float16 step left out
            "learning_rate": rate,
            "tokens_per_second": round(speed, 1),
        }
        self.losses, self.logged = [], (tokens, seconds)
        self.record["train_loss"] = row["loss"]
        self.log(row)
        return row

    def save_state(self, state: dict) -> None:
        """Write the resume file: a kill leaves one whole state."""
        state |= {"losses": self.losses, "record": {name: self.record[name] for name in STARTS}}
        if self.is_main:
            state["metrics"] = self.metrics_path.read_text(encoding="utf-8")
            write_aside(self.state_path, partial(torch.save, state))

    def read_state(self) -> dict:
        """Read the resume file, and forget what was logged after it."""
        path = self.state_path  # torch.load does not look at checksums
        if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is not None:
            raise UserError(f"{path}: damaged; restore it from a copy or use --overwrite")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.record |= state["record"]
        self.losses = state["losses"]
        self.logged = (self.record["tokens"], self.record["train_seconds"])
        if self.is_main:
            write_text(self.metrics_path, state["metrics"])
        return state

    @contextlib.contextmanager
    def record_end(self) -> Iterator[None]:
        """Write to `run.json` how an unfinished run ended, and release the lock."""
        try:
            yield
        except FloatingPointError as error:  # of loss, gradient or weights
            self.end("diverged", f"{error}; lower --learning_rate")
        except KeyboardInterrupt:
            self.end("interrupted", "at once")
        except Exception as error:
            is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
            is_memory = is_memory or "can't allocate memory" in str(error)  # torch's, on a CPU
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
        record, seconds = self.record, max(self.record["train_seconds"], 1e-9)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory *= 1 if sys.platform == "darwin" else 1024  # bytes
        if self.args.device == "cuda":
            memory = torch.cuda.max_memory_allocated()
        self.write(
            status=status,
            reason=reason,
            train_seconds=round(seconds, 2),
            tokens_per_second=round(record["tokens"] / seconds, 1),
            peak_memory_bytes=max(record.get("peak_memory_bytes", 0), memory),
        )
        can_resume = self.state_path.is_file() and status not in ("diverged", "oom")  # same flags
        advice = "--from_resume continues" if can_resume else "--overwrite restarts"
        if status == "completed":
            loss = record["eval_loss"]
            advice = f"saved to {self.path}" + (f", validation loss {loss:.4f}" if loss else "")
        if self.is_main:
            place = f"{self.args.run_name}: {status} at step {record['step']}"
            print(", ".join(filter(None, (place, reason, advice))))


def printable_settings(args: argparse.Namespace) -> dict:
    """Return flags as JSON values: a path in the repository is relative, another is its name."""

    def shorten(path: Path) -> str:
        path = Path(os.path.abspath(path))
        return str(path.relative_to(REPO_DIR)) if path.is_relative_to(REPO_DIR) else path.name

    start = args.from_weight  # a path, `none` or a hub id
    settings = vars(args) | {"from_weight": shorten(start) if Path(start).exists() else start}
    return json.loads(json.dumps(settings, default=shorten, sort_keys=True))


def git_state() -> dict:
    """Return the commit of this code and whether its files differ from it; empty without git."""
    git = partial(subprocess.check_output, cwd=REPO_DIR, text=True, stderr=subprocess.DEVNULL)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).strip()
        changes = git(["git", "status", "--porcelain", "--", "*.py", "*.toml", "model"])
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return {}
    return {"commit": commit, "dirty": bool(changes)}


def describe_machine(device: str) -> dict:
    """Return the processor, cores and versions that rounding depends on."""
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    elif cpuinfo.is_file() and (model := re.search("model name\t: (.*)", cpuinfo.read_text())):
        processor = f"{model[1]}, {torch.backends.cpu.get_cpu_capability()}"  # such as AVX2
    packages = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "safetensors")
    return {
        "device": device,
        "processor": processor,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }
