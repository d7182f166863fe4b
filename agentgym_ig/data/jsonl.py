"""JSON lines: reading them from plain or compressed files with the line that is wrong, and writing them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from agentgym_ig.errors import CorpusError
from agentgym_ig.text import clean

BUFFER = 1 << 20
BROKEN = (gzip.BadGzipFile, zlib.error, EOFError, OSError)
"""What reading a damaged archive may raise; bz2 knows nothing but OSError."""


class Skip:
    """How many rows are still to be passed over, in one file after another."""

    def __init__(self, left: int = 0) -> None:
        self.left = left

    def one(self) -> bool:
        """Whether the row in hand is one of them."""
        if self.left:
            self.left -= 1
            return True
        return False


def open_bytes(path: Path) -> BinaryIO:
    """A file's content, unpacked where its name ends in .gz or .bz2. Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of a file that exists")
    # BufferedReader around an archive: one read line by line on its own is three times slower.
    if path.suffix == ".gz":
        return cast("BinaryIO", io.BufferedReader(gzip.open(path, "rb"), BUFFER))
    if path.suffix == ".bz2":
        return cast("BinaryIO", io.BufferedReader(bz2.open(path, "rb"), BUFFER))
    return path.open("rb")


def read_jsonl(path: Path, skip: Skip | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every non-blank line of a `.jsonl`, `.jsonl.gz` or `.jsonl.bz2` file.

    `skip` are lines to pass over without parsing them; it is counted down.

    Raises FileNotFoundError, and CorpusError (file and line) for a line that is no JSON object, bytes that are
    no UTF-8, or a broken archive.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .jsonl or .jsonl.gz file")
    with open_bytes(path) as lines:
        yield from json_lines(lines, str(path), skip)


def json_lines(lines: BinaryIO, name: str, skip: Skip | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same for a stream that is open; `name` is what an error calls it."""
    number, passed = 0, skip or Skip()
    try:
        for number, line in enumerate(lines, 1):
            if line.strip() and not passed.one():
                yield number, json_object(line)
    except (ValueError, *BROKEN) as error:
        where = f"{name}:{number if isinstance(error, ValueError) else number + 1}"
        raise CorpusError(f"{where}: {error}") from error


def json_object(line: bytes) -> dict[str, Any]:
    """The object of a line. Raises ValueError for a line that holds something else."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        row = json.loads(line)  # takes what orjson does not (NaN, lone surrogates), and has the better message
    if not isinstance(row, dict):
        raise ValueError(f"found a JSON {type(row).__name__}, wanted an object")
    return row


def json_line(row: dict[str, Any]) -> bytes:
    """A line of JSON; a lone surrogate, which no UTF-8 can hold, becomes a question mark."""
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        return orjson.dumps(_cleaned(row), option=orjson.OPT_APPEND_NEWLINE)


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(name): _cleaned(own) for name, own in value.items()}
    return [_cleaned(own) for own in value] if isinstance(value, list | tuple) else value


def reason(error: Exception) -> str:
    """What is wrong with a row, in words: a KeyError names the field that is missing."""
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)
