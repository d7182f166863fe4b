"""Recipes: a method by name, as the estimator that turns a batch of trajectories into advantages.

`RECIPES` holds ours with the settings of the papers. A user's own `Estimator` is passed to `Run` in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agentgym_ig.trainers.advantages import grpo_advantages, igpo_advantages
from agentgym_ig.types import Trajectory


class Estimator(Protocol):
    """From a batch of trajectories to one advantage per turn. Make it a dataclass, so that a run notes its settings."""

    @property
    def needs_belief(self) -> bool:
        """Whether the episodes' beliefs and their `info_gain` channel must have been filled in."""
        ...

    @property
    def log_gain(self) -> bool:
        """Whether gains are differences of log-probabilities or of probabilities."""
        ...

    def __call__(self, episodes: Sequence[Trajectory], /) -> Tensor:
        """(B, K) advantages; what stands after an episode's last turn is not read."""
        ...


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """GRPO: the outcome, standardised among the episodes of a question, for every turn."""

    eps: float = 1e-6
    """Added to the group's standard deviation."""

    needs_belief = False
    log_gain = True

    def __call__(self, episodes: Sequence[Trajectory], /) -> Tensor:
        """(B, K) advantages."""
        turns = max(len(episode.turns) for episode in episodes)
        return grpo_advantages(_outcomes(episodes), _groups(episodes), eps=self.eps)[:, None].expand(-1, turns)


@dataclass(frozen=True, kw_only=True)
class IGPO:
    """IGPO: information gain on every searching turn and the outcome on the last, each standardised by itself."""

    log_gain: bool = True
    """Gains in log-probability (the paper's v2), not in probability (v1)."""
    joint: bool = False
    """Gains and outcomes in one standardisation (v1)."""
    gamma: float = 1.0
    """Discount per turn."""
    gain_weight: float = 1.0
    """Weight of the standardised gains."""

    needs_belief = True

    def __call__(self, episodes: Sequence[Trajectory], /) -> Tensor:
        """(B, K) advantages. Raises ValueError for an episode whose belief has not been read."""
        for episode in episodes:
            if len(episode.turns) > 1 and not episode.belief:
                raise ValueError(
                    f"the belief of an episode of {episode.question.id!r} has not been read; score it first"
                )
        width = max(len(episode.turns) for episode in episodes)
        gains = [episode.channel("info_gain") + [None] * (width - len(episode.turns)) for episode in episodes]
        return igpo_advantages(
            torch.tensor([[gain or 0.0 for gain in row] for row in gains], dtype=torch.float64),
            torch.tensor([[gain is not None for gain in row] for row in gains]),
            _outcomes(episodes),
            torch.tensor([len(episode.turns) - 1 for episode in episodes]),
            _groups(episodes),
            gamma=self.gamma,
            joint=self.joint,
            gain_weight=self.gain_weight,
        )


def _outcomes(episodes: Sequence[Trajectory]) -> Tensor:
    return torch.tensor([episode.total("outcome") for episode in episodes], dtype=torch.float64)


def _groups(episodes: Sequence[Trajectory]) -> Tensor:
    return torch.tensor([episode.group for episode in episodes])


RECIPES: dict[str, Estimator] = {"grpo": GRPO(), "igpo": IGPO()}


def recipe(name: str) -> Estimator:
    """The recipe of that name. Raises ValueError, listing all names, where there is none."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(sorted(RECIPES))}")
    return RECIPES[name]
