"""The vectors of a FAISS index as a scan: exact if the index is flat, on all GPUs if FAISS has any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agentgym_ig.indexes.embedded import read_extent
from agentgym_ig.indexes.encoders import EXTRA, Vectors
from agentgym_ig.indexes.scans import Candidates, Extent, Found, Rows, exact_search, tied_search

FILE = "index.faiss"


class FaissScan:
    """Searches a FAISS index by inner product: exactly if it is flat, else as well as the index can.

    Args:
        index: any FAISS index.
        extent: of the vectors in a flat index; others need none.
        device: `cpu` keeps the index there; else it is copied to all GPUs, if this FAISS and this index can be on them.
        parameters: how thoroughly to search, in FAISS's words, such as `nprobe=64` or `efSearch=128,k_factor_rf=32`.

    Raises ValueError for parameters that the index does not have.
    """

    MOST_ON_GPU = 2048
    """Neighbours that FAISS can find on a GPU."""

    def __init__(
        self, index: Any, extent: Extent | None = None, device: str | None = None, parameters: str = ""
    ) -> None:
        faiss = load_faiss()
        self._index, self._extent = index, extent
        if parameters:
            try:
                faiss.ParameterSpace().set_index_parameters(index, parameters)
            except RuntimeError as error:
                raise ValueError(f"search parameters {parameters!r} do not fit this index: {error}") from error
        self._flat = flat_vectors(index)
        self._gpu = None if device == "cpu" else on_gpus(index)

    @classmethod
    def open(cls, folder: Path, device: str | None = None, parameters: str = "") -> FaissScan:
        """The scan over `index.faiss` in an index folder; what can be is memory-mapped."""
        faiss = load_faiss()
        index = faiss.read_index(str(folder / FILE), faiss.IO_FLAG_MMAP_IFC)
        return cls(index, read_extent(folder), device, parameters)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """See `Scan`."""
        return int(self._index.d)

    @property
    def on_gpu(self) -> bool:
        """Whether GPUs do the searching."""
        return self._gpu is not None

    def search(self, queries: Vectors, k: int) -> list[Found]:
        """See `Scan`."""
        k = min(k, len(self))
        if self._flat is None or self._extent is None:
            return tied_search(queries, k, self._nearest, len(self))
        slack = self._extent.slack(queries, half=self.on_gpu)
        return exact_search(queries, k, Candidates(self._nearest, self._flat.__getitem__, len(self)), slack)

    def _nearest(self, queries: Vectors, asked: int) -> tuple[Vectors, Rows]:
        index = self._gpu if self._gpu is not None and asked <= self.MOST_ON_GPU else self._index
        scores, rows = index.search(np.ascontiguousarray(queries), asked)
        return scores, rows


def flat_vectors(index: Any) -> Vectors | None:
    """The vectors of a flat index, where they lie; None for any other."""
    faiss = load_faiss()
    own = faiss.downcast_index(index)
    if not isinstance(own, faiss.IndexFlat) or not index.ntotal:
        return None
    found: Vectors = faiss.rev_swig_ptr(own.get_xb(), index.ntotal * index.d).reshape(-1, index.d)
    return found


def on_gpus(index: Any) -> Any:
    """A copy of a FAISS index on all GPUs, in float16 and cut up among them; None where that cannot be."""
    faiss = load_faiss()
    if faiss.get_num_gpus() == 0:
        return None
    kinds = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
    if not isinstance(faiss.downcast_index(index), kinds):
        return None
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16, options.shard = True, faiss.get_num_gpus() > 1
    return faiss.index_cpu_to_all_gpus(index, options)


def load_faiss() -> Any:
    """The module `faiss`. Raises ImportError, naming the extras that bring it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"a FAISS index needs faiss: pip install 'agentgym_ig[cpu]' (or [gpu]), and for its encoder {EXTRA}"
        ) from error
    return faiss
