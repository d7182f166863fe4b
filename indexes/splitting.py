"""Cut a built index into parts for several machines; each part scores its passages exactly as the whole does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
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
from agentgym_ig.indexes.postings import BYTES_PER_POSTING, save_matrix, word_ranges
from agentgym_ig.indexes.store import PassageStore
from agentgym_ig.types import Passage

BLOCK = 4_000_000
"""Postings that are looked at together: some 100 MB."""


def split_index(folder: Path, parts: int, out: Path) -> list[Path]:
    """Cut an index into `parts` of neighbouring passages: `out/part-0` and so on, each an index of its own.

    A part keeps the statistics of the whole (for BM25 how rare a word is, and the mean length), so that merging the
    parts' results by score, ties by passage id, gives the results of the whole. Kinds that can be cut: bm25s, torch.

    Raises IndexUnusable for a kind that cannot be cut, ValueError for more parts than passages or fewer than one.
    """
    manifest = read_manifest(folder)
    kinds: dict[str, type[Bm25Part] | type[TorchPart]] = {"bm25s": Bm25Part, "torch": TorchPart}
    if manifest["kind"] not in kinds:
        raise IndexUnusable(f"{folder} holds a {manifest['kind']} index; only {', '.join(kinds)} ones can be cut")
    store = PassageStore(folder, manifest["shard"])
    if not 1 <= parts <= len(store):
        raise ValueError(f"parts={parts} must lie between 1 and the {len(store)} passages")
    cuts = [len(store) * i // parts for i in range(parts + 1)]
    made: list[Path] = []
    for number, (low, high) in enumerate(pairwise(cuts)):
        made.append(out / f"part-{number}")
        about = {"number": number, "of": parts, "whole": manifest["corpus_sha256"]}
        part = kinds[manifest["kind"]](folder, manifest, low, high, about)
        passages = (store[row] for row in range(low, high))
        build_index(passages, made[-1], part, BuildOptions(shard=manifest["shard"]))
    return made


def check_parts(folders: Sequence[Path]) -> None:
    """Raise IndexUnusable when folders hold parts of an index, but not all of them, or of different ones."""
    found = {folder: read_manifest(folder)["settings"].get("part") for folder in folders}
    parts = [part for part in found.values() if part is not None]
    if not parts:
        return
    whole, of = parts[0]["whole"], parts[0]["of"]
    numbers = sorted(part["number"] for part in parts if (part["whole"], part["of"]) == (whole, of))
    if len(parts) < len(folders) or numbers != list(range(of)):
        shown = ", ".join(f"{folder}: {part}" for folder, part in found.items())
        raise IndexUnusable(f"wanted each of the {of} parts of one index once, found {shown}")


@dataclass(frozen=True)
class Part:
    """What the kinds of parts share: rows `low` to `high` of an index on disk."""

    whole: Path
    manifest: dict[str, Any]
    low: int
    high: int
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """See `Kind`."""
        kind: str = self.manifest["kind"]
        return kind

    def describe(self) -> dict[str, Any]:
        """See `Kind.describe`."""
        return {**self.manifest["settings"], "part": self.about}

    def versions(self) -> dict[str, str]:
        """See `Kind.versions`."""
        versions: dict[str, str] = self.manifest["versions"]
        return versions

    def memory_needed(self, count: int, sample: Path) -> int:
        """See `Kind.memory_needed`."""
        return BLOCK * BYTES_PER_POSTING

    def check(self, count: int, memory: int) -> None:
        """See `Kind.check`."""

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        """Nothing: all is there already."""


class Bm25Part(Part):
    """Some documents of a score matrix."""

    def assemble(self, work: Work, folder: Path) -> None:
        """See `Kind.assemble`."""
        whole = self.whole / "bm25s"
        starts, data, rows = (
            np.load(whole / f"{name}.csc.index.npy", mmap_mode="r") for name in ("indptr", "data", "indices")
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
        vocabulary = orjson.loads((whole / "vocab.index.json").read_bytes())
        save_matrix(matrix_folder, vocabulary, kept_starts, ((scores, own) for scores, own, _ in blocks()))
        Bm25Settings.of(self.manifest).save_parameters(matrix_folder, self.high - self.low)


class TorchPart(Part):
    """Some rows of the vectors."""

    def assemble(self, work: Work, folder: Path) -> None:
        """See `Kind.assemble`."""
        shard = self.manifest["shard"]
        paths = sorted((self.whole / "vectors").glob("*.npy"))
        (folder / "vectors").mkdir(exist_ok=True)
        for number, first in enumerate(range(self.low, self.high, shard)):
            last = min(first + shard, self.high)
            touched = range(first // shard, (last - 1) // shard + 1)
            pieces = [np.load(paths[i], mmap_mode="r")[max(first - i * shard, 0) : last - i * shard] for i in touched]
            np.save(folder / "vectors" / f"{number:05d}.npy", np.concatenate(pieces))
        shutil.copyfile(self.whole / "vectors.json", folder / "vectors.json")
