"""How many logits a piece of code holds at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestLogits(TorchDispatchMode):
    """Notes the most rows of any tensor whose last axis is the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, out.numel() // self.vocabulary)
        return out
