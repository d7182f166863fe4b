"""Reading corpora in the layouts in which people publish them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentgym_ig.data.hub import hub_count, hub_rows
from agentgym_ig.data.jsonl import read_jsonl, reason
from agentgym_ig.data.passages import passage_of
from agentgym_ig.data.reading import files_of, parquet_rows
from agentgym_ig.errors import CorpusError
from agentgym_ig.types import Passage

COUNTED_BYTES = 4 << 20
CORPUS_FILES = (".jsonl", ".jsonl.gz", ".parquet")
COLUMNS = ("id", "title", "text", "contents")


def read_corpus(source: Path | str) -> Iterator[Passage]:
    """Passages of a corpus, in its order.

    `source` is a `.jsonl`, `.jsonl.gz` or `.parquet` file, a folder of such files (read in the order of their
    names), a folder that `datasets.Dataset.save_to_disk` wrote, or `hf:NAME[:SPLIT]` for a dataset of the
    Hugging Face hub (streamed; split `train` where none is named).

    A row is `{"id", "title", "text"}`, or `{"id", "contents"}` as Search-R1 and FlashRAG have it, the title on
    line 1. Raises FileNotFoundError, and CorpusError, naming file and row, for a row without those fields or a
    passage without text.
    """
    for where, row in _rows(source):
        try:
            yield passage_of(row)
        except (KeyError, ValueError) as error:
            raise CorpusError(f"{where}: {reason(error)}") from error


def _rows(source: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, and where it stands."""
    if str(source).startswith("hf:"):
        repository, _, split = str(source)[3:].partition(":")
        yield from hub_rows(repository, None, split or "train")
        return
    path = Path(source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _dataset_rows(path)
    elif path.is_dir():
        for file in files_of(path, CORPUS_FILES):
            yield from _rows(file)
    elif path.suffix == ".parquet":
        yield from parquet_rows(path, columns=COLUMNS)
    else:
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def _dataset_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(folder))
    if isinstance(found, DatasetDict):
        raise CorpusError(f"{folder} holds the splits {sorted(map(str, found))}; give the folder of one of them")
    for number, row in enumerate(found, 1):
        yield f"{folder}:{number}", row


def count_rows(source: Path | str) -> int:
    """How many rows a corpus has: exactly where that stands somewhere, else about, from its first megabytes.

    0 for a dataset of the hub that does not say.
    """
    if str(source).startswith("hf:"):
        repository, _, split = str(source)[3:].partition(":")
        return hub_count(repository, split or "train")
    path = Path(source)
    if path.is_dir() and not (path / "dataset_info.json").is_file():
        return sum(count_rows(file) for file in path.iterdir() if file.name.endswith(CORPUS_FILES))
    if path.is_dir():
        from datasets import load_from_disk

        return len(load_from_disk(str(path)))
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows)
    return _count_lines(path)


def _count_lines(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a {', '.join(CORPUS_FILES)} file, or a folder of them")
    with path.open("rb") as file:
        read = file.read(COUNTED_BYTES)
    try:
        content = _unpacked(read) if path.suffix == ".gz" else read
    except zlib.error as error:
        raise CorpusError(f"{path}: {error}") from error
    lines = content.count(b"\n")
    if len(read) == path.stat().st_size:
        return lines + (bool(content) and not content.endswith(b"\n"))
    return round(lines * path.stat().st_size / len(read))


def _unpacked(packed: bytes) -> bytes:
    """What the first bytes of an archive, which may be cut short, hold; archives may be several, end to end."""
    content = b""
    while packed:
        member = zlib.decompressobj(wbits=31)
        content += member.decompress(packed)
        packed = member.unused_data
    return content
