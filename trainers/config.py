"""The settings of a training run beside its recipe."""

from __future__ import annotations

from dataclasses import dataclass

from agentgym_ig.belief import ALIAS_POLICIES

SCHEDULES = ("constant_with_warmup", "linear", "cosine")
"""How the learning rate goes on after its warm-up: stays, or falls to 0 in a line or half a cosine."""

_AT_LEAST_ONE = ("steps", "questions_per_step", "updates_per_step", "epochs", "micro_batch", "save_every", "keep")
_AT_LEAST_ZERO = ("warmup_steps", "replay", "evaluate_every", "max_skipped_updates")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run's settings beside its recipe. The defaults are those of the IGPO paper where it states them."""

    steps: int = 100
    """Batches of episodes."""
    questions_per_step: int = 32
    group_size: int = 16
    """Episodes per question."""
    learning_rate: float = 1e-6
    critic_learning_rate: float = 1e-5
    """Of PPO's value function."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    schedule: str = "constant_with_warmup"
    max_grad_norm: float = 1.0
    updates_per_step: int = 1
    """Optimiser steps that a batch is cut into, by episodes."""
    epochs: int = 1
    """How often each step goes through its batch."""
    replay: int = 0
    """Earlier batches that are learned from once more together with each new one."""
    aliases: str = "first"
    """Which of the accepted answers the belief is about; see `belief.combine_aliases`."""
    micro_batch: int = 16
    """Episodes per forward and backward pass: lower it if memory runs out; results stay the same."""
    bf16: bool = False
    """Forward passes in bfloat16; weights and optimiser keep their type, which should be float32."""
    gradient_checkpointing: bool = False
    """Less memory for a third more time in the update."""
    importance_cap: float = 0.0
    """Above 0: each token's policy loss is multiplied by how much likelier the trainer finds it than the engine that
    sampled it, at most this much (truncated importance sampling; 2 is usual). 0 for no correction."""
    max_skipped_updates: int = 10
    """Updates of a run that may be skipped because something in them was not finite; one more ends it."""
    evaluate_every: int = 10
    """Steps between evaluations; 0 for none."""
    save_every: int = 10
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} gives every advantage 0; use 2 or more")
        small = [f"{name}={getattr(self, name)}" for name in _AT_LEAST_ONE if getattr(self, name) < 1]
        if small:
            raise ValueError(f"{', '.join(small)} must be 1 or more")
        negative = [f"{name}={getattr(self, name)}" for name in _AT_LEAST_ZERO if getattr(self, name) < 0]
        if negative:
            raise ValueError(f"{', '.join(negative)} must be 0 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite")
        _check_cap(self.importance_cap)
        for name, allowed in {"schedule": SCHEDULES, "aliases": ALIAS_POLICIES}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        episodes = self.questions_per_step * self.group_size
        if episodes < self.updates_per_step:
            raise ValueError(f"{episodes} episodes cannot be cut into updates_per_step={self.updates_per_step}")


def _check_cap(importance_cap: float) -> None:
    if importance_cap and not 1 <= importance_cap < float("inf"):
        raise ValueError(f"importance_cap={importance_cap} must be 0 for none, or 1 or more and finite")
