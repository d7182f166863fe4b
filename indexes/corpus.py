"""Passages on disk: reading corpora, and a memory-mapped store that an index keeps beside its own files."""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from agentgym_ig.errors import CorpusError
from agentgym_ig.types import Passage, Question

CACHED_PASSAGES = 65_536
"""Passages that an open store keeps parsed, those asked for last: some 80 MB at 100 words each."""


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every non-blank line of a `.jsonl` or `.jsonl.gz` file.

    Raises FileNotFoundError, and CorpusError (file and line) for a line that is no JSON object, bytes that are
    no UTF-8, or a broken archive.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .jsonl or .jsonl.gz file")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _json_object(line)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        where = f"{path}:{number if isinstance(error, ValueError) else number + 1}"
        raise CorpusError(f"{where}: {error}") from error


def _json_object(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"found a JSON {type(row).__name__}, wanted an object")
    return row


def read_corpus(path: Path) -> Iterator[Passage]:
    """Passages of a corpus: `{"id", "title", "text"}`, or Search-R1's `{"id", "contents"}` with the title on line 1.

    Raises CorpusError, naming file and line, for a row without those fields, a passage without text, or an id
    seen before.
    """
    seen: set[str] = set()
    for number, row in read_jsonl(path):
        try:
            passage = _passage(row)
            if passage.id in seen:
                raise ValueError(f"id {passage.id!r} stands in an earlier line too; ids must be unique")
        except (KeyError, ValueError) as error:
            raise CorpusError(f"{path}:{number}: {_reason(error)}") from error
        seen.add(passage.id)
        yield passage


def join_contents(title: str, text: str) -> str:
    """Title and text in Search-R1's `contents`: the title in double quotes, a line break, the text."""
    return f'"{title}"\n{text}'


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of Search-R1's `contents`; the quotes may be missing."""
    title, _, text = contents.partition("\n")
    return title.strip().strip('"'), text


def _passage(row: dict[str, Any]) -> Passage:
    if "contents" in row:
        title, text = split_contents(str(row["contents"]))
    else:
        title, text = str(row["title"]), str(row["text"])
    if not text.strip():
        raise ValueError(f"passage {row['id']!r} has no text")
    return Passage(str(row["id"]), title, text)


def write_corpus(path: Path, passages: Iterable[Passage]) -> None:
    """One passage a line, in the layout that `read_corpus` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as lines:
        lines.writelines(_line(passage) for passage in passages)


def _line(passage: Passage) -> bytes:
    row = {"id": passage.id, "title": passage.title, "text": passage.text}
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


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
                    answers=tuple(str(answer) for answer in answers),
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


class PassageStore:
    """Passages by row number, read from disk as they are asked for.

    `passages.jsonl` holds one passage a line, `offsets.npy` (rows + 1, int64) where each line begins. Both are
    memory-mapped: opening costs nothing and processes share the pages. The passages asked for last stay parsed.
    """

    LINES, OFFSETS = "passages.jsonl", "offsets.npy"

    def __init__(self, folder: Path) -> None:
        self._offsets = np.load(folder / self.OFFSETS, mmap_mode="r")
        with (folder / self.LINES).open("rb") as lines:
            self._lines = mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ)
        self._read = lru_cache(CACHED_PASSAGES)(self._parse)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < len(self):
            raise KeyError(f"row {row} is not among {len(self)} passages")
        return self._read(row)

    def _parse(self, row: int) -> Passage:
        start, end = self._offsets[row : row + 2].tolist()
        found = json.loads(self._lines[start:end].decode())
        return Passage(found["id"], found["title"], found["text"])

    @classmethod
    def write(cls, folder: Path, passages: Iterable[Passage]) -> Iterator[Passage]:
        """Store passages as they stream by, and hand each on."""
        offsets = [0]
        with (folder / cls.LINES).open("wb") as lines:
            for passage in passages:
                lines.write(_line(passage))
                offsets.append(lines.tell())
                yield passage
        np.save(folder / cls.OFFSETS, np.asarray(offsets, np.int64))


def sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
