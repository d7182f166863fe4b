"""Scans over vectors: exactness against NumPy, and what graphs and lists give up for their speed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentgym_ig.indexes.build import Work
from agentgym_ig.indexes.embedded import blocks
from agentgym_ig.indexes.faiss_build import fill_index, make_index, search_parameters, write_index
from agentgym_ig.indexes.faiss_scan import FaissScan
from agentgym_ig.indexes.scans import Extent, Scan, TorchScan
from benchmarks.measure import fresh, timed

Array = NDArray[np.float32]
K = 10
QUERIES = 256
SIZES = (100_000, 1_000_000)
GRAPH_SIZES = (100_000, 300_000)
"""A million would take one thread five minutes."""
FACTORIES = ("Flat", "SQfp16", "IVF1024,Flat", "IVF1024,SQ8")
GRAPHS = ("HNSW32",)
DIMENSION = 384


def made_up(count: int, seed: int = 0) -> tuple[Array, Array]:
    """Unit vectors around 4,096 centres, and queries near some of them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((4096, DIMENSION), dtype=np.float32)
    vectors = centres[rng.integers(0, len(centres), count)]
    vectors += 0.7 * rng.standard_normal(vectors.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = vectors[rng.integers(0, count, QUERIES)] + 0.05 * rng.standard_normal((QUERIES, DIMENSION), np.float32)
    return vectors.astype(np.float16).astype(np.float32), asked.astype(np.float32)


def vectors(scratch: Path) -> dict[str, Any]:
    """Flat scans beside NumPy's at the smaller size; Flat, codes and lists at both."""
    return {"exact": fresh(_exact)[0]} | _all(FACTORIES, SIZES, scratch)


def graphs(scratch: Path) -> dict[str, Any]:
    """The same for graphs, which one thread builds so that they come out the same."""
    return _all(GRAPHS, GRAPH_SIZES, scratch)


def _all(factories: tuple[str, ...], sizes: tuple[int, ...], scratch: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {"k": K, "dimension": DIMENSION}
    for size in sizes:
        rows: dict[str, Any] = {}
        for factory in factories:
            rows[factory], peak = fresh(_one, factory, size, scratch)
            rows[factory]["peak_mb, with the vectors made up"] = peak
        figures[f"{size:,}"] = rows
    return figures


def _exact() -> dict[str, int]:
    """Queries for which the scan differs in an id or the order from a stable sort of NumPy's products."""
    stored, asked = made_up(SIZES[0])
    stored[1000:1300] = stored[999]  # equal vectors, whose order is that of their ids
    asked[:8] = stored[999]
    expected = [np.argsort(-_products(stored, query), kind="stable")[:K] for query in asked]
    index = make_index("Flat", DIMENSION)
    index.add(stored)
    halves = list(np.array_split(stored.astype(np.float16), 5))
    extent = Extent.of(blocks(halves))
    scans: dict[str, Scan] = {"faiss Flat": FaissScan(index, extent), "torch flat": TorchScan(halves, extent)}
    wrong: dict[str, int] = {"queries": QUERIES}
    for name, scan in scans.items():
        for batch in (1, 64, QUERIES):
            found = [row for i in range(0, QUERIES, batch) for row, _ in scan.search(asked[i : i + batch], K)]
            differ = sum(not np.array_equal(rows[:K], wanted) for rows, wanted in zip(found, expected, strict=True))
            wrong[f"{name}, batches of {batch}: wrong"] = differ
    return wrong


def _products(stored: Array, query: Array) -> Array:
    products: Array = (stored.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    return products


def _one(factory: str, size: int, scratch: Path) -> dict[str, Any]:
    """Build an index as our own builds do, and search it with our default parameters."""
    stored, asked = made_up(size)
    index = make_index(factory, DIMENSION)
    folder = scratch / "filling"
    folder.mkdir(exist_ok=True)
    (folder / "begun.faiss").unlink(missing_ok=True)
    halves = [stored[i : i + 20_000].astype(np.float16) for i in range(0, size, 20_000)]
    work = Work(folder, [], None, 1 << 40, lambda phase, done, total: None)  # type: ignore[arg-type]
    index, seconds = timed(lambda: fill_index(index, halves, work))
    write_index(index, folder / "index.faiss")
    scan = FaissScan(index, Extent.of(blocks(halves)), "cpu", search_parameters(index))
    truth = np.argpartition(-(asked @ stored.T), K, axis=1)[:, :K]
    found = [set(rows[:K].tolist()) for rows, _ in scan.search(asked, K)]
    recall = float(np.mean([len(found[i] & set(truth[i].tolist())) / K for i in range(QUERIES)]))
    row: dict[str, Any] = {"build_s": round(seconds, 1), "file_mb": round(_megabytes(folder / "index.faiss"), 1)}
    row |= {"recall@10": round(recall, 4), "parameters": search_parameters(index)}
    for batch in (1, 64):
        chunks = [asked[i : i + batch] for i in range(0, 64 if batch == 1 else QUERIES, batch)]
        took = min(timed(partial(_search_all, scan, chunks))[1] for _ in range(3))
        row[f"queries_per_s, batches of {batch}"] = round(sum(map(len, chunks)) / took, 1)
    return row


def _search_all(scan: FaissScan, chunks: list[Array]) -> None:
    for chunk in chunks:
        scan.search(chunk, K)


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6
