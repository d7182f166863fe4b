"""Building FAISS indexes of any kind, and taking in those that others have published."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentgym_ig.errors import BuildFailed, IndexUnusable
from agentgym_ig.indexes.build import Work, link_or_copy
from agentgym_ig.indexes.embedded import (
    VECTORS,
    Embedded,
    blocks,
    check_same,
    open_vectors,
    read_extent,
)
from agentgym_ig.indexes.faiss_build import (
    EF_CONSTRUCTION,
    faiss_version,
    fill_index,
    is_graph,
    make_index,
    memory_of,
    search_parameters,
    with_refine,
    write_index,
)
from agentgym_ig.indexes.faiss_scan import FILE, flat_vectors, load_faiss
from agentgym_ig.indexes.manifest import read_manifest
from agentgym_ig.indexes.scans import Extent
from agentgym_ig.types import Passage

FLAT_UP_TO = 1_000_000
"""Passages up to which `auto_factory` looks at every vector."""


def auto_factory(passages: int) -> str:
    """Flat up to a million passages; then lists, 4 times the root of their number, of 8-bit vectors."""
    if passages <= FLAT_UP_TO:
        return "Flat"
    return f"IVF{2 ** round(math.log2(4 * math.sqrt(passages)))},SQ8"


@dataclass(frozen=True)
class Faiss(Embedded):
    """A FAISS index by its factory string: `Flat`, `HNSW32`, `IVF4096,SQ8`, `IVF4096,PQ48`, `SQfp16` and so on.

    Files are equal byte for byte for equal corpora and settings, and numbers of threads (where k-means is trained).
    Graphs are therefore made by one thread.
    """

    factory: str = "Flat"
    parameters: str = ""
    """How thoroughly to search, in FAISS's words (`nprobe=64,k_factor_rf=32`); what is not named gets our default."""
    vectors_from: Path | None = field(default=None, kw_only=True)
    """Folder of a torch index over the same corpus with the same encoder: nothing is then embedded again."""

    name = "faiss"

    def describe(self) -> dict[str, Any]:
        """See `Kind.describe`. Raises ValueError for a factory that FAISS does not know."""
        shared = super().describe()
        if self.vectors_from is not None:
            reused = read_manifest(self.vectors_from, "torch")["settings"]
            check_same(reused["encoder"], shared["encoder"], self.vectors_from)
            shared = reused
        index = make_index(self.factory, self.embed.dimension)
        parameters = ",".join(part for part in (search_parameters(index), self.parameters) if part)
        building = {"ef_construction": EF_CONSTRUCTION} if is_graph(index) else {}
        return shared | {"factory": with_refine(self.factory), "parameters": parameters} | building

    def versions(self) -> dict[str, str]:
        """See `Kind.versions`."""
        return super().versions() | faiss_version()

    def check(self, count: int, memory: int) -> None:
        """See `Kind.check`. Says which factory would do with the memory."""
        dimension = self.embed.dimension
        needed = self.encoder_memory + memory_of(make_index(self.factory, dimension), count)
        if needed > memory:
            raise BuildFailed(self._too_large(needed, count, memory, dimension))

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        """See `Kind.digest`."""
        if self.vectors_from is None:
            super().digest(passages, folder, progress)

    def memory_needed(self, count: int, sample: Path) -> int:
        """See `Kind.memory_needed`."""
        return self.encoder_memory + memory_of(make_index(self.factory, read_extent(sample).dimension), count)

    def assemble(self, work: Work, folder: Path) -> None:
        """See `Kind.assemble`. Raises BuildFailed when FAISS cannot make it."""
        shards = open_vectors(self._files(work, folder))
        index = make_index(self.factory, shards[0].shape[1])
        try:
            index = fill_index(index, shards, work)
        except RuntimeError as error:
            raise BuildFailed(f"FAISS cannot make {self.factory!r} of these vectors: {error}") from error
        write_index(index, folder / FILE)
        Extent.of(blocks(shards)).save(folder)

    def _files(self, work: Work, folder: Path) -> list[Path]:
        if self.vectors_from is None:
            return [shard / VECTORS for shard in work.shards]
        whole = hashlib.sha256()
        for path in sorted((folder / "passages").glob("*.jsonl")):
            whole.update(path.read_bytes())
        theirs = read_manifest(self.vectors_from)["corpus_sha256"]
        if whole.hexdigest() != theirs:
            raise BuildFailed(
                f"{self.vectors_from} holds the vectors of another corpus (SHA-256 {theirs}, wanted "
                f"{whole.hexdigest()}); give the corpus that it was built over, or build without its vectors"
            )
        return sorted((self.vectors_from / "vectors").glob("*.npy"))

    def _too_large(self, needed: int, count: int, memory: int, dimension: int) -> str:
        fitting = [
            factory
            for factory in ("SQfp16", "SQ8", "SQ4")
            if self.encoder_memory + memory_of(make_index(factory, dimension), count) <= memory
        ]
        instead = f"the factory {fitting[0]}" if fitting else "a torch index, which takes no more for more passages"
        return (
            f"{self.factory} over {count:,} passages takes about {needed >> 20:,} MB, allowed are {memory >> 20:,} MB; "
            f"allow more and run the same command again, or build {instead}"
        )


