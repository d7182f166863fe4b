"""Reading corpora and question sets in the layouts in which people publish them."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from agentgym_ig.errors import CorpusError
from agentgym_ig.types import Passage, Question

COUNTED_BYTES = 4 << 20
CORPUS_FILES = (".jsonl", ".jsonl.gz", ".parquet")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every non-blank line of a `.jsonl` or `.jsonl.gz` file.

    Raises FileNotFoundError, and CorpusError (file and line) for a line that is no JSON object, bytes that are
    no UTF-8, or a broken archive.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .jsonl or .jsonl.gz file")
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _json_object(line)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        where = f"{path}:{number if isinstance(error, ValueError) else number + 1}"
        raise CorpusError(f"{where}: {error}") from error


def _open(path: Path) -> io.BufferedIOBase:
    # BufferedReader around the archive: a gzip file read line by line on its own is three times slower.
    return io.BufferedReader(gzip.open(path, "rb"), 1 << 20) if path.suffix == ".gz" else path.open("rb")


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        row = json.loads(line)  # takes what orjson does not (NaN, lone surrogates), and has the better message
    if not isinstance(row, dict):
        raise ValueError(f"found a JSON {type(row).__name__}, wanted an object")
    return row


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
            yield _passage(row)
        except (KeyError, ValueError) as error:
            raise CorpusError(f"{where}: {_reason(error)}") from error


def _rows(source: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, and where it stands."""
    if str(source).startswith("hf:"):
        yield from _hub_rows(str(source)[3:])
        return
    path = Path(source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _dataset_rows(path)
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(CORPUS_FILES))
        if not files:
            raise FileNotFoundError(f"folder {path} holds no {', '.join(CORPUS_FILES)} file and no saved dataset")
        for file in files:
            yield from _rows(file)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a {', '.join(CORPUS_FILES)} file")
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            columns = [name for name in table.schema_arrow.names if name in ("id", "title", "text", "contents")]
            for batch in table.iter_batches(batch_size=4096, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: row {number + 1} or one after it cannot be read: {error}") from error


def _dataset_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(folder))
    if isinstance(found, DatasetDict):
        raise CorpusError(f"{folder} holds the splits {sorted(map(str, found))}; give the folder of one of them")
    for number, row in enumerate(found, 1):
        yield f"{folder}:{number}", row


def _hub_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    repository, _, split = name.partition(":")
    for number, row in enumerate(load_dataset(repository, split=split or "train", streaming=True), 1):
        yield f"{name}:{number}", row


def count_rows(source: Path | str) -> int:
    """How many rows a corpus has: exactly where that stands somewhere, else about, from its first megabytes."""
    if str(source).startswith("hf:"):
        from datasets import load_dataset_builder

        repository, _, split = str(source)[3:].partition(":")
        return int(load_dataset_builder(repository).info.splits[split or "train"].num_examples)
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


def join_contents(title: str, text: str) -> str:
    """Title and text in Search-R1's `contents`: the title in double quotes, a line break, the text."""
    return f'"{title}"\n{text}'


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of Search-R1's `contents`; the quotes may be missing."""
    title, _, text = contents.partition("\n")
    return title.strip().strip('"'), text


def _passage(row: dict[str, Any]) -> Passage:
    if row.get("text") is None and row.get("contents") is not None:
        title, text = split_contents(str(row["contents"]))
    else:
        title, text = row["title"], row["text"]
    for field, value in (("id", row["id"]), ("text", text)):
        if value is None or not str(value).strip():
            raise ValueError(f"passage {row['id']!r} has no {field}")
    return Passage(str(row["id"]), str(title or ""), str(text))


def read_questions(path: Path) -> list[Question]:
    """Questions of a file: `{"id", "question", "answers"}`, and optional `supporting` passage ids and `dataset`.

    The dataset is the file's name up to the first dot where a row does not say.

    Raises CorpusError, naming file and line, for a row that is no usable question, and for a file with none.
    """
    questions: list[Question] = []
    for number, row in read_jsonl(path):
        try:
            answers = row["answers"]
            if not isinstance(answers, list):
                raise ValueError(f"answers is a {type(answers).__name__}, wanted a list of strings")
            questions.append(
                Question(
                    id=str(row["id"]),
                    text=str(row["question"]),
                    answers=tuple(text for answer in answers if (text := str(answer)).strip()),
                    dataset=str(row.get("dataset", path.name.partition(".")[0])),
                    supporting=tuple(str(passage) for passage in row.get("supporting", ())),
                )
            )
        except (KeyError, ValueError) as error:
            raise CorpusError(f"{path}:{number}: {_reason(error)}") from error
    if not questions:
        raise CorpusError(f"{path} holds no question")
    return questions


def _reason(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)
