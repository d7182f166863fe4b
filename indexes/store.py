"""Passages on disk, in shards: what every index that we build keeps beside its own files."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from agentgym_ig.data.jsonl import json_line
from agentgym_ig.errors import CorpusError
from agentgym_ig.records import write_whole
from agentgym_ig.types import Passage

CACHED_PASSAGES = 65_536
"""Passages that an open store keeps parsed, those asked for last: some 80 MB at 100 words each."""


class PassageStore:
    """Passages by row number, read from disk as they are asked for.

    `passages/00000.jsonl` and so on hold one passage a line, each `shard` of them but the last; `passages/offsets.npy`
    (rows + 1, int64) says where each line begins, counted through all files. All are memory-mapped: opening costs
    next to nothing and processes share the pages. The passages asked for last stay parsed.

    Args:
        folder: of the index, whose subfolder `passages` is read.
        shard: passages per file.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        self.shard, self._folder = shard, folder / "passages"
        self._offsets = np.load(self._folder / "offsets.npy", mmap_mode="r")
        shards = -(-len(self) // shard)
        self._lines = [_map(self._folder / f"{number:05d}.jsonl") for number in range(shards)]
        self.read = lru_cache(CACHED_PASSAGES)(self._parse)
        """The passage of a row, unchecked: for rows that come from an index."""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < len(self):
            raise KeyError(f"row {row} is not among {len(self)} passages")
        return self.read(row)

    def __iter__(self) -> Iterator[Passage]:
        """All passages in order, without filling the cache."""
        return (self._parse(row) for row in range(len(self)))

    def _parse(self, row: int) -> Passage:
        number = row // self.shard
        before, start, end = self._offsets[[number * self.shard, row, row + 1]].tolist()
        return _passage(self._lines[number][start - before : end - before])

    def shards(self) -> Iterator[list[Passage]]:
        """The passages of each shard, from plain reads: what is mapped would count as memory in use."""
        for number in range(len(self._lines)):
            with (self._folder / f"{number:05d}.jsonl").open("rb") as lines:
                yield [_passage(row) for row in lines]


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as lines:
        return mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ)


def _passage(line: bytes) -> Passage:
    found = orjson.loads(line)
    return Passage(found["id"], found["title"], found["text"])


def _cut(passages: Iterator[Passage], shard: int) -> Iterator[list[Passage]]:
    while together := list(islice(passages, shard)):
        yield together


def store_passages(
    folder: Path, passages: Iterable[Passage], shard: int, progress: Callable[[int], None]
) -> tuple[PassageStore, str]:
    """Store a corpus, or go on storing it where an earlier run was stopped.

    Shards that are there already are not written again but compared with what is read: a resumed build never mixes
    two corpora.

    Returns:
        the store, and the SHA-256 of the whole corpus: of all lines as they are stored.

    Raises CorpusError when a shard on disk holds other passages, when two passages have the same id, and when there
    is no passage at all.
    """
    lines_folder = folder / "passages"
    lines_folder.mkdir(parents=True, exist_ok=True)
    whole, offsets, ids = sha256(), [np.zeros(1, np.int64)], [np.zeros(0, np.uint64)]
    rows = 0
    for number, together in enumerate(_cut(iter(passages), shard)):
        content, sizes = _joined(together)
        path = lines_folder / f"{number:05d}.jsonl"
        if not path.exists():
            write_whole(path, content)
        elif path.read_bytes() != content:
            raise CorpusError(
                f"{path} was built from other passages than those now given (from passage {rows + 1} on); "
                f"give the corpus that the build began with, or delete {folder.parent} to begin anew"
            )
        whole.update(content)
        offsets.append(offsets[-1][-1] + np.cumsum(sizes))
        ids.append(np.array([_number(passage.id) for passage in together], np.uint64))
        rows += len(together)
        del together, content  # or they would stay while the next shard is read
        progress(rows)
    if not rows:
        raise CorpusError("the corpus holds no passage; an index needs at least one")
    if (lines_folder / f"{number + 1:05d}.jsonl").exists():
        raise CorpusError(
            f"the corpus now ends after {rows} passages, but the build had more; delete {folder.parent} to begin anew"
        )
    np.save(lines_folder / "offsets.npy", np.concatenate(offsets))
    store = PassageStore(folder, shard)
    _check_unique(store, np.concatenate(ids))
    return store, whole.hexdigest()


def _joined(passages: Sequence[Passage]) -> tuple[bytes, NDArray[np.int64]]:
    """The lines of a shard, and how long each is."""
    lines = [line(passage) for passage in passages]
    return b"".join(lines), np.array(list(map(len, lines)), np.int64)


def line(passage: Passage) -> bytes:
    """A passage as a line of JSON; a lone surrogate, which no UTF-8 can hold, becomes a question mark."""
    return json_line({"id": passage.id, "title": passage.title, "text": passage.text})


def _number(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _check_unique(store: PassageStore, numbers: NDArray[np.uint64]) -> None:
    """Eight bytes an id, so that 21 million need 170 MB; ids themselves are compared only where those agree."""
    order = np.argsort(numbers, kind="stable")
    same = np.flatnonzero(numbers[order[1:]] == numbers[order[:-1]])
    for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
        if store[first].id == store[second].id:
            raise CorpusError(
                f"passages {first + 1} and {second + 1} have the same id {store[first].id!r}; ids must be unique"
            )


def write_corpus(path: Path, passages: Iterable[Passage]) -> None:
    """One passage a line, in the layout that `read_corpus` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as lines:
        lines.writelines(line(passage) for passage in passages)
