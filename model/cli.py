"""What every script's command line shares: flags, errors of one line, exit codes, safe text."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_CODES = {"completed": 0, "diverged": 3, "interrupted": 130}  # of a run, by its status
# Control, zero-width and direction characters: they could steer a terminal or hide text.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


class UserError(ValueError):
    """An error that the user can mend; the message is one line: what, where, remedy."""


class Finished(SystemExit):
    """Nothing is left to do: the script ends here, with exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class Parser(argparse.ArgumentParser):
    """A parser that refuses a wrong command line as every other error, by a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raise the message; argparse would print the usage and exit."""
        raise UserError(f"{message}; --help lists the flags")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of a file of flags as a shell would; `#` starts a comment."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:  # a quotation without its end
            raise UserError(f"{arg_line!r} in a file of flags: {error}; mend the line") from error


def make_parser(doc: str, **options: str) -> argparse.ArgumentParser:
    """Make a parser whose --help shows a script's docstring as it stands."""
    return Parser(
        description=doc,
        epilog="The word @FILE stands for flags in a file, on one line or on several.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        **options,
    )


def limit(kind: type, least: float, most: float = 1e12) -> Callable[[str], float]:
    """Make an argparse type: a number from `least` to `most`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            bounds = f"must lie between {least:g} and {most:g}"
            raise argparse.ArgumentTypeError(f"{text}: {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


COUNT = limit(int, 0)
SIZE = limit(int, 1)
NOT_NEGATIVE = limit(float, 0)
POSITIVE = limit(float, 1e-12)
SHARE = limit(float, 0, 1)


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
        sys.exit(EXIT_CODES["interrupted"])


def escape_control(text: str) -> str:
    """Escape control, zero-width and direction characters; keep tabs and newlines."""
    return UNSAFE.sub(lambda match: json.dumps(match.group())[1:-1], text)