@dataclass(frozen=True)
class FaissFile(Embedded):
    """A FAISS file that somebody else made, row i of it being passage i of the corpus, and the encoder that made it."""

    path: Path
    parameters: str = ""

    name = "faiss"

    def describe(self) -> dict[str, Any]:
        """See `Kind.describe`."""
        index = self._open()
        parameters = ",".join(part for part in (search_parameters(index), self.parameters) if part)
        about = {"imported": self.path.name, "bytes": self.path.stat().st_size, "type": type(index).__name__}
        return {"encoder": self.embed.describe(), "parameters": parameters} | about

    def versions(self) -> dict[str, str]:
        """See `Kind.versions`."""
        return super().versions() | faiss_version()

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        """See `Kind.digest`. The file is there already."""

    def memory_needed(self, count: int, sample: Path) -> int:
        """See `Kind.memory_needed`."""
        return self.encoder_memory

    def assemble(self, work: Work, folder: Path) -> None:
        """See `Kind.assemble`. Raises BuildFailed when file, corpus and encoder do not belong together."""
        index = self._open()
        if index.ntotal != len(work.passages):
            raise BuildFailed(
                f"{self.path} holds {index.ntotal:,} vectors, but the corpus {len(work.passages):,} passages; "
                "give the corpus that it was made from"
            )
        if index.d != self.embed.dimension:
            raise BuildFailed(
                f"{self.path} holds vectors of {index.d} numbers, but {self.encoder.model} gives "
                f"{self.embed.dimension}; give the encoder that it was made with"
            )
        self._check_some(index, work)
        link_or_copy(self.path, folder / FILE)
        flat = flat_vectors(index)
        extent = Extent(index.d, 0.0, False) if flat is None else Extent.of(blocks([flat]))
        extent.save(folder)

    def _open(self) -> Any:
        faiss = load_faiss()
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}; give a FAISS index, its parts put together")
        try:
            index = faiss.read_index(str(self.path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IndexUnusable(f"{self.path} is no FAISS index, or not all of it: {error}") from error
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise IndexUnusable(f"{self.path} compares by another metric than the inner product, which is wanted")
        return index

    def _check_some(self, index: Any, work: Work) -> None:
        """Embed some passages again: of their vectors in the file, each must be most like its own."""
        rows = np.unique(np.linspace(0, index.ntotal - 1, 16).astype(np.int64)).tolist()
        try:
            theirs = np.stack([index.reconstruct(row) for row in rows])
        except RuntimeError:
            return  # this type of index does not give its vectors back
        theirs /= np.maximum(np.linalg.norm(theirs, axis=1, keepdims=True), 1e-12)
        ours = self.embed.passages([work.passages[row] for row in rows])
        likest = (ours @ theirs.T).argmax(axis=1)
        right = int((likest == np.arange(len(rows))).sum())
        if right < len(rows) / 2:  # some may be doubles
            raise BuildFailed(
                f"the vectors in {self.path} do not belong to these passages as {self.encoder.model} embeds them: of "
                f"{len(rows)} embedded again, {right} are most like their own; give the corpus and the encoder that it "
                "was made with"
            )
