"""Rows of files, one after another in bounded memory, and where each stands."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from agentgym_ig.data.jsonl import BROKEN, Skip, json_lines, json_object, open_bytes
from agentgym_ig.errors import CorpusError

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]

PACKED = ("", ".gz", ".bz2")
ENDINGS = (".parquet", *(f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv", ".tsv") for packed in PACKED))
BATCH = 1024
"""Rows of a Parquet file held at a time."""
LARGEST_FIELD = min(sys.maxsize, 1 << 30)
LIST_KEY = "Data"
"""TriviaQA's files are one object that holds its questions under this name."""


def file_rows(path: Path, skip: Skip | None = None) -> Rows:
    """The rows of a JSON-lines, JSON, Parquet, CSV or TSV file, each with its place (`file:number`).

    A `.json` file may hold JSON lines, one list, or an object with a list under `Data`; all are streamed. CSV and TSV
    files begin with the names of their columns. `skip` rows are passed over at less cost than reading them.

    Raises FileNotFoundError, ValueError for a file of another ending, and CorpusError, naming file and row.
    """
    skip = skip or Skip()
    name = path.name.removesuffix(".gz").removesuffix(".bz2")
    if path.suffix == ".parquet":
        yield from parquet_rows(path, skip)
    elif name.endswith(".jsonl"):
        yield from _placed(path, skip)
    elif name.endswith(".json"):
        yield from _json_rows(path, skip)
    elif name.endswith((".csv", ".tsv")):
        yield from _table_rows(path, skip, "\t" if name.endswith(".tsv") else ",")
    else:
        raise ValueError(f"{path}: cannot tell what it holds; give a file that ends in one of {', '.join(ENDINGS)}")


def files_of(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files of a folder with one of the endings, by name. Raises FileNotFoundError where there is none."""
    files = sorted(file for file in folder.iterdir() if file.name.endswith(tuple(endings)))
    if not files:
        raise FileNotFoundError(f"folder {folder} holds no {', '.join(endings)} file and no saved dataset")
    return files


def _placed(path: Path, skip: Skip) -> Rows:
    with open_bytes(path) as lines:
        for number, row in json_lines(lines, str(path), skip):
            yield f"{path}:{number}", row


def parquet_rows(path: Path, skip: Skip | None = None, columns: Sequence[str] | None = None) -> Rows:
    """The rows of a Parquet file, with all its columns or those of `columns` that it has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .jsonl, .jsonl.gz or .parquet file")
    number, skip = 0, skip or Skip()
    try:
        with pq.ParquetFile(path) as table:
            wanted = [name for name in table.schema_arrow.names if columns is None or name in columns]
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if rows <= skip.left:
                    skip.left -= rows
                    number += rows
                    continue
                for batch in table.iter_batches(batch_size=BATCH, row_groups=[group], columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        if not skip.one():
                            yield f"{path}:{number}", row
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: row {number + 1} or one after it cannot be read: {error}") from error


def _table_rows(path: Path, skip: Skip, delimiter: str) -> Rows:
    csv.field_size_limit(LARGEST_FIELD)
    number = 1
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as lines:
            table = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(table, [])
            for row in table:
                number = table.line_num
                if not row or skip.one():
                    continue
                if len(row) != len(names):
                    raise ValueError(f"found {len(row)} columns, wanted the {len(names)} of the first line")
                yield f"{path}:{number}", dict(zip(names, row, strict=True))
    except FileNotFoundError:
        raise
    except (ValueError, csv.Error, *BROKEN) as error:
        raise CorpusError(f"{path}:{number} or the row after it: {error}") from error


def _json_rows(path: Path, skip: Skip) -> Rows:
    prefix = _list_in(path)
    if prefix is None:
        yield from _placed(path, skip)
        return
    import ijson

    number = 0
    try:
        with open_bytes(path) as content:
            for row in ijson.items(content, prefix, use_float=True):
                if not isinstance(row, dict):
                    raise ValueError(f"found a JSON {type(row).__name__}, wanted an object")
                number += 1
                if not skip.one():
                    yield f"{path}:{number}", row
    except (ValueError, ijson.JSONError, *BROKEN) as error:
        raise CorpusError(f"{path}: row {number + 1}: {' '.join(str(error).split())}") from error
    if not number:
        raise CorpusError(f"{path} holds no row; wanted JSON lines, a list, or an object with a list under {LIST_KEY}")


def _list_in(path: Path) -> str | None:
    """What ijson calls the entries of the one list in a JSON file; None for a file of JSON lines."""
    with open_bytes(path) as content:
        try:
            first = _first_line(content)
        except BROKEN as error:
            raise CorpusError(f"{path}: {error}") from error
    if not first:
        return None
    if first.startswith(b"["):
        return "item"
    try:
        row = json_object(first)
    except ValueError:
        return f"{LIST_KEY}.item"  # an object that goes on over the lines that follow
    return f"{LIST_KEY}.item" if isinstance(row.get(LIST_KEY), list) else None


def _first_line(content: BinaryIO) -> bytes:
    while line := content.readline(64 << 20):
        if stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
            return stripped
    return b""
