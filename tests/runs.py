"""Small training runs for the tests: the shipped policy in a small world, and what can be read of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from agentgym_ig.envs.channels import SearchCost
from agentgym_ig.envs.rollout import VectorSearch
from agentgym_ig.envs.wrappers import add_channel
from agentgym_ig.records import METRICS_FILE
from agentgym_ig.trainers import Recipe, Run, TrainConfig, recipe
from agentgym_ig.trainers.collect import beside, longest_episode, read
from agentgym_ig.trainers.experience import Batch
from agentgym_ig.trainers.learner import Learner
from agentgym_ig.trainers.loop import prepare
from agentgym_ig.trainers.tinywiki import WARM_START, load_policy_model, tiny_policy
from agentgym_ig.trainers.update import Update
from agentgym_ig.types import Trajectory
from tests.tiny import play, tiny_env

SMALL = TrainConfig(steps=4, questions_per_step=3, group_size=4, learning_rate=5e-4, micro_batch=64, save_every=1)


def fresh(
    out: Path,
    chosen: str | Recipe = "igpo",
    *,
    env: VectorSearch | None = None,
    adapt: Callable[[Any], Any] | None = None,
    **changes: Any,
) -> Run:
    """A run from the shipped policy, `adapt`ed; changes are those of its settings."""
    model, tokenizer = load_policy_model(WARM_START)
    policy = tiny_policy(adapt(model) if adapt else model, tokenizer)
    named = recipe(chosen) if isinstance(chosen, str) else chosen
    return Run(policy, env or tiny_env(12), named, replace(SMALL, **changes), out)


def begun(run: Run, *, rate: float) -> Learner:
    """The run's learner with plain gradient descent, so that a step shows its gradient."""
    learner, _ = prepare(run)
    optimizer = torch.optim.SGD([{"params": own} for own in learner.parameters], lr=rate)
    return replace(learner, optimizer=optimizer, schedule=get_scheduler("constant", optimizer))


def updating(run: Run, learner: Learner) -> Update:
    return Update(learner, run.recipe, run.config, temperature=run.policy.temperature, longest=longest_episode(run))


def scored(run: Run, learner: Learner | None = None, episodes: list[Trajectory] | None = None) -> Batch:
    """Sixteen episodes of four questions as the run's estimator sees them."""
    batch = read(run, episodes or play(16), 0)
    assert batch is not None
    return beside(batch, learner, run.config.micro_batch) if learner else batch


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(own, other[name]) for name, own in one.items())


def log(out: Path) -> list[dict[str, Any]]:
    """A run's metrics without its times."""
    rows = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def paid_env(num_envs: int = 12, weight: float = 0.1) -> VectorSearch:
    """The small world, where searches are paid for, so that outcomes differ within nearly every question."""
    return add_channel(tiny_env(num_envs), SearchCost(), weight=weight)
