"""Batches that the tests of the losses share: a golden one, and random ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

TIGHT: dict[str, Any] = {"atol": 2e-6, "rtol": 0.0}


def tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Four episodes as in test_advantages; 0 stands off the mask. Columns are tokens, tool tokens included.
MASK = torch.tensor(
    [[1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 0, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
).bool()
ADVANTAGES = tensor(
    [
        [2.016395, 2.016395, 0, 0, 0.473619, 0, 0.987877, 0.987877],
        [0.238329, 0.238329, 0, 0.109764, 0, 0, 0, 0],
        [-0.608262, 0, 0.548821, 0.548821, 0, 0, 0, 0],
        [-1.646462, -1.646462, 0, 0, 0, 0, 0, 0],
    ]
)
LOG_RATIO = tensor(
    [
        [0.1, -0.1, 0, 0, 0.3, 0, -0.3, 0],
        [0.05, 0.25, 0, -0.25, 0, 0, 0, 0],
        [0, 0, 0.4, -0.4, 0, 0, 0, 0],
        [0.2, -0.5, 0, 0, 0, 0, 0, 0],
    ]
)


@dataclass(frozen=True)
class Batch:
    """(B, T) each, float64; everywhere finite."""

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logprobs, self.old, self.advantages

    def over(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs, each changed."""
        return change(self.logprobs), change(self.old), change(self.advantages)

    def __getitem__(self, rows: Any) -> "Batch":
        return Batch(self.logprobs[rows], self.old[rows], self.advantages[rows], self.mask[rows])


# Steps of a 64th: none lands on the edge of a clip, where a gradient has two values.
def _numbers(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(low * 64, high * 64).map(lambda i: i / 64)


@st.composite
def batches(draw: st.DrawFn, *, per_turn: bool = False) -> Batch:
    """Up to five episodes of up to six tokens, some or all of them masked; one advantage each, or one per token."""
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))

    def table(elements: st.SearchStrategy[Any], columns: int = width) -> Tensor:
        row = st.lists(elements, min_size=columns, max_size=columns)
        return tensor(draw(st.lists(row, min_size=height, max_size=height)))

    old = table(_numbers(-5, 0))
    advantages = table(_numbers(-2, 2), width if per_turn else 1).expand(height, width).contiguous()
    return Batch(old + table(_numbers(-3, 3)), old, advantages, table(st.booleans()).bool())


def gradient(loss: Any, batch: Batch, **options: Any) -> Tensor:
    """Of the summed loss by the log-probabilities."""
    own = batch.logprobs.clone().requires_grad_()
    loss(own, batch.old, batch.advantages, mask=batch.mask, **options).sum().backward()
    assert own.grad is not None
    return own.grad
