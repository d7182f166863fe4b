"""How sure a figure is: bootstrap confidence intervals, paired comparison of two runs, and pass@k.

Everything is over questions, the unit that was drawn; several tries at one question are averaged before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
"""Resamples of a bootstrap: the ends of a 95 % interval then move by about 4 % of its width between seeds."""
LEVEL = 0.95
EQUAL = 1e-12
"""Two values so near are equal: means over tries differ by as much with the order of their terms."""

Interval = tuple[float, float]


def bootstrap_interval(
    strata: Sequence[ArrayLike], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the plain mean of the strata's means.

    strata: one sequence of values per dataset, one value per question; each is resampled on its own, as the
    datasets were chosen and the questions drawn. Where all values of a stratum are equal it adds no width: an
    interval around 0 or 1 of a few questions is too narrow.

    Raises ValueError for no values, or values that are not finite.
    """
    from scipy.stats import bootstrap

    arrays = [_values(own) for own in strata]
    if not arrays:
        raise ValueError("no values to make an interval of")
    fixed = sum(float(own.mean()) for own in arrays if _constant(own)) / len(arrays)
    moving = [own for own in arrays if not _constant(own)]
    if not moving:
        return fixed, fixed

    def mean_of_means(*samples: NDArray[np.float64], axis: int) -> Any:
        return fixed + sum(own.mean(axis=axis) for own in samples) / len(arrays)

    found = bootstrap(
        moving,
        mean_of_means,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // max(map(len, moving))),
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _values(own: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(own, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"found {array.size} values of shape {array.shape}, wanted one or more finite ones in a row")
    return array


def _constant(own: NDArray[np.float64]) -> bool:
    return bool((own == own[0]).all())


@dataclass(frozen=True)
class Comparison:
    """How a run A differs from a run B on the same questions."""

    difference: float
    """Mean of A less mean of B."""
    interval: Interval
    """95 % paired bootstrap interval of it."""
    a_only: int
    b_only: int
    """Questions on which A alone, and B alone, was better."""
    p: float
    """Two-sided p-value of the exact McNemar test for values of 0 and 1: of the sign test, which it is, for others."""


def compare(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], *, seed: int = 0) -> Comparison:
    """Compare two runs by the values of the same questions, dataset → one value per question in the same order.

    The difference is the plain mean over datasets, as in a suite's table, and its interval resamples questions with
    both their values. Raises ValueError where datasets or counts differ.
    """
    from scipy.stats import binomtest

    if {name: len(own) for name, own in a.items()} != {name: len(own) for name, own in b.items()}:
        raise ValueError("the two runs were asked other questions; compare runs over the same ones")
    gaps = [np.asarray(a[name], dtype=np.float64) - np.asarray(b[name], dtype=np.float64) for name in a]
    a_only = sum(int((gap > EQUAL).sum()) for gap in gaps)
    b_only = sum(int((gap < -EQUAL).sum()) for gap in gaps)
    return Comparison(
        float(np.mean([gap.mean() for gap in gaps])),
        bootstrap_interval(gaps, seed=seed),
        a_only,
        b_only,
        float(binomtest(a_only, a_only + b_only).pvalue) if a_only + b_only else 1.0,
    )


def pass_at(k: int, wins: int, tries: int) -> float:
    """Unbiased estimate of the chance that one of k tries wins, from `wins` of `tries` (Chen et al. 2021, eq. 1).

    Raises ValueError unless 1 <= k <= tries and 0 <= wins <= tries.
    """
    if not (1 <= k <= tries and 0 <= wins <= tries):
        raise ValueError(f"k={k}, wins={wins} and tries={tries}: wanted 1 <= k <= tries and 0 <= wins <= tries")
    return 1.0 - comb(tries - wins, k) / comb(tries, k)
