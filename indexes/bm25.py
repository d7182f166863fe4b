"""BM25 with the bm25s library (Lù 2024, arXiv 2407.03618) in Lucene's variant: build, open, search."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import orjson
import Stemmer
from numpy.typing import NDArray

from agentgym_ig.errors import BuildFailed
from agentgym_ig.indexes.base import check_k, make_hit, ranked
from agentgym_ig.indexes.build import BuildOptions, Work, build_index
from agentgym_ig.indexes.manifest import read_manifest
from agentgym_ig.indexes.postings import BYTES_PER_POSTING, Postings, ScoreMatrix, StoredPostings, save_matrix
from agentgym_ig.indexes.store import PassageStore
from agentgym_ig.records import write_json
from agentgym_ig.types import Hit, Passage, texts

WORD = re.compile(r"(?u)\b\w\w+\b")
"""What a word is: bm25s's default."""
KNOWN_WORDS = 200_000
"""Words of queries whose numbers are kept: some 20 MB."""
LEAST_PART = 8
"""Queries below which a batch is not cut up for several threads."""
SPARE = 10
"""Passages found beyond k, in case there are ties."""
WIDER = 8
"""How many times more are looked at where there are still more ties."""
COMPILE_FROM = 20_000
"""Passages from which on numba's compile time (about 4 s once a process) is won back by its speed."""
LIBRARY_MEMORY = 400 << 20
"""Bytes that Python, NumPy, bm25s and one shard take, about."""
WORD_BYTES, DOCUMENT_BYTES = 200, 64
"""What building keeps in memory for each word (its entry in a dict) and passage (its length, norm and id's hash)."""
BLOCK_MEMORY, LEAST_BLOCK = 512 << 20, 32 << 20
"""Bytes for the block of scores in hand: more than the first make nothing faster."""


