"""A run's folder: its record, its metrics, and what the record tells of code and machine."""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

from model.model_minimind import read_json, write_text
from trainer.arguments import SettingsError

REPO_DIR = Path(__file__).resolve().parents[1]


def printable_path(path: Path) -> str:
    """A path as a record shows it: relative to the repository or the user's folder, or its name."""
    absolute = Path(os.path.abspath(path))
    for root in (REPO_DIR, Path.cwd()):
        if absolute.is_relative_to(root):
            return str(absolute.relative_to(root))
    return absolute.name


def base_reference(from_weight: str) -> str:
    """How an adapter names its base: a hub id, or a path that can be found again from here."""
    path = Path(from_weight)
    if not path.exists():
        return from_weight
    absolute = path.absolute()
    inside = absolute.is_relative_to(REPO_DIR)
    return str(absolute.relative_to(REPO_DIR) if inside else absolute)


def printable_settings(args: argparse.Namespace) -> dict:
    """Every setting as JSON values, with paths shortened by :func:`printable_path`."""

    def printable(value: object) -> object:
        if isinstance(value, Path):
            return printable_path(value)
        return [printable(item) for item in value] if isinstance(value, list | tuple) else value

    settings = {name: printable(value) for name, value in sorted(vars(args).items())}
    if settings["from_weight"] != "none" and Path(settings["from_weight"]).exists():
        settings["from_weight"] = printable_path(Path(settings["from_weight"]))
    return settings


def git_state() -> dict:
    """The commit of this code and whether files differ from it; empty outside a checkout."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(REPO_DIR), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or (commit := git("rev-parse", "HEAD")) is None:
        return {}
    return {"commit": commit, "dirty": bool(git("status", "--porcelain"))}


def describe_machine(device: str) -> dict:
    """Processor, cores and versions that a run's numbers depend on."""
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cpu" and cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
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


def peak_memory_bytes(device: str) -> int:
    """The most memory held so far: allocated on the GPU, or resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class RunFolder:
    """``run.json``, ``metrics.jsonl`` and ``resume/`` of one run; only the main process writes."""

    path: Path
    is_main: bool
    record: dict = field(default_factory=dict)

    def write(self, **changes: object) -> None:
        """Updates ``run.json``."""
        self.record |= changes
        if self.is_main:
            write_text(self.path / "run.json", json.dumps(self.record, indent=2) + "\n")

    def log(self, row: dict) -> None:
        """Appends a line to ``metrics.jsonl``."""
        if self.is_main:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def drop_rows_after(self, step: int) -> None:
        """Removes lines that a resumed run is about to write again."""
        path = self.path / "metrics.jsonl"
        if self.is_main and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            # A line cut short by a kill lies after the last saved state and is dropped with them.
            whole = [line for line in lines if line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            write_text(path, "".join(line + "\n" for line in kept))

    @property
    def is_complete(self) -> bool:
        """Whether a run that is to be continued has nothing left to do."""
        return self.record.get("status") == "completed"

    def resume_state(self) -> Path | None:
        """The newest whole state; a kill between two renames leaves it under its old name."""
        states = [self.path / "resume", self.path / "resume.old"]
        return next((state for state in states if state.is_dir()), None)


def find_run_folder(args: argparse.Namespace, accelerator: Accelerator) -> RunFolder:
    """The run's folder, to be made or to be continued; nothing is written yet.

    Raises:
        SettingsError: the folder exists and neither ``--from_resume`` nor ``--overwrite`` is
            given, there is no state to resume from, or settings are not what they were.
    """
    run = RunFolder(args.save_dir / args.run_name, accelerator.is_main_process)
    if args.from_resume:
        if run.resume_state() is None or not (run.path / "run.json").is_file():
            raise SettingsError(f"--from_resume: {run.path} holds no resume/ state; start it anew")
        run.record = read_json(run.path / "run.json")
        check_same_run(run.record, args)
    elif run.path.exists() and not args.overwrite:
        raise SettingsError(
            f"{run.path} exists: continue it with --from_resume, replace it with --overwrite, or "
            "choose another name"
        )
    return run


def check_same_run(record: dict, args: argparse.Namespace) -> None:
    """Refuses to continue a run with settings that would make it another run."""
    free = {"from_resume", "overwrite", "save_dir", "device", "num_workers", "report_to"}
    free |= {"log_interval", "save_interval", "eval_interval", "show_sample"}
    before, now = record.get("settings", {}), printable_settings(args)
    for name in sorted(now.keys() - free):
        if before.get(name) != now[name]:
            raise SettingsError(
                f"--from_resume: --{name} was {before.get(name)} and is {now[name]} now; give the "
                "same, or start another run"
            )
