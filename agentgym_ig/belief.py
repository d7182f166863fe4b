"""The belief in the gold answer, and the information gain made of it (IGPO, arXiv 2510.14967).

A belief is the mean log-probability, in nats, of the gold answer's tokens when the policy is forced to answer.
An episode has one before its first turn and one after every reply of the environment; each reply's gain is the
change that it brought, and belongs to the turn that asked for it. The answering turn has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from agentgym_ig.types import Trajectory

ALIAS_POLICIES = ("first", "max", "mean", "logsumexp")


def combine_aliases(beliefs: Sequence[float], policy: str) -> float:
    """One belief from those in several accepted answers (nats).

    first: the first answer's (as the IGPO release). max, mean: as they say. logsumexp: of all of them. No belief,
    or one that is not finite, makes the whole not a number. Raises ValueError for another policy.
    """
    counted = beliefs[:1] if policy == "first" else beliefs
    if policy in ALIAS_POLICIES and not (counted and all(map(math.isfinite, counted))):
        return math.nan  # max() would hide it
    if policy == "first":
        return beliefs[0]
    if policy == "max":
        return max(beliefs)
    if policy == "mean":
        return math.fsum(beliefs) / len(beliefs)
    if policy == "logsumexp":
        highest = max(beliefs)
        return highest + math.log(math.fsum(math.exp(belief - highest) for belief in beliefs))
    raise ValueError(f"unknown alias policy {policy!r}; choose one of {', '.join(ALIAS_POLICIES)}")


def information_gains(beliefs: Sequence[float], *, log: bool) -> list[float]:
    """The change from each belief to the next, one value fewer than there are beliefs.

    log: differences of log-probabilities (the paper's v2, eqs. 3 and 4), else of probabilities (v1). Raises
    ValueError for a belief that is not a finite number.
    """
    if not all(map(math.isfinite, beliefs)):
        raise ValueError(f"beliefs {list(beliefs)} must be finite numbers of nats")
    values = list(beliefs) if log else [math.exp(belief) for belief in beliefs]
    return [after - before for before, after in pairwise(values)]


def with_belief(episode: Trajectory, belief: Sequence[float], *, log: bool = True) -> Trajectory:
    """The episode with its belief, and with the gains as the channel `info_gain` of the turns that have one."""
    gains = information_gains(belief, log=log)
    turns = []
    for number, turn in enumerate(episode.turns):
        rewards = {name: value for name, value in turn.rewards.items() if name != "info_gain"}
        if number < len(gains):
            rewards["info_gain"] = gains[number]
        turns.append(replace(turn, rewards=rewards))
    return replace(episode, belief=tuple(belief), turns=tuple(turns))
