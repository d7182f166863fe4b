"""How fast an index opens and answers on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil

from agentgym_ig.indexes.base import Index

SECONDS_PER_BATCH_SIZE = 5.0


def bench(
    open_it: Callable[[], Index],
    queries: Sequence[str],
    k: int,
    batch_sizes: Sequence[int],
    seconds: float = SECONDS_PER_BATCH_SIZE,
) -> dict[str, Any]:
    """Open an index, and search it in batches of each size for some seconds each.

    Returns:
        `open_s` and `first_search_s` (which maps files and compiles), resident memory of this process in MB after each
        (`open_mb`, `searched_mb`), and per batch size `queries_per_s` and the latency of a batch in ms (`p50_ms`,
        `p99_ms`).
    """
    if not queries or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(
            f"{len(queries)} queries, batches of {list(batch_sizes)}: give at least one query, sizes from 1"
        )
    process = psutil.Process()
    started = time.perf_counter()
    index = open_it()
    opened = time.perf_counter()
    figures: dict[str, Any] = {"open_s": opened - started, "open_mb": process.memory_info().rss / 1e6}
    index.search(queries[:1], k)
    figures["first_search_s"] = time.perf_counter() - opened
    figures["batches"] = {str(size): _speed(index, queries, k, size, seconds) for size in batch_sizes}
    figures["searched_mb"] = process.memory_info().rss / 1e6
    return figures


def _speed(index: Index, queries: Sequence[str], k: int, size: int, seconds: float) -> dict[str, float]:
    batches = [[queries[(first + i) % len(queries)] for i in range(size)] for first in range(0, len(queries), size)]
    index.search(batches[0], k)
    took: list[float] = []
    while sum(took) < seconds:
        started = time.perf_counter()
        index.search(batches[len(took) % len(batches)], k)
        took.append(time.perf_counter() - started)
    p50, p99 = (float(np.percentile(took, share)) * 1000 for share in (50, 99))
    return {"queries_per_s": size * len(took) / sum(took), "p50_ms": p50, "p99_ms": p99}
