"""BM25 with the bm25s library (Lù 2024, arXiv 2407.03618) in Lucene's variant: build, save, open, search."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer
from numpy.typing import NDArray

from agentgym_ig.errors import IndexUnusable
from agentgym_ig.indexes.corpus import PassageStore, sha256
from agentgym_ig.types import Hit, Passage, texts

FORMAT = 1
MANIFEST = "manifest.json"
COMPILE_FROM = 20_000
"""Passages from which on numba's compile time (about 4 s once a process) is won back by its speed."""

Progress = Callable[[str, int], None]
"""Called with a phase's name and the passages done in it."""


@dataclass(frozen=True, kw_only=True)
class Bm25Settings:
    """What the index depends on beside its passages."""

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

    def __post_init__(self) -> None:
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise ValueError(f"k1={self.k1}, b={self.b}: k1 must be at least 0 and b between 0 and 1")
        if self.title_weight < 1:
            raise ValueError(f"title_weight={self.title_weight} must be 1 or more")

    def tokenize(self, lines: Sequence[str]) -> list[list[str]]:
        """Words of each line: lower case, two characters or more, stop words left out, stemmed."""
        stemmer = Stemmer.Stemmer(self.stemmer) if self.stemmer else None
        stopwords = self.stopwords if isinstance(self.stopwords, str) else list(self.stopwords)
        tokens: list[list[str]] = bm25s.tokenize(
            list(lines), stopwords=stopwords, stemmer=stemmer, return_ids=False, show_progress=False
        )
        return tokens


class Bm25Index:
    """An `Index` over BM25 scores. Make one with `from_passages`, or with `build` and `open` for one on disk."""

    def __init__(self, scores: bm25s.BM25, passages: PassageStore | list[Passage], settings: Bm25Settings) -> None:
        self._scores, self._passages, self.settings = scores, passages, settings

    def __len__(self) -> int:
        return len(self._passages)

    def passages(self) -> Iterator[Passage]:
        """All passages, in the order in which they were indexed."""
        return (self._passages[row] for row in range(len(self)))

    @classmethod
    def from_passages(cls, passages: Iterable[Passage], settings: Bm25Settings | None = None) -> Bm25Index:
        """An index in memory only."""
        kept, settings = list(passages), settings or Bm25Settings()
        return cls(_index(kept, settings), kept, settings)

    @classmethod
    def build(
        cls,
        passages: Iterable[Passage],
        folder: Path,
        settings: Bm25Settings | None = None,
        *,
        progress: Progress = lambda phase, done: None,
    ) -> Bm25Index:
        """Build an index and store it in a folder, which appears only when it is whole.

        Raises FileExistsError when the folder is there already, ValueError for a corpus without passages.
        """
        if folder.exists():
            raise FileExistsError(f"{folder} exists; give another folder, or delete it to build anew")
        settings = settings or Bm25Settings()
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            kept: list[Passage] = []
            for passage in PassageStore.write(partial, passages):
                kept.append(passage)
                progress("reading", len(kept))
            progress("indexing", 0)
            _index(kept, settings).save(partial, show_progress=False)
            _write_manifest(partial, len(kept), settings)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        progress("indexing", len(kept))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Bm25Index:
        """Open an index that `build` made; memory-mapped, so it costs little until it is searched.

        Raises IndexUnusable when the folder holds no such index, or one of another version, or a file of
        another size than the manifest says.
        """
        manifest = read_manifest(folder)
        settings = dict(manifest["settings"])
        if not isinstance(settings["stopwords"], str):
            settings["stopwords"] = tuple(settings["stopwords"])
        passages = PassageStore(folder)
        backend = "numba" if len(passages) >= COMPILE_FROM else "numpy"
        scores = bm25s.BM25.load(folder, mmap=True, show_progress=False, verbosity=0, backend=backend)
        return cls(scores, passages, Bm25Settings(**settings))

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Index.search`. Only passages that share a word with the query are hits."""
        if k < 1:
            raise ValueError(f"k={k}: ask for at least 1 passage")
        vocabulary = self._scores.vocab_dict
        tokens = [[token for token in words if token in vocabulary] for words in self.settings.tokenize(queries)]
        asked = [row for row, words in enumerate(tokens) if words]
        found: list[list[Hit]] = [[] for _ in queries]
        if asked:
            # One more than asked for: if it scores less than the last, no tie was cut through.
            rows, scores = self._scores.retrieve(
                [tokens[row] for row in asked], k=min(k + 1, len(self)), show_progress=False, n_threads=0
            )
            for i, row in enumerate(asked):
                found[row] = self._hits(tokens[row], rows[i], scores[i], k)
        return found

    def _hits(self, words: list[str], rows: NDArray[Any], scores: NDArray[Any], k: int) -> list[Hit]:
        if len(rows) > k and scores[k] == scores[k - 1] and scores[k] > 0:
            every: NDArray[Any] = self._scores.get_scores(words)
            rows = np.flatnonzero(every >= scores[k])
            scores = every[rows]
        else:
            rows, scores = rows[:k], scores[:k]
        hits = [
            Hit(self._passages[int(row)], float(score)) for row, score in zip(rows, scores, strict=True) if score > 0
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))[:k]


def _index(passages: list[Passage], settings: Bm25Settings) -> bm25s.BM25:
    if not passages:
        raise ValueError("the corpus holds no passage; an index needs at least one")
    titles = [f"{passage.title}\n" * (settings.title_weight - 1) for passage in passages]
    lines = [title + text for title, text in zip(titles, texts(passages), strict=True)]
    scores = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")
    scores.index(settings.tokenize(lines), show_progress=False)
    return scores


def _write_manifest(folder: Path, count: int, settings: Bm25Settings) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT,
        "kind": "bm25s",
        "passages": count,
        "settings": asdict(settings),
        "versions": {name: version(name) for name in ("bm25s", "PyStemmer")},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder, checked against the sizes of its files.

    Raises IndexUnusable, saying how to build an index, when there is none or it does not fit.
    """
    build = f"agentgym-ig index build --corpus CORPUS.jsonl --out {folder}"
    path = folder / MANIFEST
    if not path.is_file():
        raise IndexUnusable(f"no index in {folder} (found no {MANIFEST}); build one: {build}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        found = (manifest["format"], manifest["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise IndexUnusable(f"{path} cannot be read ({error!r}); build the index anew: {build}") from error
    if found != (FORMAT, "bm25s"):
        raise IndexUnusable(f"{folder} is of format {found}, wanted {(FORMAT, 'bm25s')}; build it anew: {build}")
    for name, entry in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != entry["bytes"]:
            raise IndexUnusable(f"{folder / name} has {size} bytes, wanted {entry['bytes']}; build it anew: {build}")
    return manifest


def damaged_files(folder: Path) -> list[str]:
    """Names of the index's files whose content is not what the manifest says. Reads all of them."""
    manifest = read_manifest(folder)
    return [name for name, entry in manifest["files"].items() if sha256(folder / name) != entry["sha256"]]
