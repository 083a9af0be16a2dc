"""A run's folder: its record, its metrics, and what the record tells of the code."""

import argparse
import errno
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from accelerate import Accelerator

from dataset.command_line import REPO_DIR, SettingsError, check_writable
from dataset.jsonl import file_sha256
from model.files import UserError, read_json, write_text

# git's pathspecs of everything but results and saved outputs
OWN_CODE = (".", ":(exclude)evaluation/results", ":(exclude)evaluation/model_outputs")
# Settings that do not change what a run comes to.
WITHOUT_EFFECT = {
    "from_resume",
    "overwrite",
    "show_sample",
    "save_dir",
    "report_to",
    "num_workers",
    "log_interval",
    "save_interval",
    "eval_interval",
}
# Settings that are paths: how a record spells one depends on where the run was started from.
PATHS = {"data_path", "eval_data_path", "from_weight", "tokenizer_path"}
MANIFEST = "sha256.json"  # of a resume state: the hash of each of its files


def printable_path(path: Path) -> str:
    """A path as a record shows it: relative to the repository or where one stands, or its name."""
    absolute = Path(os.path.abspath(path))
    for root in (REPO_DIR, Path.cwd()):
        if absolute.is_relative_to(root):
            return str(absolute.relative_to(root))
    return absolute.name


def checkpoint_name(path: Path) -> str:
    """The folder's name, or a .pth file's without its ending."""
    path = path.resolve()
    return path.stem if path.suffix == ".pth" else path.name


def weights_sha256(path: Path) -> str:
    """SHA-256 of the file that holds a checkpoint's own weights."""
    if path.is_file():
        return file_sha256(path)
    names = ("adapter_model.safetensors", "model.safetensors")
    return file_sha256(next(path / name for name in names if (path / name).is_file()))


def base_reference(from_weight: str) -> str:
    """How an adapter names its base: a hub id, or a path that can be found again from here."""
    path = Path(from_weight)
    if not path.exists():
        return from_weight
    absolute = path.absolute()
    inside = absolute.is_relative_to(REPO_DIR)
    return str(absolute.relative_to(REPO_DIR) if inside else absolute)


def printable_settings(args: argparse.Namespace) -> dict:
    """Every setting as JSON values, with paths shortened by `printable_path`."""

    def printable(value: object) -> object:
        if isinstance(value, Path):
            return printable_path(value)
        return [printable(item) for item in value] if isinstance(value, list | tuple) else value

    settings = {name: printable(value) for name, value in sorted(vars(args).items())}
    if settings["from_weight"] != "none" and Path(settings["from_weight"]).exists():
        settings["from_weight"] = printable_path(Path(settings["from_weight"]))
    return settings


