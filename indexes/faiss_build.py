"""Making and filling FAISS indexes: what they need, how they are trained, and going on where it was stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentgym_ig.indexes.build import Work
from agentgym_ig.indexes.embedded import BLOCK, blocks
from agentgym_ig.indexes.encoders import Vectors
from agentgym_ig.indexes.faiss_scan import load_faiss

EF_CONSTRUCTION = 64
TRAINED_ON = 64
"""Vectors per list that k-means sees; FAISS wants 39 at least."""
CODEBOOK = 16_384
"""Vectors that codes of 256 values are trained on, if there are so many: as many for each value."""
SAVE_EVERY_S = 600.0
"""How much adding to an index a killed build loses at most."""
SEED = 12345
DEFAULTS = {"nprobe": 64, "quantizer_efSearch": 128, "efSearch": 128, "k_factor_rf": 32}
"""How thoroughly to search where nobody says otherwise."""


def with_refine(factory: str) -> str:
    """The factory, with a second look at the best if its codes are too coarse to rank them (0.4 -> 0.9 recall)."""
    parts = factory.split(",")
    coarse = any(part.startswith(("PQ", "RaBitQ", "LSQ", "RQ", "PRQ", "PLSQ")) for part in parts)
    refined = any(part.startswith(("Refine", "RFlat")) for part in parts)
    return f"{factory},Refine(SQfp16)" if coarse and not refined else factory


def make_index(factory: str, dimension: int) -> Any:
    """An empty index. Raises ValueError for a factory that FAISS does not know."""
    faiss = load_faiss()
    try:
        index = faiss.index_factory(dimension, with_refine(factory), faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS knows no index {factory!r} of {dimension} dimensions: {error}") from error
    for part in _parts(index):
        if hasattr(part, "hnsw"):
            part.hnsw.efConstruction = EF_CONSTRUCTION
    return index


def _parts(index: Any) -> list[Any]:
    """The index and all that it is made of, from the outside inwards."""
    own = load_faiss().downcast_index(index)
    names = ("index", "base_index", "refine_index", "storage", "quantizer")
    inner = [getattr(own, name) for name in names if getattr(own, name, None) is not None]
    return [own, *(part for each in inner for part in _parts(each))]


def is_graph(index: Any) -> bool:
    """Whether a graph is part of the index: such are made by one thread, since more would make each time another."""
    return any(hasattr(part, "hnsw") or hasattr(part, "nsg") for part in _parts(index))


def search_parameters(index: Any) -> str:
    """The defaults of those parameters that the index has, in FAISS's words."""
    faiss = load_faiss()
    names: list[str] = []
    for part in _parts(index):
        if isinstance(part, faiss.IndexRefine):
            names.append("k_factor_rf")
        elif isinstance(part, faiss.IndexIVF):
            names.append("nprobe")
        elif isinstance(part, faiss.IndexHNSW):
            names.append("quantizer_efSearch" if "nprobe" in names else "efSearch")
    return ",".join(f"{name}={DEFAULTS[name]}" for name in names)


def memory_of(index: Any, count: int) -> int:
    """Bytes that filling the index with so many vectors takes."""
    lists = _lists(index)
    vector = 4 * int(index.d)
    once = 2 * vector * (lists + _training_rows(index, count) + BLOCK)
    return once + round(_row_bytes(index) * count)


def _row_bytes(index: Any) -> float:
    faiss = load_faiss()
    own = faiss.downcast_index(index)
    if isinstance(own, faiss.IndexRefine):
        return _row_bytes(own.base_index) + _row_bytes(own.refine_index)
    if isinstance(own, faiss.IndexPreTransform):
        return _row_bytes(own.index)
    if isinstance(own, faiss.IndexIVF):
        return float(own.code_size + 8) * 1.25  # each list grows on its own
    if isinstance(own, faiss.IndexHNSW):
        # Neighbours on the lowest level, and on the others of one vector in M; the array of them is moved as it grows.
        links = 4 * (own.hnsw.nb_neighbors(0) + 1.1 * own.hnsw.nb_neighbors(1) / max(own.hnsw.nb_neighbors(1) - 1, 1))
        return _row_bytes(own.storage) + float(2 * links + 12)
    return float(own.sa_code_size())