@dataclass(frozen=True, kw_only=True)
class Bm25Settings:
    """What the index depends on beside its passages; the `Kind` that builds it."""

    k1: float = 0.9
    """Term-frequency saturation (Anserini's default)."""
    b: float = 0.4
    """Length normalisation (Anserini's default)."""
    stopwords: tuple[str, ...] | str = "en"
    """`en` for bm25s's English list, or the words themselves."""
    stemmer: str | None = "english"
    """A Snowball stemmer's name, or None."""
    title_weight: int = 1
    """How often the title counts beside the text."""

    name = "bm25s"

    def __post_init__(self) -> None:
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise ValueError(f"k1={self.k1}, b={self.b}: k1 must be at least 0 and b between 0 and 1")
        if self.title_weight < 1:
            raise ValueError(f"title_weight={self.title_weight} must be 1 or more")

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Bm25Settings:
        """The settings that an index was built with."""
        given = {name: manifest["settings"][name] for name in (field.name for field in fields(cls))}
        if not isinstance(given["stopwords"], str):
            given["stopwords"] = tuple(given["stopwords"])
        return cls(**given)

    def tokenize(self, lines: Sequence[str]) -> list[list[str]]:
        """Words of each line: lower case, two characters or more, stop words left out, stemmed."""
        tokens: list[list[str]] = self._tokenize(lines, return_ids=False)
        return tokens

    def _tokenize(self, lines: Sequence[str], *, return_ids: bool) -> Any:
        stemmer = Stemmer.Stemmer(self.stemmer) if self.stemmer else None
        stopwords = self.stopwords if isinstance(self.stopwords, str) else list(self.stopwords)
        return bm25s.tokenize(
            list(lines),
            token_pattern=WORD.pattern,
            stopwords=stopwords,
            stemmer=stemmer,
            return_ids=return_ids,
            show_progress=False,
        )

    def count(self, passages: Sequence[Passage]) -> Postings:
        """The words of some passages."""
        titles = [f"{passage.title}\n" * (self.title_weight - 1) for passage in passages]
        lines = [title + text for title, text in zip(titles, texts(passages), strict=True)]
        found = self._tokenize(lines, return_ids=True)
        return Postings.count(found.ids, found.vocab)

    def describe(self) -> dict[str, Any]:
        """See `Kind.describe`."""
        return asdict(self)

    def versions(self) -> dict[str, str]:
        """See `Kind.versions`."""
        return {name: version(name) for name in ("bm25s", "PyStemmer")}

    def memory_needed(self, count: int, sample: Path) -> int:
        """See `Kind.memory_needed`. The vocabulary is taken to grow with the root of the corpus (Heaps' law)."""
        sampled: int = read_manifest(sample, self.name)["passages"]
        words = len(orjson.loads((sample / "bm25s" / "vocab.index.json").read_bytes()))
        words = round(words * float(max(count / sampled, 1.0) ** 0.6))
        postings = (sample / "bm25s" / "data.csc.index.npy").stat().st_size // 4 * count // sampled
        block: int = min(BYTES_PER_POSTING * postings, BLOCK_MEMORY)
        return LIBRARY_MEMORY + WORD_BYTES * words + DOCUMENT_BYTES * count + block

    def check(self, count: int, memory: int) -> None:
        """See `Kind.check`; the vocabulary is not known yet."""
        self._check_room(count, 0, memory)

    def _check_room(self, count: int, words: int, memory: int) -> int:
        """Bytes left for blocks of scores."""
        fixed = LIBRARY_MEMORY + WORD_BYTES * words + DOCUMENT_BYTES * count
        if memory < fixed + LEAST_BLOCK:
            raise BuildFailed(
                f"{memory >> 20} MB are not enough for {count:,} passages with {words:,} words; allow "
                f"{(fixed + LEAST_BLOCK >> 20) + 1} MB or more and run the same command again"
            )
        return min(memory - fixed, BLOCK_MEMORY)

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        """See `Kind.digest`."""
        self.count(passages).save(folder)

    def assemble(self, work: Work, folder: Path) -> None:
        """See `Kind.assemble`. Raises BuildFailed when the memory is too little even for the vocabulary."""
        matrix = ScoreMatrix([StoredPostings(shard) for shard in work.shards], self.k1, self.b)
        count = len(work.passages)
        memory = self._check_room(count, len(matrix.vocabulary), work.memory)
        matrix_folder = folder / "bm25s"
        matrix_folder.mkdir(exist_ok=True)
        save_matrix(
            matrix_folder,
            matrix.vocabulary,
            matrix.starts,
            matrix.blocks(memory),
            lambda share: work.progress("writing", round(share * count), count),
        )
        self.save_parameters(matrix_folder, count)

    def save_parameters(self, folder: Path, passages: int) -> None:
        """Write the last file that `bm25s.BM25.load` reads."""
        scores = self.scorer("numpy")
        names = ("k1", "b", "delta", "method", "idf_method", "dtype", "int_dtype")
        parameters = {name: getattr(scores, name) for name in names}
        write_json(folder / "params.index.json", parameters | {"num_docs": passages, "version": bm25s.__version__})

    def scorer(self, backend: str) -> bm25s.BM25:
        """An empty bm25s retriever with these settings."""
        return bm25s.BM25(k1=self.k1, b=self.b, method="lucene", backend=backend)


