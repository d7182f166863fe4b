"""Episodes of questions as tensors, and what the tests of the estimators draw at random."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

Row = Sequence[float | None]

EIGHTHS = st.integers(-80, 80).map(lambda i: i / 8)
"""So that adding a constant or doubling is exact."""


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ragged(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Rows to values and mask, both padded; None marks a place without a value."""
    width = max(map(len, rows))
    padded = [[*row, *[None] * (width - len(row))] for row in rows]
    return f64([[value or 0.0 for value in row] for row in padded]), torch.tensor(
        [[value is not None for value in row] for row in padded]
    )


def assert_golden(got: Tensor, expected: Any) -> None:
    """Within the rounding of a golden table. Shorter rows are padded with 0."""
    if isinstance(expected[0], list):
        expected = ragged(expected)[0].tolist()
    assert_close(got, f64(expected), atol=2e-6, rtol=0.0)


def plain_z(pool: Sequence[float], *, ddof: int, floor: float = 0.0, eps: float = 1e-6) -> Callable[[float], float]:
    """The plainly right standardisation against a pool."""
    mean = statistics.fmean(pool)
    variance = math.fsum((value - mean) ** 2 for value in pool) / max(len(pool) - ddof, 1)
    return lambda value: (value - mean) / (math.sqrt(variance + floor) + eps)