def _lists(index: Any) -> int:
    return max((int(part.nlist) for part in _parts(index) if hasattr(part, "nlist")), default=0)


def _training_rows(index: Any, count: int) -> int:
    return 0 if index.is_trained else min(count, max(TRAINED_ON * _lists(index), CODEBOOK))


def fill_index(index: Any, shards: Sequence[NDArray[Any]], work: Work, save_every_s: float = SAVE_EVERY_S) -> Any:
    """The index with all vectors in it, trained first if need be; goes on with what a killed build has saved of it."""
    faiss = load_faiss()
    begun, total = work.folder / "begun.faiss", sum(map(len, shards))
    with _threads(1 if is_graph(index) else None):
        if begun.exists():
            index = faiss.read_index(str(begun))
        elif not index.is_trained:
            work.progress("training", 0, total)
            index.train(_sample(index, shards, total))
            write_index(index, begun)
        _reserve(index, total)
        saved = time.monotonic()
        for block in blocks(shards, index.ntotal):
            _draw_levels(index, len(block))
            index.add(block)
            work.progress("adding", index.ntotal, total)
            if time.monotonic() - saved > save_every_s:
                write_index(index, begun)
                saved = time.monotonic()
    return index


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _sample(index: Any, shards: Sequence[NDArray[Any]], total: int) -> Vectors:
    """Vectors to train on: always the same of the same corpus."""
    rows = np.sort(np.random.default_rng(SEED).choice(total, _training_rows(index, total), replace=False))
    starts = np.cumsum([0, *map(len, shards)])
    cuts = np.searchsorted(rows, starts)
    chosen = [
        shard[rows[low:high] - first].astype(np.float32)
        for shard, first, low, high in zip(shards, starts, cuts, cuts[1:], strict=False)
    ]
    sample: Vectors = np.concatenate(chosen)
    # FAISS refuses to make more lists or codes than it sees vectors; so a small corpus is shown several times.
    return np.resize(sample, (max(len(sample), _lists(index), 256), sample.shape[1]))


def _reserve(index: Any, total: int) -> None:
    """Take the room for all vectors at once: growing, an array is for a moment there twice."""
    for part in _parts(index):
        if hasattr(part, "codes") and hasattr(part, "code_size") and hasattr(part.codes, "owned_data"):
            size = part.codes.size()
            part.codes.resize(total * part.code_size)
            part.codes.resize(size)


def _draw_levels(index: Any, count: int) -> None:
    """Draw the levels of the next vectors in a graph from their row: FAISS's own draws would differ after a restart."""
    faiss = load_faiss()
    for part in _parts(index):
        if isinstance(part, faiss.IndexIVF):
            return  # its graph is that of the lists, and was made at once
        if isinstance(part, faiss.IndexHNSW):
            shares = np.cumsum(faiss.vector_to_array(part.hnsw.assign_probas))
            draws = np.random.Generator(np.random.Philox(key=[SEED, index.ntotal])).random(count)
            levels = 1 + np.minimum(np.searchsorted(shares, draws, "right"), len(shares) - 1)
            before = faiss.vector_to_array(part.hnsw.levels)
            faiss.copy_array_to_vector(np.concatenate([before, levels.astype(np.int32)]), part.hnsw.levels)


def write_index(index: Any, path: Path) -> None:
    """Write the file, which appears only when it is whole. Raises OSError when the disk is full."""
    faiss = load_faiss()
    partial = path.with_name(f".{path.name}.partial")
    failed: list[OSError] = []
    with partial.open("wb") as out:

        def write(content: bytes) -> None:
            try:
                out.write(content)
            except OSError as error:  # FAISS would make something else of it; its own writer even loses some
                failed.append(error)
                raise

        try:
            faiss.write_index(index, faiss.PyCallbackIOWriter(write))
        except Exception:
            if failed:
                raise failed[0] from None
            raise
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def faiss_version() -> dict[str, str]:
    """Name and version of the package that brought FAISS."""
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            return {name: version(name)}
        except PackageNotFoundError:
            continue
    return {"faiss": str(load_faiss().__version__)}
