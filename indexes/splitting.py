"""Cut a built index into parts for several machines; each part scores its passages exactly as the whole does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from agentgym_ig.errors import IndexUnusable
from agentgym_ig.indexes.bm25 import Bm25Settings
from agentgym_ig.indexes.build import BuildOptions, Work, build_index
from agentgym_ig.indexes.manifest import read_manifest
from agentgym_ig.indexes.postings import save_matrix, word_ranges
from agentgym_ig.indexes.store import PassageStore
from agentgym_ig.types import Passage

BLOCK = 4_000_000
"""Postings that are looked at together: some 100 MB."""


def split_index(folder: Path, parts: int, out: Path) -> list[Path]:
    """Cut an index into `parts` of neighbouring passages: `out/part-0` and so on, each an index of its own.

    A part keeps the statistics of the whole (for BM25 how rare a word is, and the mean length), so that merging the
    parts' results by score, ties by passage id, gives the results of the whole.

    Raises IndexUnusable for a kind that cannot be cut, ValueError for more parts than passages or fewer than one.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] != Bm25Settings.name:
        raise IndexUnusable(f"{folder} holds a {manifest['kind']} index; only {Bm25Settings.name} ones can be cut")
    store = PassageStore(folder, manifest["shard"])
    if not 1 <= parts <= len(store):
        raise ValueError(f"parts={parts} must lie between 1 and the {len(store)} passages")
    cuts = [len(store) * i // parts for i in range(parts + 1)]
    made: list[Path] = []
    for number, (low, high) in enumerate(pairwise(cuts)):
        made.append(out / f"part-{number}")
        part = _Bm25Part(folder / "bm25s", manifest["settings"], low, high)
        passages = (store[row] for row in range(low, high))
        build_index(passages, made[-1], part, BuildOptions(shard=manifest["shard"]))
    return made


@dataclass(frozen=True)
class _Bm25Part:
    """The `Kind` of a part: rows `low` to `high` of a matrix on disk."""

    whole: Path
    settings: dict[str, Any]
    low: int
    high: int

    name = Bm25Settings.name

    def describe(self) -> dict[str, Any]:
        return self.settings

    def versions(self) -> dict[str, str]:
        return Bm25Settings().versions()

    def memory_needed(self, count: int, sample: Path) -> int:
        return Bm25Settings().memory_needed(count, sample)

    def digest(self, passages: Sequence[Passage], folder: Path) -> None:
        """Nothing: the matrix is there already."""

    def assemble(self, work: Work, folder: Path) -> None:
        starts, data, rows = (
            np.load(self.whole / f"{name}.csc.index.npy", mmap_mode="r") for name in ("indptr", "data", "indices")
        )

        def blocks() -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]]]:
            for low, high in word_ranges(starts, BLOCK):
                own = rows[starts[low] : starts[high]]
                mine = (own >= self.low) & (own < self.high)
                kept = np.add.reduceat(mine.astype(np.int64), starts[low:high] - starts[low])
                yield data[starts[low] : starts[high]][mine], own[mine] - np.int32(self.low), kept

        kept_starts = np.append(0, np.cumsum(np.concatenate([kept for _, _, kept in blocks()])))
        matrix_folder = folder / "bm25s"
        matrix_folder.mkdir(exist_ok=True)
        vocabulary = orjson.loads((self.whole / "vocab.index.json").read_bytes())
        save_matrix(matrix_folder, vocabulary, kept_starts, ((scores, own) for scores, own, _ in blocks()))
        Bm25Settings(**self.settings).save_parameters(matrix_folder, self.high - self.low)
