"""What a build will need, from building the first passages of a corpus."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from agentgym_ig.errors import CorpusError
from agentgym_ig.indexes.build import BuildOptions, Kind, build_index
from agentgym_ig.indexes.sources import count_rows, read_corpus

SAMPLE_SECONDS = 5.0
"""How long the sample may take to build, about."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a build is expected to need."""

    passages: int
    memory_bytes: int
    disk_bytes: int
    """At its end; while it runs, as much again."""
    seconds: float
    sampled: int
    """Passages that were built to find out."""


def estimate(source: Path | str, kind: Kind | Callable[[int], Kind]) -> Estimate:
    """Build growing samples of a corpus, and carry their growth on to its whole length.

    Time and disk are carried on in proportion; memory is what the kind says it will need. Raises what reading the
    corpus or building from it raises.
    """
    count = count_rows(source)
    if not count:
        raise CorpusError(f"{source} does not say how many passages it has, or has none; give a file with some")
    chosen = kind(count) if callable(kind) else kind
    sizes: list[tuple[int, float, int]] = []
    with tempfile.TemporaryDirectory() as scratch:
        rows = 64
        while True:
            folder = Path(scratch) / f"{rows}"
            passages = list(islice(read_corpus(source), rows))
            started = time.perf_counter()
            build_index(passages, folder, chosen, BuildOptions())
            seconds = time.perf_counter() - started
            disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            sizes.append((len(passages), seconds, disk))
            if len(passages) < rows or rows >= count or seconds > SAMPLE_SECONDS / 4:
                break
            rows *= 4
        memory = chosen.memory_needed(count, folder)
    last, before = sizes[-1], sizes[-2] if len(sizes) > 1 else (0, 0.0, 0)
    per_passage = max(last[1] - before[1], 0.0) / max(last[0] - before[0], 1)  # what is paid once cancels out
    seconds = last[1] + per_passage * max(count - last[0], 0)
    return Estimate(count, memory, last[2] * max(count, 1) // last[0], seconds, last[0])
