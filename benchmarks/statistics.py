"""Means with confidence intervals, and where a learning curve first reaches a level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student


def mean_and_interval(values: Sequence[float | None]) -> list[float | None] | None:
    """Mean and half-width of its 95 % confidence interval (Student's t), which one value alone has not.

    None where any value is missing: the mean of the others would flatter.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if len(known) == 1:
        return [round(known[0], 4), None]
    half = float(student.ppf(0.975, len(known) - 1)) * stdev(known) / len(known) ** 0.5
    return [round(fmean(known), 4), round(half, 4)]


def rollouts_to(curve: Sequence[Mapping[str, Any]], level: float, metric: str = "id_em") -> float | None:
    """Episodes until the metric first reaches a level, interpolated between evaluations; None if it never does."""
    if curve[0][metric] >= level:
        return float(curve[0]["rollouts"])
    for before, after in pairwise(curve):
        if after[metric] >= level:
            share = (level - before[metric]) / (after[metric] - before[metric])
            return float(before["rollouts"] + share * (after["rollouts"] - before["rollouts"]))
    return None
