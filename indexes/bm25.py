"""BM25 with the bm25s library (Lù 2024, arXiv 2407.03618) in Lucene's variant: build, open, search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
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
            list(lines), stopwords=stopwords, stemmer=stemmer, return_ids=return_ids, show_progress=False
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
        threads: how many of a batch's queries are searched at once, on indexes large enough to be compiled.
    """

    def __init__(self, scores: bm25s.BM25, passages: PassageStore | list[Passage], settings: Bm25Settings) -> None:
        self._scores, self._passages, self.settings = scores, passages, settings
        self._passage = passages.read if isinstance(passages, PassageStore) else passages.__getitem__
        self.corpus_sha256: str | None = None
        self.threads = 1

    def __len__(self) -> int:
        return len(self._passages)

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
        numbers = self._scores.vocab_dict
        tokens = [[numbers[word] for word in words if word in numbers] for words in self.settings.tokenize(queries)]
        asked = [row for row, words in enumerate(tokens) if words]
        found: list[list[Hit]] = [[] for _ in queries]
        if not asked:
            return found
        # One more than asked for: if it scores less than the last, no tie was cut through.
        rows, scores = self._scores.retrieve(
            [tokens[row] for row in asked],
            k=min(k + 1, len(self)),
            show_progress=False,
            n_threads=self.threads,
        )
        without_ties = (scores[:, :-1] > scores[:, 1:]).all(axis=1) & (scores[:, :k].min(axis=1) > 0)
        best = zip(asked, rows[:, :k].tolist(), scores[:, :k].tolist(), without_ties.tolist(), strict=True)
        for i, (row, own, their_scores, clear) in enumerate(best):
            found[row] = (
                list(map(make_hit, zip(map(self._passage, own), their_scores, strict=True)))
                if clear
                else self._with_ties(tokens[row], rows[i], scores[i], k)
            )
        return found

    def _with_ties(self, words: list[int], rows: NDArray[Any], scores: NDArray[Any], k: int) -> list[Hit]:
        if len(rows) > k and scores[k] == scores[k - 1] and scores[k] > 0:
            every: NDArray[Any] = self._scores.get_scores_from_ids(words)
            rows = np.flatnonzero(every >= scores[k])
            scores = every[rows]
        else:
            rows, scores = rows[:k], scores[:k]
        positive = scores > 0
        return ranked(map(self._passage, rows[positive].tolist()), scores[positive].tolist())[:k]


def _backend(passages: int) -> str:
    return "numba" if passages >= COMPILE_FROM else "numpy"


def _with_vocabulary(scores: bm25s.BM25, vocabulary: dict[str, int]) -> bm25s.BM25:
    """What `bm25s.BM25.load` sets beside the matrix."""
    scores.vocab_dict, scores.unique_token_ids_set = vocabulary, range(len(vocabulary))
    scores.nonoccurrence_array = None
    return scores
