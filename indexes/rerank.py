"""A second look at what another index found, by a cross-encoder that reads query and passage together."""

from __future__ import annotations

from collections.abc import Sequence

from agentgym_ig.errors import IndexUnusable, SearchFailed
from agentgym_ig.indexes.base import Index, check_k, ranked
from agentgym_ig.indexes.encoders import EXTRA, best_device, model_folder, quiet_loading
from agentgym_ig.text import clean
from agentgym_ig.types import Hit, texts


class RerankedIndex:
    """The hits of another index, in the order of a cross-encoder's scores (its logits: no two of them saturate).

    Args:
        index: finds the passages.
        model: a cross-encoder of sentence-transformers: a folder, or its full name on the hub.
        depth: passages that are read for each query, or k where that is more.
        device: as torch names it; None takes a GPU if there is one.

    Raises IndexUnusable when there is no such model, or it gives other than one score.
    """

    def __init__(self, index: Index, model: str, depth: int = 50, device: str | None = None) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth}: let the cross-encoder read at least 1 passage")
        folder = model_folder(model)
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise ImportError(f"reranking needs {EXTRA}") from error
        with quiet_loading():
            self._model = CrossEncoder(
                str(folder),
                device=device or best_device(),
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            )
        if self._model.num_labels != 1:
            raise IndexUnusable(f"{model} gives {self._model.num_labels} scores, wanted 1; choose a model for ranking")
        self.index, self.depth = index, depth
        self.corpus_sha256: str | None = getattr(index, "corpus_sha256", None)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Index.search`."""
        from torch.nn import Identity

        check_k(k)
        found = self.index.search(queries, max(self.depth, k))
        pairs = [
            (clean(query), clean(text))
            for query, hits in zip(queries, found, strict=True)
            for text in texts([hit.passage for hit in hits])
        ]
        if not pairs:
            return found
        try:
            scores = self._model.predict(pairs, activation_fn=Identity(), show_progress_bar=False).tolist()
        except RuntimeError as error:  # what torch raises when a device fails or its memory is full
            raise SearchFailed(f"reranking failed: {error}") from error
        remaining = iter(scores)
        return [ranked([hit.passage for hit in hits], [next(remaining) for _ in hits])[:k] for hits in found]
