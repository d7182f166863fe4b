"""Where information gain pays: episodes that IGPO needs over those that GRPO needs, cell by cell, in the sparse corner.

A cell is a number of hops, a success at the start and a group size. Its level is half of the mean final exact match of
whichever recipe ends higher, fixed before any test run was played. A run that never reaches the level counts with all
the episodes it had, so that the ratio then is a bound and not a figure; how many did so is noted beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.statistics import mean_and_interval, rollouts_to

Row = Mapping[str, Any]


def cell(grpo: Sequence[Row], igpo: Sequence[Row]) -> dict[str, Any]:
    """One cell, from the runs of both recipes with the same seeds."""
    finals = {name: [row["final"]["id_em"] for row in rows] for name, rows in (("grpo", grpo), ("igpo", igpo))}
    level = max(map(fmean, finals.values())) / 2
    logs = [math.log(_episodes(b, level) / _episodes(a, level)) for a, b in zip(grpo, igpo, strict=True)]
    return {
        "level": round(level, 4),
        "ratio": _ratio(logs),
        "log_ratios": [round(value, 4) for value in logs],
        "never_reached": {
            name: sum(rollouts_to(row["curve"], level) is None for row in rows)
            for name, rows in (("grpo", grpo), ("igpo", igpo))
        },
        **{
            f"{name}_{metric}": mean_and_interval([row["final"][metric] for row in rows])
            for name, rows in (("grpo", grpo), ("igpo", igpo))
            for metric in ("id_em", "ood_em", "id_found")
        },
        "start_em": round(fmean(row["curve"][0]["id_em"] for row in grpo), 4),
        "start_found": round(fmean(row["curve"][0]["id_found"] for row in grpo), 4),
        "grpo_no_signal": mean_and_interval([row["no_signal"] for row in grpo]),
        "igpo_no_signal": mean_and_interval([row["no_signal"] for row in igpo]),
        **{
            f"{metric}_over_grpo": mean_and_interval(
                [b["final"][metric] - a["final"][metric] for a, b in zip(grpo, igpo, strict=True)]
            )
            for metric in ("id_em", "ood_em")
        },
    }


def _episodes(row: Row, level: float) -> float:
    reached = rollouts_to(row["curve"], level)
    # Before the first evaluation nobody looked, so that a level which the start has counts as reached there.
    ended, looked = (float(row["curve"][place]["rollouts"]) for place in (-1, 1))
    return max(ended if reached is None else reached, looked)


def _ratio(logs: Sequence[float]) -> list[float | None]:
    """Geometric mean, and the ends of its 95 % interval (Student's t over the logarithms), which one value has not."""
    mean, half = mean_and_interval(list(logs)) or (0.0, None)
    mean = mean or 0.0
    ends = [None, None] if half is None else [round(math.exp(mean - half), 3), round(math.exp(mean + half), 3)]
    return [round(math.exp(mean), 3), *ends]


def corner(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All cells together: each counts once, and the intervals are over cells."""
    means = [fmean(own["log_ratios"]) for own in cells.values()]
    gaps = {
        metric: mean_and_interval([own[f"{metric}_over_grpo"][0] for own in cells.values()])
        for metric in ("id_em", "ood_em")
    }
    return {
        "igpo_rollouts_ratio_sparse": _ratio(means),
        "id_em_over_grpo": gaps["id_em"],
        "ood_em_over_grpo": gaps["ood_em"],
        "never_reached": {name: sum(own["never_reached"][name] for own in cells.values()) for name in ("grpo", "igpo")},
    }
