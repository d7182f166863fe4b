"""Means with confidence intervals, and where a learning curve first reaches a level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student


def mean_and_interval(values: Sequence[float]) -> list[float] | None:
    """Mean and half-width of its 95 % confidence interval (Student's t); the width is nan for one value alone."""
    if not values:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return [round(fmean(values), 4), float("nan") if half is None else round(half, 4)]


def rollouts_to(curve: Sequence[Mapping[str, Any]], level: float, metric: str = "id_em") -> float | None:
    """Episodes until the metric first reaches a level, interpolated between evaluations; None if it never does."""
    if curve[0][metric] >= level:
        return float(curve[0]["rollouts"])
    for before, after in pairwise(curve):
        if after[metric] >= level:
            share = (level - before[metric]) / (after[metric] - before[metric])
            return float(before["rollouts"] + share * (after["rollouts"] - before["rollouts"]))
    return None
