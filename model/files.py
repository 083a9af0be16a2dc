"""Files: written whole or not at all, read, and known by their hash."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from model.cli import UserError

REPO_DIR = Path(__file__).resolve().parents[1]


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file aside, and move it into place: a full disk leaves the old."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())  # so that a crash leaves the old or the new
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is torch's
        raise UserError(f"{path}: not written ({error}); free space, or mend the path") from error
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    write_aside(path, lambda aside: aside.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """Read the JSON object in a file; a missing, broken or other file is refused."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; mend the path or make the file again") from error
    except ValueError as error:  # of JSON or UTF-8
        raise UserError(f"{path}: broken JSON ({error}); mend or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
