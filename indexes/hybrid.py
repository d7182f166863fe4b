"""Several indexes as one, by reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""

from __future__ import annotations

from collections.abc import Sequence

from agentgym_ig.errors import IndexUnusable
from agentgym_ig.indexes.base import Index, check_k, ranked
from agentgym_ig.types import Hit, Passage


class HybridIndex:
    """Asks every part, and scores a passage with the sum of `1 / (constant + rank)` over the parts that found it.

    Args:
        parts: two or more indexes over the same passages, such as BM25 and a dense one.
        depth: passages asked of each part, or k where that is more.
        constant: the paper's k, 60; the larger, the less the first ranks stand out.

    Raises IndexUnusable when two parts are known to hold different passages.
    """

    def __init__(self, parts: Sequence[Index], *, depth: int = 100, constant: float = 60.0) -> None:
        if len(parts) < 2 or depth < 1 or constant < 0:
            raise ValueError(
                f"{len(parts)} parts, depth={depth}, constant={constant}: wanted 2 or more, 1 or more, >= 0"
            )
        corpora = {sha for part in parts if (sha := getattr(part, "corpus_sha256", None)) is not None}
        if len(corpora) > 1:
            raise IndexUnusable(f"the parts were built over different corpora ({', '.join(sorted(corpora))})")
        self.parts, self.depth, self.constant = list(parts), depth, constant
        self.corpus_sha256 = next(iter(corpora), None)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Index.search`."""
        check_k(k)
        found = [part.search(queries, max(self.depth, k)) for part in self.parts]
        return [self._fuse(lists)[:k] for lists in zip(*found, strict=True)]

    def _fuse(self, lists: Sequence[Sequence[Hit]]) -> list[Hit]:
        scores: dict[str, float] = {}
        passages: dict[str, Passage] = {}
        for hits in lists:
            for rank, hit in enumerate(hits, 1):
                scores[hit.passage.id] = scores.get(hit.passage.id, 0.0) + 1 / (self.constant + rank)
                passages[hit.passage.id] = hit.passage
        return ranked(passages.values(), (scores[name] for name in passages))
