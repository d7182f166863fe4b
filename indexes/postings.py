"""BM25 score matrices in bm25s's layout, made shard by shard in bounded memory.

bm25s itself (0.3) scores a whole corpus in Python lists: about 4 KB a passage, 75 GB for all of Wikipedia. Here each
shard is counted on its own, and the matrix is then written one range of words after the other. The numbers are those
that `bm25s.BM25.index` computes, bit for bit (tested), and bm25s opens and searches the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

BYTES_PER_POSTING = 32
"""Peak memory while scoring one posting: the output, the terms, places and factors of one block at a time."""


@dataclass(frozen=True, slots=True)
class Postings:
    """Which of a shard's documents hold each word, and how often.

    For word i of `words` (sorted), `documents` and `counts` (int32) hold rows `starts[i]` to `starts[i + 1]`, in the
    order of the documents. `lengths` (int32) is the number of words of each document.
    """

    words: list[str]
    starts: NDArray[np.int64]
    documents: NDArray[np.int32]
    counts: NDArray[np.int32]
    lengths: NDArray[np.int32]

    @classmethod
    def count(cls, ids: Sequence[Sequence[int]], vocabulary: dict[str, int]) -> Postings:
        """Count the words of documents, given as the numbers that `vocabulary` has for them."""
        names = sorted(vocabulary)
        rank = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int64)
        rank[[vocabulary[name] for name in names]] = np.arange(len(names))
        lengths = np.array([len(own) for own in ids], np.int32)
        flat = rank[np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))]
        places = flat * len(ids) + np.repeat(np.arange(len(ids)), lengths)
        places, counts = np.unique(places, return_counts=True)
        words, documents = np.divmod(places, max(len(ids), 1))
        used, starts = np.unique(words, return_index=True)
        return cls(
            words=[names[word] for word in used],
            starts=np.append(starts, len(places)).astype(np.int64),
            documents=documents.astype(np.int32),
            counts=counts.astype(np.int32),
            lengths=lengths,
        )

    def save(self, folder: Path) -> None:
        """Write into an existing folder."""
        (folder / "words.json").write_bytes(orjson.dumps(self.words))
        for name in ("starts", "documents", "counts", "lengths"):
            np.save(folder / f"{name}.npy", getattr(self, name))


class StoredPostings:
    """What `Postings.save` wrote, each part read when it is asked for and not kept: a large corpus has many shards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def words(self) -> list[str]:
        """See `Postings`."""
        words: list[str] = orjson.loads((self._folder / "words.json").read_bytes())
        return words

    def __getattr__(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self._folder / f"{name}.npy", mmap_mode="r")
        return array


class ScoreMatrix:
    """All of a corpus's BM25 scores in Lucene's variant, word by word.

    The score of a word in a document is `idf * tf / (tf + k1 * (1 - b + b * length / mean length))` with
    `idf = ln(1 + (N - df + 0.5) / (df + 0.5))` (Kamphuis et al. 2020, table 1).

    Attributes:
        vocabulary: the number of each word, in alphabetical order.
        starts: (words + 1), where each word's scores begin.
    """

    def __init__(self, shards: Sequence[Postings | StoredPostings], k1: float, b: float) -> None:
        self._shards = shards
        every: set[str] = set()
        for shard in shards:
            every.update(shard.words)
        self.vocabulary = {word: i for i, word in enumerate(sorted(every))}
        self._words = [np.array([self.vocabulary[word] for word in shard.words], np.int32) for shard in shards]
        having = np.zeros(len(self.vocabulary), np.int64)
        for shard, words in zip(shards, self._words, strict=True):
            having[words] += np.diff(shard.starts)
        self.starts = np.append(0, np.cumsum(having))
        lengths = np.concatenate([shard.lengths for shard in shards])
        self.documents = len(lengths)
        # The types of the intermediate results are bm25s's, so that the scores are too.
        self._idf = np.log(1 + (self.documents - having + 0.5) / (having + 0.5)).astype(np.float32)
        self._norm = k1 * ((1 - b) + b * lengths / (lengths.mean() or 1.0))
        self._first = np.cumsum([0, *(len(shard.lengths) for shard in shards)])

    def whole(self) -> dict[str, Any]:
        """The matrix in memory, as `bm25s.BM25.scores` wants it."""
        data, rows = self._block(0, len(self.vocabulary))
        return {"data": data, "indices": rows, "indptr": self.starts, "num_docs": self.documents}

    def blocks(self, memory: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
        """Scores and document numbers, one range of words after the other, each within some bytes of memory."""
        return (self._block(low, high) for low, high in word_ranges(self.starts, memory // BYTES_PER_POSTING))

    def _block(self, low: int, high: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        scores = np.empty(self.starts[high] - self.starts[low], np.float32)
        documents = np.empty(len(scores), np.int32)
        free = self.starts[low:high] - self.starts[low]  # where the next posting of each word goes
        for shard, words, first in zip(self._shards, self._words, self._first[:-1], strict=True):
            left, right = np.searchsorted(words, (low, high))
            own, starts = words[left:right], np.array(shard.starts[left : right + 1])
            word = np.repeat(own, np.diff(starts))
            within = np.arange(starts[-1] - starts[0]) - np.repeat(starts[:-1] - starts[0], np.diff(starts))
            places = free[word - low] + within
            counts = shard.counts[starts[0] : starts[-1]]
            documents[places] = shard.documents[starts[0] : starts[-1]] + first
            scores[places] = self._idf[word] * (counts / (self._norm[documents[places]] + counts))
            free[own - low] += np.diff(starts)
        return scores, documents


def word_ranges(starts: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Cut the words into ranges of at most `most` postings, or of one word where that alone has more."""
    low, words = 0, len(starts) - 1
    while low < words:
        high = int(np.searchsorted(starts, starts[low] + most, "right")) - 1
        high = max(high, low + 1)
        yield low, high
        low = high


def save_matrix(
    folder: Path,
    vocabulary: dict[str, int],
    starts: NDArray[np.int64],
    blocks: Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]],
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Write the files that `bm25s.BM25.load` reads, but for its parameters; `blocks` are as in `ScoreMatrix`."""
    (folder / "vocab.index.json").write_bytes(orjson.dumps(vocabulary))
    np.save(folder / "indptr.csc.index.npy", starts)
    size, done = int(starts[-1]), 0
    with (folder / "data.csc.index.npy").open("wb") as data, (folder / "indices.csc.index.npy").open("wb") as rows:
        for file, kind in ((data, "<f4"), (rows, "<i4")):
            write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": (size,)})
        for scores, documents in blocks:
            scores.tofile(data)
            documents.tofile(rows)
            done += len(scores)
            progress(done / size)