def git_state() -> dict:
    """The commit of this code and whether files differ from it; empty outside a checkout.

    Results and outputs apart: those that are filed beside the code do not make it another.
    """

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(REPO_DIR), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or (commit := git("rev-parse", "HEAD")) is None:
        return {}
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--", *OWN_CODE))}


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class RunFolder:
    """`run.json`, `metrics.jsonl` and `resume/` of one run; only the main process writes."""

    path: Path
    is_main: bool
    record: dict = field(default_factory=dict)
    lock_file: TextIO | None = None

    def lock(self) -> None:
        """Takes the run for this process, until it ends, however it ends.

        The lock lies beside the folder, so that it outlives `--overwrite`. It is a POSIX lock
        (`lockf`): unlike one of `flock` it is not inherited by the data loader's processes,
        which live some seconds longer than a killed run, and it works on NFS.

        Raises:
            SettingsError: another process has it.
        """
        if not self.is_main or self.lock_file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock_file = (self.path.parent / f".{self.path.name}.lock").open("a")
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise SettingsError(
                f"{self.path}: another process trains this run now; wait for it, or choose another "
                "name"
            ) from error

    def create(self, overwrite: bool) -> None:
        """Makes the folder, in place of the one that `--overwrite` gives up.

        Raises:
            SettingsError: since this run was started, another one made the folder.
        """
        self.lock()
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        try:
            self.path.mkdir()
        except FileExistsError as error:
            raise SettingsError(
                f"{self.path}: made by another process in the meantime; choose another name"
            ) from error

    def write(self, **changes: object) -> None:
        """Updates `run.json`."""
        self.record |= changes
        if self.is_main:
            write_text(self.path / "run.json", json.dumps(self.record, indent=2) + "\n")

    def log(self, row: dict) -> None:
        """Appends a line to `metrics.jsonl`."""
        if self.is_main:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`: a resumed run is about to log it again."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        # A line cut short by a kill lies after the last saved state and is dropped with those.
        rows = [json.loads(line) for line in lines if line.endswith(b"}\n")]
        kept = [row for row in rows if row["step"] <= step]
        for name, column in (("train_loss", "loss"), ("eval_loss", "eval_loss")):
            told = [row[column] for row in kept if column in row]
            self.record.pop(name, None)
            if told:
                self.record[name] = told[-1]
        if self.is_main:
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    @property
    def is_complete(self) -> bool:
        """Whether a run that is to be continued has nothing left to do."""
        return self.record.get("status") == "completed"

    # A state is written to resume.tmp/ and sealed there; then resume/ becomes resume.old/,
    # resume.tmp/ becomes resume/, and resume.old/ is deleted. At any moment one of resume/ and
    # resume.old/ is whole, on the disk as well as in memory.

    @property
    def state_aside(self) -> Path:
        """Where the next state is written before it takes its place."""
        return self.path / "resume.tmp"

    def resume_state(self) -> Path | None:
        """The newest whole state; a kill between two renames leaves it under its old name."""
        states = [self.path / "resume", self.path / "resume.old"]
        return next((state for state in states if state.is_dir()), None)

    def keep_state(self) -> None:
        """Seals the state written aside and moves it into place; the metrics so far are kept too.

        Everything is on the disk before the first name changes, so that neither a kill nor a
        loss of power leaves a state without its data, or without the rows that came before it.
        """
        aside, place, old = self.state_aside, self.path / "resume", self.path / "resume.old"
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        hashes = {str(path.relative_to(aside)): file_sha256(path) for path in files}
        write_text(aside / MANIFEST, json.dumps(hashes, indent=2) + "\n")
        metrics = [path for path in (self.path / "metrics.jsonl",) if path.is_file()]
        for path in (*files, aside, *metrics, self.path):
            sync(path)
        if place.is_dir():
            remove_folder(old)
            place.rename(old)
        aside.rename(place)
        sync(self.path)
        remove_folder(old)

    def remove_leftovers(self) -> None:
        """Deletes what a kill during a save left beside a whole state."""
        if self.is_main:
            remove_folder(self.state_aside)
            if (self.path / "resume").is_dir():
                remove_folder(self.path / "resume.old")


def remove_folder(folder: Path) -> None:
    """Deletes a folder if it is there."""
    if folder.is_dir():
        shutil.rmtree(folder)


def check_state(state: Path) -> None:
    """Refuses a resume state that is not, byte for byte, what was saved.

    accelerate loads what it finds: without its file of random states it goes on in silence.

    Raises:
        UserError: a file is missing or differs.
    """
    if not (state / MANIFEST).is_file():
        raise UserError(
            f"{state / MANIFEST}: missing, so the state cannot be checked; restore {state.name}/ "
            "from a copy, or start the run anew with --overwrite"
        )
    for name, saved in read_json(state / MANIFEST).items():
        path = state / name
        if not path.is_file() or file_sha256(path) != saved:
            raise UserError(
                f"{path}: damaged or missing; restore {state.name}/ from a copy, or start the run "
                "anew with --overwrite"
            )


def find_run_folder(args: argparse.Namespace, accelerator: Accelerator) -> RunFolder:
    """The run's folder, to be made or to be continued; nothing is written yet but a lock.

    Raises:
        SettingsError: the folder exists and neither `--from_resume` nor `--overwrite` is
            given, it cannot be written to, another process trains in it, there is no state to
            resume from, or settings are not what they were.
    """
    run = RunFolder(args.save_dir / args.run_name, accelerator.is_main_process)
    check_writable(run.path, "--save_dir")
    has_state = run.resume_state() is not None and (run.path / "run.json").is_file()
    if args.from_resume:
        check_resumable(run.path, has_state)
        run.lock()
        run.record = read_json(run.path / "run.json")
        check_same_run(run.record, args)
    elif run.path.exists() and not args.show_sample:  # which writes nothing
        if not args.overwrite:
            ways = "continue it with --from_resume, replace it" if has_state else "replace it"
            raise SettingsError(
                f"{run.path} exists: {ways} with --overwrite, or choose another name"
            )
        run.lock()
    return run


def check_resumable(folder: Path, has_state: bool) -> None:
    """Refuses to continue a run that is not there or was killed before its first saved state."""
    if not folder.exists():
        raise SettingsError(f"--from_resume: {folder} does not exist; leave out --from_resume")
    if not has_state:
        raise SettingsError(
            f"--from_resume: {folder} holds no resume/ state to continue from; start it anew with "
            "--overwrite in place of --from_resume"
        )


def check_same_run(record: dict, args: argparse.Namespace) -> None:
    """Refuses to continue a run with settings that would make it another run.

    Of paths their names count here; what they hold is compared when it has been read.
    """
    before, now = record.get("settings", {}), printable_settings(args)
    for name in sorted(now.keys() - WITHOUT_EFFECT):
        if name not in before:
            raise SettingsError(
                f"--from_resume: this run was begun by code that had no --{name}; continue it with "
                "that, or start it anew with --overwrite in place of --from_resume"
            )
        named = file_names if name in PATHS else lambda setting: setting
        if named(before[name]) != named(now[name]):
            raise SettingsError(
                f"--from_resume: --{name} was {before[name]} and is {now[name]} now; give the "
                "same, or start another run"
            )


def file_names(paths: str | list[str] | None) -> str | list[str] | None:
    """The last parts of paths."""
    if isinstance(paths, list):
        return [Path(path).name for path in paths]
    return None if paths is None else Path(paths).name


def differences(name: str, before: object, now: object) -> Iterator[str]:
    """A line for each value that differs between two JSON values, with the way to it."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(f"{name}.{key}", before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for position, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(f"{name}[{position}]", old, new)
    elif before != now:
        yield f"{name} was {before} and is {now} now"
