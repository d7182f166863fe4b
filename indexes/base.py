"""The contract of every index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from agentgym_ig.types import Hit


@runtime_checkable
class Index(Protocol):
    """Anything that can be searched."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The best `k` passages for each query, best first; equal scores are ordered by passage id.

        Always batched: one inner list per query, in order. A query that matches fewer passages gives fewer
        hits. Raises ValueError for k < 1 and SearchFailed when the search itself could not be carried out.
        """
        ...
