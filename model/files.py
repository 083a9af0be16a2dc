"""The lowest layer: errors for the user, files written whole or not at all, hashes."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

REPO_DIR = Path(__file__).resolve().parents[1]
# Control, zero-width and direction characters: what could steer a terminal or hide text.
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


class UserError(ValueError):
    """What the user can put right; the message is one line: what, where, remedy."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and exit; a user's error is one line and exit code 2."""
    try:
        code = main()
    except (UserError, OSError) as error:
        print(f"error: {escape_control(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def escape_control(text: str) -> str:
    """Write control, zero-width and direction characters as \\uXXXX, on one line."""
    return UNSAFE.sub(lambda match: json.dumps(match.group())[1:-1], text)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        replace_file(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_file(aside: Path, path: Path) -> None:
    """Put a written file in the place of another, once its content is on the disk."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path: Path) -> dict:
    """Read a JSON object; a UserError names a file that holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken JSON ({error}); mend or copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def file_sha256(path: Path) -> str:
    """Hash a file's bytes (hex SHA-256)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
