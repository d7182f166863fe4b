"""What all kinds of dense index share: vectors of passages, made shard by shard."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentgym_ig.errors import BuildFailed, IndexUnusable
from agentgym_ig.indexes.encoders import Encoder, EncoderSettings, Vectors
from agentgym_ig.indexes.scans import Extent
from agentgym_ig.records import write_whole
from agentgym_ig.types import Passage

VECTORS = "vectors.npy"
BLOCK = 16_384
"""Vectors that are brought to float32 at once."""
TOGETHER = 2000
"""Passages embedded between two signs of life; among them those of equal length share a batch."""
LIBRARY_MEMORY = 1 << 30
"""Bytes that torch, the encoder's batch in hand and one shard take beside the encoder's weights, about: measured."""
SAME = ("fingerprint", "query_prefix", "passage_prefix", "pooling", "max_tokens", "normalise")
"""What two encoders must agree in for their vectors to be comparable."""


@dataclass(frozen=True)
class Embedded:
    """Passages as an encoder's vectors, kept as float16: they lose less by that than by being embedded in bfloat16.

    A base for kinds of index.
    """

    encoder: EncoderSettings
    device: str | None = field(default=None, kw_only=True)
    """Where to embed, as torch names it; None takes a GPU if there is one."""

    @cached_property
    def embed(self) -> Encoder:
        """The encoder itself."""
        return Encoder(self.encoder, self.device)

    def describe(self) -> dict[str, Any]:
        """See `Kind.describe`."""
        return {"encoder": self.embed.describe(), "vectors": "float16"}

    def versions(self) -> dict[str, str]:
        """See `Kind.versions`."""
        return {name: version(name) for name in ("sentence-transformers", "torch", "transformers")}

    def check(self, count: int, memory: int) -> None:
        """See `Kind.check`."""
        if memory < self.encoder_memory:
            raise BuildFailed(
                f"{memory >> 20:,} MB are not enough for {self.encoder.model}; allow {self.encoder_memory >> 20:,} MB "
                "or more"
            )

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        """See `Kind.digest`. Raises BuildFailed when the encoder gives a vector that is no number."""
        pieces: list[NDArray[np.float16]] = []
        for first in range(0, len(passages), TOGETHER):
            pieces.append(self.embed.passages(passages[first : first + TOGETHER]).astype(np.float16))
            progress(first + len(pieces[-1]))
        vectors = np.concatenate(pieces)
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(wrong):
            raise BuildFailed(
                f"{self.encoder.model} gives passage {passages[int(wrong[0])].id!r} a vector with values that are no "
                "numbers, or too large for float16; look at its text, or choose another encoder"
            )
        content = io.BytesIO()
        np.save(content, vectors)
        write_whole(folder / VECTORS, content.getvalue())

    @property
    def encoder_memory(self) -> int:
        """Bytes that embedding takes."""
        weights = sum(path.stat().st_size for path in self.embed.folder.glob("**/*.safetensors"))
        return LIBRARY_MEMORY + 2 * weights


def open_vectors(paths: Sequence[Path]) -> list[NDArray[Any]]:
    """Files of vectors, memory-mapped; in mode `c`, since torch warns of arrays that it could not write to."""
    return [np.load(path, mmap_mode="c", allow_pickle=False) for path in paths]


def blocks(shards: Sequence[NDArray[Any]], start: int = 0) -> Iterator[Vectors]:
    """The vectors from row `start` on, in blocks that end where they end whatever `start` is."""
    first = 0
    for shard in shards:
        for low in range(0, len(shard), BLOCK):
            if first + low >= start:
                yield shard[low : low + BLOCK].astype(np.float32)
        first += len(shard)


def read_extent(folder: Path) -> Extent:
    """What the build measured."""
    return Extent(**json.loads((folder / Extent.FILE).read_text()))


def check_same(wanted: dict[str, Any], found: dict[str, Any], where: Path) -> None:
    """Raise IndexUnusable when an index was made with another encoder than the one at hand."""
    differing = [name for name in SAME if wanted[name] != found[name]]
    if differing:
        made, given = ({name: encoder[name] for name in ("model", *differing)} for encoder in (wanted, found))
        raise IndexUnusable(
            f"{where} was built with encoder {made}, not with {given}; give the encoder it was built with, "
            "or build it anew"
        )
