"""Memory that runs out, by allocations that no machine can serve."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentgym_ig.errors import OutOfMemory
from agentgym_ig.lm.arguments import CACHE_NAMES
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.trainers import recipe, train
from agentgym_ig.trainers.loop import prepare, train_step
from agentgym_ig.trainers.losses import clipped_loss
from agentgym_ig.trainers.memory import Portion, ran_out
from tests.runs import fresh, log, same, weights


def too_much() -> None:
    torch.empty(2**60)


def greedy(logprobs: Tensor, old: Tensor, advantages: Tensor, *, limit: int, mask: Tensor | None = None) -> Tensor:
    """PPO's loss, in which more than `limit` episodes at once do not fit."""
    if len(logprobs) > limit:
        too_much()
    return clipped_loss(logprobs, old, advantages, mask=mask)


def run_of(out: Path, limit: int) -> Any:
    plain = replace(recipe("igpo"), loss=partial(greedy, limit=limit), kl=0.0, entropy=0.0)
    return fresh(out, plain, micro_batch=8, steps=2, save_every=2)


def test_an_update_goes_on_with_half_and_does_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, small = run_of(tmp_path / "run", 4), fresh(tmp_path / "small", run_of(tmp_path, 4).recipe, micro_batch=4)
    small = replace(small, config=replace(small.config, steps=2, save_every=2))
    with caplog.at_level(logging.WARNING):
        train(run)
        train(small)
    assert [own.getMessage() for own in caplog.records] == [
        "memory ran out in the update; it goes on with 4 episodes in a pass. To be safe, lower --micro-batch,"
        " --max-new-tokens or --max-turns; --gradient-checkpointing, --bf16 and --lora-rank help as well"
    ]
    for own, wanted in zip(log(run.out), log(small.out), strict=True):
        for name in ("policy_loss", "grad_norm", "tokens", "episodes", "cut"):
            assert own[name] == pytest.approx(wanted[name], abs=1e-5), name


def test_where_half_is_too_much_as_well_it_says_what_to_lower(tmp_path: Path) -> None:
    run = run_of(tmp_path, 3)
    before = weights(run.policy.model)
    with pytest.raises(OutOfMemory, match=r"in the update with 4 episodes in a pass; lower --micro-batch"):
        train(run)
    assert same(weights(run.policy.model), before)


@pytest.mark.parametrize("phase", ["rollout", "score"])
def test_the_other_phases_are_halved_too(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = fresh(tmp_path, "igpo", micro_batch=8)
    assert isinstance(run.policy, TransformersPolicy)
    run.policy.batch_size, run.policy.max_cached_tokens = 8, 0
    learner, _ = prepare(run)
    inner = run.policy.model.model.forward

    def forward(*args: Any, **own: Any) -> Any:
        caching = any(own.get(name) is not None for name in CACHE_NAMES)
        generating = caching and own["input_ids"].shape[1] == 1
        if generating == (phase == "rollout") and len(own["input_ids"]) > 4:
            too_much()
        return inner(*args, **own)

    monkeypatch.setattr(run.policy.model.model, "forward", forward)
    metrics = train_step(run, learner, 0)
    assert metrics["episodes"] == metrics["episodes_played"] == 12
    assert f"memory ran out in the {phase}; it goes on with 4 episodes" in caplog.text
    assert (learner.playing.size, learner.scoring.size) == ((4, 8) if phase == "rollout" else (8, 4))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="size"):
        Portion("score", 8).of(lambda size: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(OutOfMemory, match="in the score with 1 episodes"):
        Portion("score", 1).of(lambda size: too_much())
    assert ran_out(MemoryError())
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory"))