class Bm25Index:
    """An `Index` over BM25 scores. Make one with `from_passages`, or with `build` and `open` for one on disk.

    Attributes:
        threads: how many of a batch's queries are searched at once; pays on indexes large enough to be compiled.
    """

    def __init__(self, scores: bm25s.BM25, passages: PassageStore | list[Passage], settings: Bm25Settings) -> None:
        self._scores, self._passages, self.settings = scores, passages, settings
        self._passage = passages.read if isinstance(passages, PassageStore) else passages.__getitem__
        self.corpus_sha256: str | None = None
        self.threads = 1
        self._known: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._passages)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The number of each word."""
        words: dict[str, int] = self._scores.vocab_dict
        return words

    def passages(self) -> Iterator[Passage]:
        """All passages, in the order in which they were indexed."""
        return iter(self._passages)

    @classmethod
    def from_passages(cls, passages: Iterable[Passage], settings: Bm25Settings | None = None) -> Bm25Index:
        """An index in memory only."""
        kept, settings = list(passages), settings or Bm25Settings()
        if not kept:
            raise ValueError("the corpus holds no passage; an index needs at least one")
        matrix = ScoreMatrix([settings.count(kept)], settings.k1, settings.b)
        scores = settings.scorer(_backend(len(kept)))
        scores.scores = matrix.whole()
        return cls(_with_vocabulary(scores, matrix.vocabulary), kept, settings)

    @classmethod
    def build(
        cls,
        passages: Iterable[Passage],
        folder: Path,
        settings: Bm25Settings | None = None,
        options: BuildOptions | None = None,
    ) -> Bm25Index:
        """Build an index in a folder, and open it; see `build_index`."""
        build_index(passages, folder, settings or Bm25Settings(), options)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Bm25Index:
        """Open an index that `build` made; memory-mapped, so it costs little until it is searched.

        Raises IndexUnusable when the folder holds no such index, or one of another version, or a file of
        another size than the manifest says.
        """
        manifest = read_manifest(folder, Bm25Settings.name)
        settings = Bm25Settings.of(manifest)
        scores = settings.scorer(_backend(manifest["passages"]))
        scores.load_scores(folder / "bm25s", num_docs=manifest["passages"], mmap=True)
        _with_vocabulary(scores, orjson.loads((folder / "bm25s" / "vocab.index.json").read_bytes()))
        index = cls(scores, PassageStore(folder, manifest["shard"]), settings)
        index.corpus_sha256 = manifest["corpus_sha256"]
        return index

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Index.search`. Only passages that share a word with the query are hits."""
        check_k(k)
        numbers = self.numbers(queries)
        asked = [row for row, words in enumerate(numbers) if words]
        found: list[list[Hit]] = [[] for _ in queries]
        # Threads of our own, each in the library's serial search: what Python does for one goes on beside the others.
        size = max(-(-len(asked) // self.threads), LEAST_PART)
        parts = [asked[first : first + size] for first in range(0, len(asked), size)]
        search = partial(self._search, numbers, k)
        results = self._pool.map(search, parts) if len(parts) > 1 else map(search, parts)
        for part, hits in zip(parts, results, strict=True):
            for row, own in zip(part, hits, strict=True):
                found[row] = own
        return found

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)

    def numbers(self, queries: Sequence[str]) -> list[list[int]]:
        """The numbers of each query's words that the index knows; what a word becomes is worked out once."""
        split = [WORD.findall(query.lower()) for query in queries]
        known = self._known
        if len(known) > KNOWN_WORDS:
            known = self._known = {}
        new = list({word for words in split for word in words} - known.keys())
        if new:
            for word, stems in zip(new, self.settings.tokenize(new), strict=True):
                known[word] = self.vocabulary.get(stems[0], -1) if stems else -1
        return [[number for word in words if (number := known[word]) >= 0] for words in split]

    def _search(self, numbers: list[list[int]], k: int, part: list[int], width: int | None = None) -> list[list[Hit]]:
        """The hits of some queries; `width` passages are looked at for each, or all if there are not so many."""
        # Some more than asked for: mostly they show that no tie was cut through, or what it was cut through.
        width = min(width or k + SPARE, len(self))
        rows, scores = self._scores.retrieve([numbers[row] for row in part], k=width, show_progress=False)
        known = scores[:, : k + 1]
        clear = (known[:, :-1] > known[:, 1:]).all(axis=1) & (scores[:, :k].min(axis=1) > 0)
        best = zip(rows[:, :k].tolist(), scores[:, :k].tolist(), clear.tolist(), strict=True)
        hits = [
            list(map(make_hit, zip(map(self._passage, own), theirs, strict=True)))
            if without_ties
            else self._ranked(rows[i], scores[i], k)
            for i, (own, theirs, without_ties) in enumerate(best)
        ]
        least = scores[:, min(k, width) - 1]
        cut = np.flatnonzero((scores[:, -1] == least) & (least > 0)).tolist() if width < len(self) else []
        if cut:
            again = self._search(numbers, k, [part[i] for i in cut], WIDER * width)
            for i, own in zip(cut, again, strict=True):
                hits[i] = own
        return hits

    def _ranked(self, rows: NDArray[Any], scores: NDArray[Any], k: int) -> list[Hit]:
        kept = (scores >= scores[min(k, len(scores)) - 1]) & (scores > 0)
        return ranked(map(self._passage, rows[kept].tolist()), scores[kept].tolist())[:k]


def _backend(passages: int) -> str:
    return "numba" if passages >= COMPILE_FROM else "numpy"


def _with_vocabulary(scores: bm25s.BM25, vocabulary: dict[str, int]) -> bm25s.BM25:
    """What `bm25s.BM25.load` sets beside the matrix."""
    scores.vocab_dict, scores.unique_token_ids_set = vocabulary, range(len(vocabulary))
    scores.nonoccurrence_array = None
    return scores
