"""The contract of every index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from agentgym_ig.types import Hit, Passage


@runtime_checkable
class Index(Protocol):
    """Anything that can be searched."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The best `k` passages for each query, best first; equal scores are ordered by passage id.

        Always batched: one inner list per query, in order. A query that matches fewer passages gives fewer
        hits. Raises ValueError for k < 1 and SearchFailed when the search itself could not be carried out.
        """
        ...


@runtime_checkable
class StoredIndex(Index, Protocol):
    """An index that keeps its passages itself, as all that are built do."""

    corpus_sha256: str | None
    """Which passages it was built over: the hash of them all, where it is known."""

    def __len__(self) -> int:
        """How many passages there are."""
        ...

    def passages(self) -> Iterator[Passage]:
        """All passages, in the order in which they were indexed."""
        ...


make_hit = partial(tuple.__new__, Hit)
"""A hit from a pair of passage and score, at a third of the cost of `Hit(...)`: a search makes thousands."""


def check_k(k: int) -> None:
    """Raise ValueError for a number of passages that no index can give."""
    if k < 1:
        raise ValueError(f"k={k}: ask for at least 1 passage")


def ranked(passages: Iterable[Passage], scores: Iterable[float]) -> list[Hit]:
    """Hits, best first, equal scores by passage id."""
    hits = list(map(Hit, passages, scores))
    return sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))
