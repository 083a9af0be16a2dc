"""What every script shares: how it ends, one-line errors, and no flag that is not read."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dataset.untrusted import error_line
from model.files import INTERRUPTED, REPO_DIR, UserError

__all__ = ["INTERRUPTED", "REPO_DIR", "UserError"]

OUT_OF_MEMORY = "out of memory: take a smaller model, or a smaller batch where there is one"


class SettingsError(UserError):
    """A flag whose value cannot work; the message names the flag and what to do."""


def run_script(main: Callable[[], int]) -> NoReturn:
    """Runs a script's `main` and exits: a user's error is one line and exit code 2."""
    try:
        code = main()
    except (UserError, OSError) as error:
        print(error_line(error), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except MemoryError:
        print(error_line(OUT_OF_MEMORY), file=sys.stderr)
        code = 2
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are; it takes no abbreviations.

    Raises:
        SettingsError: for what argparse itself refuses.
    """

    def __init__(self, doc: str):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; --help explains the flags")


def refuse_ignored(
    args: argparse.Namespace, parser: Parser, flags: tuple[str, ...], reason: str
) -> None:
    """Refuses flags that were given another value than their default, but would not be read."""
    for flag in flags:
        if vars(args)[flag] != parser.get_default(flag):
            raise SettingsError(f"--{flag} {vars(args)[flag]}: {reason}; drop one of both")


def check_writable(folder: Path, flag: str) -> None:
    """Refuses a folder that cannot be made or written to, before anything long is begun."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise SettingsError(f"{flag}: {there} is no folder; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SettingsError(f"{flag}: {there} cannot be written to; choose another one")
