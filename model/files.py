"""Write files whole or not at all; raise errors with a message for users."""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

REPO_DIR = Path(__file__).resolve().parents[1]
# Control, zero-width and direction characters: they could steer a terminal or hide text.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


class UserError(ValueError):
    """An error that the user can mend; the message is one line: what, where, remedy."""


def make_parser(doc: str, **options: str) -> argparse.ArgumentParser:
    """Make a parser whose --help shows a script's docstring as it stands."""
    options |= {"description": doc, "formatter_class": argparse.RawDescriptionHelpFormatter}
    return argparse.ArgumentParser(allow_abbrev=False, **options)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit: 2 and one line after a user's error, 130 after Ctrl-C."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        line = escape_control(str(error)).replace("\n", "\\n").replace("\t", "\\t")
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def escape_control(text: str) -> str:
    """Escape control, zero-width and direction characters; keep tabs and newlines."""
    return UNSAFE.sub(lambda match: json.dumps(match.group())[1:-1], text)


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
