"""Dense retrieval: an encoder, a scan over vectors, and the passages that they stand for."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentgym_ig.errors import IndexUnusable, SearchFailed
from agentgym_ig.indexes.base import check_k, ranked
from agentgym_ig.indexes.build import Work, link_or_copy
from agentgym_ig.indexes.embedded import (
    VECTORS,
    Embedded,
    blocks,
    check_same,
    open_vectors,
    read_extent,
)
from agentgym_ig.indexes.encoders import Encoder, EncoderSettings, best_device
from agentgym_ig.indexes.faiss_kinds import Faiss, FaissFile, auto_factory
from agentgym_ig.indexes.manifest import read_manifest
from agentgym_ig.indexes.scans import Extent, Scan, TorchScan
from agentgym_ig.indexes.store import PassageStore
from agentgym_ig.types import Hit, Passage

__all__ = ["DenseIndex", "Faiss", "FaissFile", "Torch", "auto_factory"]


@dataclass(frozen=True)
class Torch(Embedded):
    """The vectors themselves, multiplied with every query: exact, needs no FAISS, fastest on GPUs."""

    name = "torch"

    def memory_needed(self, count: int, sample: Path) -> int:
        """See `Kind.memory_needed`."""
        return self.encoder_memory

    def assemble(self, work: Work, folder: Path) -> None:
        """See `Kind.assemble`."""
        (folder / "vectors").mkdir(exist_ok=True)
        paths = [shard / VECTORS for shard in work.shards]
        for number, path in enumerate(paths):
            link_or_copy(path, folder / "vectors" / f"{number:05d}.npy")
        Extent.of(blocks(open_vectors(paths))).save(folder)


class DenseIndex:
    """An `Index` over vectors. A query without one visible character has no hits; any other has k.

    Args:
        scan: finds rows by vectors.
        passages: the passage of each row.
        encoder: makes the queries' vectors.
    """

    def __init__(self, scan: Scan, passages: PassageStore | Sequence[Passage], encoder: Encoder) -> None:
        self.scan, self._passages, self.encoder = scan, passages, encoder
        self.corpus_sha256: str | None = None

    def __len__(self) -> int:
        return len(self._passages)

    def passages(self) -> Iterator[Passage]:
        """All passages, in the order in which they were indexed."""
        return iter(self._passages)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        encoder: Encoder | str | None = None,
        device: str | None = None,
        parameters: str = "",
    ) -> DenseIndex:
        """Open an index that `Torch`, `Faiss` or `FaissFile` made; its vectors are memory-mapped.

        Args:
            folder: of the index.
            encoder: the model folder or name, where the one in the manifest has moved; or an encoder at hand.
            device: where to encode and, as far as the kind can, to search; None takes GPUs if there are any.
            parameters: how thoroughly a FAISS index searches, in FAISS's words: `nprobe=128`, `efSearch=256`.

        Raises IndexUnusable when the folder holds no such index, or the encoder is not the one it was made with.
        """
        manifest = read_manifest(folder)
        if manifest["kind"] not in ("faiss", "torch"):
            raise IndexUnusable(f"{folder} holds a {manifest['kind']} index, wanted faiss or torch")
        made_with = manifest["settings"]["encoder"]
        if not isinstance(encoder, Encoder):
            encoder = Encoder(_settings(made_with, encoder), device)
        scan = _scan(folder, manifest, device, parameters)
        passages = PassageStore(folder, manifest["shard"])
        dimension = encoder.queries(["?"]).shape[1]  # loads what queries need, and nothing else
        check_same(made_with, encoder.describe(), folder)
        if scan.dimension != dimension or len(scan) != len(passages):
            raise IndexUnusable(
                f"{folder} holds {len(scan):,} vectors of {scan.dimension} numbers for {len(passages):,} passages and "
                f"an encoder of {dimension}; build it anew"
            )
        index = cls(scan, passages, encoder)
        index.corpus_sha256 = manifest["corpus_sha256"]
        return index

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Index.search`."""
        check_k(k)
        asked = [row for row, query in enumerate(queries) if _visible(query)]
        found: list[list[Hit]] = [[] for _ in queries]
        if not asked:
            return found
        try:
            nearest = self.scan.search(self.encoder.queries([queries[row] for row in asked]), k)
        except RuntimeError as error:  # what torch and FAISS raise when a device fails or its memory is full
            raise SearchFailed(f"the dense search failed: {error}") from error
        passage = self._passages.__getitem__
        for row, (rows, scores) in zip(asked, nearest, strict=True):
            found[row] = ranked(map(passage, rows.tolist()), scores.tolist())[:k]
        return found


def _visible(query: str) -> bool:
    """Whether anything but white space, control characters and lone surrogates is in a query."""
    return any(not character.isspace() and unicodedata.category(character)[0] != "C" for character in query)


def _settings(made_with: dict[str, Any], model: str | None) -> EncoderSettings:
    """The encoder of a manifest, or the same use of a model that lies elsewhere."""
    names = ("query_prefix", "passage_prefix", "pooling", "max_tokens", "normalise")
    same = {name: made_with[name] for name in names}
    if model is not None:
        return EncoderSettings(model=model, **same)
    return EncoderSettings(model=made_with["model"], revision=made_with["commit"], **same)


def _scan(folder: Path, manifest: dict[str, Any], device: str | None, parameters: str) -> Scan:
    if manifest["kind"] == "faiss":
        from agentgym_ig.indexes.faiss_scan import FaissScan

        given = ",".join(part for part in (manifest["settings"]["parameters"], parameters) if part)
        return FaissScan.open(folder, device, given)
    if parameters:
        raise ValueError(f"parameters={parameters!r}: a torch index looks at every vector and has none")
    vectors = open_vectors(sorted((folder / "vectors").glob("*.npy")))
    return TorchScan(vectors, read_extent(folder), device or best_device())
