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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree

import torch
from filelock import FileLock, Timeout

from model.files import REPO_DIR, UserError, read_json, replace_file, write_json, write_text

EXIT_CODES = {"completed": 0, "diverged": 3, "interrupted": 130}
# Flags that do not affect the result, and paths, whose content is compared by its hash.
WITHOUT_EFFECT = {"from_resume", "overwrite", "show_sample", "show_answers", "save_dir"}
WITHOUT_EFFECT |= {"report_to", "num_workers", "log_interval", "save_interval", "eval_interval"}
WITHOUT_EFFECT |= {"data_path", "eval_data_path", "from_weight", "tokenizer_path"}
LOCK_SECONDS = 6  # the data processes of a killed run may hold its lock for 5 s


class Diverged(ArithmeticError):
    """The loss, its gradient or the weights are no longer finite; the message names the step."""


@dataclass
class Progress:
    """Where a run stands; a part of its resume state."""

    step: int = 0
    tokens: int = 0
    labeled_tokens: int = 0
    seconds: float = 0.0  # of training and loading, not of evaluation and saving
    losses: list[float] = field(default_factory=list)  # of the steps since the last log line
    logged_tokens: int = 0  # `tokens` at the last log line
    logged_seconds: float = 0.0


class RunFolder:
    """`run.json`, `metrics.jsonl` and `resume.pt` of a run; only the main process writes."""

    def __init__(self, args: argparse.Namespace, is_main: bool):
        """Lock the folder that a run makes or continues; nothing else is written yet."""
        self.args, self.is_main = args, is_main
        self.path = args.save_dir / args.run_name
        self.state_path = self.path / "resume.pt"
        self.record, self.progress, self.saved_step = {}, Progress(), None
        if args.from_resume and not self.state_path.is_file():
            raise UserError(f"--from_resume: {self.state_path} is not there; use --overwrite")
        if args.show_sample:
            return
        if self.path.exists() and not (args.from_resume or args.overwrite):
            raise UserError(f"{self.path} exists: add --from_resume or --overwrite")
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
        """Make the folder, or return the state of a run to be continued.

        Args:
            facts: what makes the run what it is, besides its flags; the continued run must match.
        """
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
            continued = {"step": self.progress.step, **origin}
            origin = {"resumed": [*self.record.get("resumed", []), continued]}
        elif self.is_main:
            if self.path.exists() and self.args.overwrite:
                rmtree(self.path)
            self.path.mkdir()
            (self.path / "metrics.jsonl").touch()
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
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def log_step(self, norm: float, rate: float) -> dict:
        """Log loss and speed since the last log line; return the row."""
        progress = self.progress
        seconds = max(progress.seconds - progress.logged_seconds, 1e-9)
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": sum(progress.losses) / len(progress.losses),
            "grad_norm": norm if norm < float("inf") else None,  # of a float16 step left out
            "learning_rate": rate,
            "tokens_per_second": round((progress.tokens - progress.logged_tokens) / seconds, 1),
        }
        progress.losses = []
        progress.logged_tokens, progress.logged_seconds = progress.tokens, progress.seconds
        self.record["train_loss"] = row["loss"]
        self.log(row)
        return row

    def save_state(self, state: dict) -> None:
        """Write the resume file aside, flush it, and move it into the place of the last one.

        So a kill at any moment, or a full disk, leaves one whole state.
        """
        if self.is_main:
            state["progress"] = asdict(self.progress)
            state["metrics"] = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
            state["record"] = {name: self.record.get(name) for name in ("train_loss", "eval_loss")}
            aside = self.state_path.with_suffix(".tmp")
            try:
                torch.save(state, aside)
                replace_file(aside, self.state_path)
            except (OSError, RuntimeError) as error:  # the latter is torch's
                raise UserError(f"{self.state_path}: not written ({error})") from error
            finally:
                aside.unlink(missing_ok=True)
        self.saved_step = self.progress.step

    def read_state(self) -> dict:
        """Read the resume file, and forget what was logged after it."""
        path = self.state_path  # torch.load does not look at checksums
        if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is not None:
            raise UserError(f"{path}: damaged; restore it from a copy or use --overwrite")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.progress = Progress(**state["progress"])
        self.saved_step = self.progress.step
        self.record |= state["record"]
        if self.is_main:
            write_text(self.path / "metrics.jsonl", state["metrics"])
        return state

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
            is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
            is_memory = is_memory or "can't allocate memory" in str(error)  # torch's, on a CPU
            with contextlib.suppress(OSError):  # the disk may be full
                self.end("oom" if is_memory else "failed", f"{type(error).__name__}: {error}")
            if not is_memory:
                raise
            remedy = "halve --batch_size and double --accumulation_steps: the same training"
            raise UserError(f"out of memory in step {self.progress.step + 1}: {remedy}") from error
        finally:
            self.lock.release()

    def end(self, status: str, reason: str = "") -> None:
        """Write and print how the run ended, what it cost, and how it can be continued."""
        progress, loss = self.progress, self.record.get("eval_loss")
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if self.args.device == "cuda":
            memory = torch.cuda.max_memory_allocated()
        self.write(
            status=status,
            reason=reason or None,
            step=progress.step,
            tokens=progress.tokens,
            labeled_tokens=progress.labeled_tokens,
            train_seconds=round(progress.seconds, 2),
            tokens_per_second=round(progress.tokens / max(progress.seconds, 1e-9), 1),
            peak_memory_bytes=max(self.record.get("peak_memory_bytes", 0), memory),
        )
        kept = f"the state of step {self.saved_step} is kept: --from_resume"
        if status == "completed":
            kept = f"saved to {self.path}"
        elif not self.saved_step:
            kept = "no state is kept: --overwrite"
        loss = "" if loss is None else f"validation loss {loss:.4f}"
        parts = (f"{self.args.run_name}: {status} at step {progress.step}", reason, loss, kept)
        if self.is_main:
            print(", ".join(filter(None, parts)))


def printable_settings(args: argparse.Namespace) -> dict:
    """Return every flag as a JSON value; paths are relative to the repository or to here."""

    def shorten(value: object) -> object:
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if not isinstance(value, Path):
            return value
        absolute = Path(os.path.abspath(value))
        roots = [root for root in (REPO_DIR, Path.cwd()) if absolute.is_relative_to(root)]
        return str(absolute.relative_to(roots[0])) if roots else absolute.name

    settings = dict(sorted(vars(args).items()))
    if Path(args.from_weight).exists():  # neither `none` nor a hub id
        settings["from_weight"] = Path(args.from_weight)
    return {name: shorten(value) for name, value in settings.items()}


def git_state() -> dict:
    """Return the commit of this code and whether its files differ from it; empty without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(REPO_DIR), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        changes = git("status", "--porcelain", "--", "*.py", "*.toml", "model")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return {}


def describe_machine(device: str) -> dict:
    """Return the processor, cores and versions that rounding depends on."""
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    elif cpuinfo.is_file() and (model := re.search("model name\t: (.*)", cpuinfo.read_text())):
        processor = model[1]
    packages = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "safetensors")
    return {
        "device": device,
        "processor": processor,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }
