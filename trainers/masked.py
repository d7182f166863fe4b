"""Per-token tensors with a mask: checked once, and read nowhere off the mask."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

FINITE = sys.float_info.max

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before the exponential, as verl does. Beyond it they have no gradient."""


def on_mask(mask: Tensor | None, /, **named: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The mask, all true for None, and each of the named tensors with 0 off it.

    All have one shape. What stands off the mask, nan and inf included, reaches neither a value nor a gradient.
    Raises ValueError for unequal shapes or a mask that is not bool, FloatingPointError for a value on the mask that
    is not finite: the first is a mistake in the program, the second something that a training step may run into.
    """
    tensors = list(named.values())
    shape = tensors[0].shape
    if any(each.shape != shape for each in tensors):
        found = ", ".join(f"{name} {tuple(each.shape)}" for name, each in named.items())
        raise ValueError(f"shapes are {found}; they must be equal")
    if mask is None:
        mask = torch.ones_like(tensors[0], dtype=torch.bool)
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; wanted torch.bool {tuple(shape)}")
    filled = [each.masked_fill(~mask, 0.0) for each in tensors]
    for name, each in zip(named, filled, strict=True):
        if not torch.isfinite(each).all():
            raise FloatingPointError(f"{name}: a value on the mask is not finite")
    return mask, filled


def bounded(log_ratio: Tensor, bound: float = MAX_LOG_RATIO) -> Tensor:
    """Log-ratio clamped to ± bound."""
    return log_ratio.clamp(-bound, bound)


def require(setting: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low < value <= high."""
    if not low < value <= high:
        raise ValueError(f"{setting}={value}; wanted above {low:g} and at most {high:g}")
