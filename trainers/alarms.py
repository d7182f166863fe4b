"""Alarms: what has gone wrong in a run, read from its metrics alone.

Entropy, lengths, turns and searches are compared with the run's own beginning, so that no level has to be known for a
model or a task. The thresholds are choices, not measurements: an alarm asks for a look and stops nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """When a metric's mean over the last window, against its mean over the first, is an alarm. ValueError if senseless.

    A share or a multiple is of the first window's mean, and is itself no alarm: only what lies beyond it.
    """

    window: int = 10
    """Steps averaged at either end; no alarm before there are two windows."""
    entropy_floor: float = 0.2
    """Share below which entropy has collapsed. Lower than `floor`: a policy that learns grows surer."""
    floor: float = 0.5
    """Share below which tokens, turns or searches have collapsed."""
    ceiling: float = 2.0
    """Multiple above which a metric has exploded."""
    level: float = 0.5
    """Malformed turns per episode, or skipped updates per step, up to which a rise is none: both begin near 0."""

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window={self.window}; wanted a whole number of steps, 1 or more")
        if not (0 < self.entropy_floor < 1 and 0 < self.floor < 1):
            raise ValueError(f"entropy_floor={self.entropy_floor}, floor={self.floor}; wanted shares between 0 and 1")
        if not 1 < self.ceiling < math.inf:
            raise ValueError(f"ceiling={self.ceiling}; wanted a multiple above 1")
        if not 0 <= self.level < math.inf:
            raise ValueError(f"level={self.level}; wanted 0 or more")


DEFAULTS = AlarmConfig()


@dataclass(frozen=True)
class _Watch:
    """What a metric is called and counted in, and what to try when it moves too far; None where that is no alarm."""

    metric: str
    unit: str
    collapse: str | None = None
    explosion: str | None = None

    def advice(self, name: str) -> str | None:
        return self.collapse if name.endswith("_collapse") else self.explosion


_SKIM = "read some episodes"
_WATCHED = {
    "entropy": _Watch(
        "entropy",
        "nats per token",
        "the policy hardly explores any more: lower the learning rate, raise the upper clip, or add a KL term",
        "the policy drifts towards noise: lower the learning rate or the upper clip, or add a KL term",
    ),
    "length": _Watch(
        "tokens_per_episode",
        "tokens per episode",
        f"{_SKIM}: if reasoning went, check that no penalty or averaging of the loss favours short ones",
        f"{_SKIM}: if they ramble or repeat, average the loss over tokens or add a penalty for overlong ones",
    ),
    "turns": _Watch(
        "turns",
        "turns per episode",
        f"{_SKIM}: if answers come too early, lower the learning rate or add a reward per turn",
        f"{_SKIM}: if they put off the answer, discount later rewards or allow fewer turns",
    ),
    "searches": _Watch(
        "searches",
        "searches per episode",
        "the policy answers from memory: check that searching pays, add a reward per turn, or add a KL term",
    ),
    "malformed": _Watch(
        "malformed",
        "malformed turns per episode",
        explosion=f"{_SKIM}: lower the learning rate, add a KL term, or allow more tokens if turns are cut off",
    ),
    "skipped": _Watch(
        "skipped_updates",
        "skipped updates per step",
        explosion="the run hardly learns: see the metrics of the loss for the cause, and lower the learning rate",
    ),
}


@dataclass(frozen=True)
class Alarm:
    """One alarm: `found`, the mean over the last window, is too far from `before`, the mean over the first.

    name: "entropy_collapse", "entropy_explosion", the same for length and turns, "searches_collapse",
        "malformed_explosion" or "skipped_explosion".
    """

    name: str
    found: float
    before: float

    def __str__(self) -> str:
        """What moved from where to where, and what to try."""
        watch = _WATCHED[self.name.rpartition("_")[0]]
        moved = "fell" if self.found < self.before else "rose"
        return (
            f"{self.name}: {moved} from {self.before:.3g} to {self.found:.3g} {watch.unit}; {watch.advice(self.name)}"
        )


def alarms(history: Sequence[Mapping[str, Any]], config: AlarmConfig = DEFAULTS) -> list[Alarm]:
    """The alarms that hold at the last row of a run's metrics, at most one for each metric.

    history: all rows of `metrics.jsonl` from the first step on, one a step. Rows with no episodes are passed over;
    so is, for a metric, a row that lacks it or holds None or a value that is not finite. What remains of a metric
    makes its windows. Metrics read: entropy (nats per sampled token), tokens_per_episode, turns, searches,
    malformed, skipped_updates.

    They follow from the rows and nothing else: a resumed run raises the same ones as a run that was never stopped.
    """
    played = [row for row in history if row.get("episodes", 1)]
    found = (_alarm(name, watch, _values(played, watch.metric), config) for name, watch in _WATCHED.items())
    return [alarm for alarm in found if alarm]


def _values(rows: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    present = [row[metric] for row in rows if row.get(metric) is not None]
    return [value for value in present if math.isfinite(value)]


def _alarm(name: str, watch: _Watch, values: Sequence[float], config: AlarmConfig) -> Alarm | None:
    if len(values) < 2 * config.window:
        return None
    before, found = fmean(values[: config.window]), fmean(values[-config.window :])
    floor = config.entropy_floor if name == "entropy" else config.floor
    level = config.level if name in ("malformed", "skipped") else 0.0
    if watch.collapse and found < floor * before:
        return Alarm(f"{name}_collapse", found, before)
    if watch.explosion and found > max(config.ceiling * before, level):
        return Alarm(f"{name}_explosion", found, before)
    return None
