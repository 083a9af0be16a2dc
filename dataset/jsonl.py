"""JSON lines, plain or gzip, read strictly: an error names the file and the line."""

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from dataset.command_line import UserError
from dataset.untrusted import parse_json

MAX_LINE_BYTES = 2**26  # 64 MiB: a longer line is no record, and must not fill the memory
# How a file starts that is no plain UTF-8 text, and what to do about it.
FOREIGN_STARTS = {
    b"\x1f\x8b": "is gzip; give it a name that ends in .gz",
    b"PAR1": "is a parquet file; write it as JSONL first",
    b"PK\x03\x04": "is a zip file; unpack it",
    codecs.BOM_UTF16_LE: "is UTF-16; convert it to UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16; convert it to UTF-8",
}


class DataError(UserError):
    """Input data that cannot be used; the message names the file and the line."""


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields `("file:line", record)` for each non-empty line of a plain or gzip JSONL file.

    Lines end in LF or CRLF; a UTF-8 byte order mark at the start is skipped.

    Raises:
        DataError: the file is missing, empty, cut off, not UTF-8, or a line is no JSON object.
    """
    check_file(path)
    records = 0
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            # Line by line with a bound: a crafted gzip file could unpack into one endless line.
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                where = f"{path}:{number}"
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    raise DataError(
                        f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; is it one record a line?"
                    )
                if number == 1:
                    line = first_line(line, path)
                if line.strip():
                    yield where, parse_record(line, where)
                    records += 1
    except gzip.BadGzipFile as error:
        raise DataError(
            f"{path}:{number + 1}: not gzip or damaged ({error}); rename a plain file to .jsonl, "
            "get a damaged one again"
        ) from error
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"{path}:{number + 1}: the gzip stream is broken or cut off ({error}); "
            "download or compress it again"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not records:
        raise DataError(f"{path}: holds no record; expected one JSON object a line")


def check_file(path: Path) -> None:
    """Refuses a path that is no file."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the JSONL files in it")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the flag that names it")
    if not path.is_file():
        raise DataError(f"{path}: no regular file; copy the data into one, since it is read twice")


def unreadable(path: Path, error: OSError) -> DataError:
    """What to say of a file that the system does not give."""
    return DataError(f"{path}: cannot be read ({error.strerror}); check the file")


def first_line(line: bytes, path: Path) -> bytes:
    """A file's first line without a byte order mark; refused if it starts like another format."""
    for start, reason in FOREIGN_STARTS.items():
        if line.startswith(start):
            raise DataError(f"{path}:1: {reason}")
    return line.removeprefix(codecs.BOM_UTF8)


def parse_record(line: bytes, where: str) -> dict:
    """One JSONL line as a dict; `where` ("file:line") opens every error message."""
    if b"\0" in line:
        raise DataError(
            f"{where}: holds NUL bytes; convert UTF-16 to UTF-8, get a damaged file anew"
        )
    try:
        record = parse_json(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1}); convert the file"
        ) from error
    except ValueError as error:
        raise DataError(f"{where}: broken JSON ({error}); mend or remove the line") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: expected a JSON object, found {type(record).__name__}; write one a line"
        )
    if b"\\ud" in line.lower():  # half of a surrogate pair is JSON, but no text
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: holds half a surrogate pair; mend the line") from error
    return record


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
