"""Files of a run folder: read with one-line errors, and written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dataset.command_line import REPO_DIR, UserError, run_script  # noqa: F401
from dataset.untrusted import shown as escape_control  # noqa: F401


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file aside and moves it into place.

    Raises:
        OSError: the disk is full, for instance; what was at `path` is still there.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, aside, metadata=metadata)
    except SafetensorError as error:  # in place of the OSError that caused it
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error})") from error
    move_into_place(aside, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file aside and moves it into place."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
    except OSError:  # half of it may have been written
        aside.unlink(missing_ok=True)
        raise
    move_into_place(aside, path)


def move_into_place(aside: Path, path: Path) -> None:
    """Renames a written file, once its content is on the disk: else a crash may leave it empty."""
    sync(aside)
    os.replace(aside, path)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointError: it is broken, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; nested without end
        raise CheckpointError(f"{path}: broken JSON ({error}); mend or copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
