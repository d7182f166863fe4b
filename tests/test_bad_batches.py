"""Batches that break estimators: groups of one, equal rewards, no gain, what is not finite. An error or a defined 0."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers import (
    GRPO,
    IGPO,
    PPO,
    RLOO,
    Batch,
    BeliefGAE,
    DrGRPO,
    GiGPO,
    GraphGPO,
    ReinforcePP,
    ReinforcePPBaseline,
    SelfGuide,
    Sum,
    TokenAdvantages,
)
from agentgym_ig.trainers.estimators import IGPO_FORMS
from agentgym_ig.types import Trajectory
from tests.runs import fresh, scored
from tests.tiny import play

OUTCOME_ONLY = (GRPO(), DrGRPO(), RLOO(), SelfGuide(), GiGPO(), GraphGPO(), ReinforcePPBaseline())
OTHERS = (*(IGPO(form=form) for form in IGPO_FORMS), BeliefGAE(), ReinforcePP(), PPO(), Sum(parts=(IGPO(), GiGPO())))
EVERY = (*OUTCOME_ONLY, *OTHERS)


def name(own: Any) -> str:
    return f"{type(own).__name__}-{getattr(own, 'form', '')}"


def made(episodes: list[Trajectory]) -> Batch:
    """A scored batch with all that any estimator reads."""
    own = scored(fresh(Path("unused"), "igpo"), episodes=episodes)
    praised = [
        replace(each, turns=tuple(with_reward(turn, self_guide=0.1) for turn in each.turns)) for each in own.episodes
    ]
    return replace(own, episodes=praised, values=own.old, reference=own.old, progress=0.75)


@cache
def usual() -> Batch:
    return made(play(16))


def with_reward(turn: Any, **rewards: float) -> Any:
    return replace(turn, rewards={**turn.rewards, **rewards})


def with_outcome(batch: Batch, values: list[float]) -> Batch:
    episodes = [
        replace(own, turns=(*own.turns[:-1], with_reward(own.turns[-1], outcome=value)))
        for own, value in zip(batch.episodes, values, strict=True)
    ]
    return replace(batch, episodes=episodes)


def on_turns(batch: Batch, given: Tensor | TokenAdvantages) -> Tensor:
    """The advantages that are read, and nothing else."""
    if isinstance(given, TokenAdvantages):
        return given.advantages[batch.tokens.sampled]
    width = torch.arange(given.shape[1])
    return given[width <= batch.last[:, None]]


@pytest.mark.parametrize("estimator", EVERY, ids=name)
def test_an_episode_alone_in_its_group_has_a_finite_advantage(estimator: Any) -> None:
    batch = usual()
    alone = replace(batch, episodes=[replace(own, group=place) for place, own in enumerate(batch.episodes)])
    alone = with_outcome(alone, [place % 3 / 2 for place in range(16)])
    given = on_turns(alone, estimator(alone))
    assert given.isfinite().all()
    if estimator in (GRPO(), DrGRPO(), RLOO(), ReinforcePPBaseline()):  # nothing to compare it with
        assert not given.any()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6])
@pytest.mark.parametrize("estimator", EVERY, ids=name)
def test_equal_rewards_say_nothing(estimator: Any, value: float) -> None:
    flat = with_outcome(usual(), [value] * 16)
    given = on_turns(flat, estimator(flat))
    assert given.isfinite().all()
    if estimator in (GRPO(), DrGRPO(), RLOO(), ReinforcePPBaseline()):
        assert given.abs().max() < 1e-6


@pytest.mark.parametrize("form", ["separate", "joint", "by-turn", "scaled"])
def test_without_any_gain_in_a_group_igpo_is_the_outcome_alone(form: str) -> None:
    short = [
        replace(own, turns=own.turns[-1:] if own.group == 0 else own.turns, belief=(), stop=own.stop)
        for own in play(16)
    ]
    batch = with_outcome(made(short), [place % 4 / 2 for place in range(16)])
    assert not any(batch.channel("info_gain")[1][:4].flatten())
    given = IGPO(form=form)(batch)[:4, 0]
    assert_close(given, GRPO(ddof=0)(batch)[:4, 0], atol=1e-5, rtol=1e-5)
    assert given.abs().min() > 0.1


@pytest.mark.parametrize("form", ["separate", "joint", "by-turn", "scaled", "mean-only"])
def test_equal_gains_say_nothing(form: str) -> None:
    batch = usual()
    level = [
        replace(
            own,
            turns=tuple(
                with_reward(turn, info_gain=0.3) if "info_gain" in turn.rewards else turn for turn in own.turns
            ),
        )
        for own in batch.episodes
    ]
    flat = with_outcome(replace(batch, episodes=level), [0.3] * 16)
    assert on_turns(flat, IGPO(form=form)(flat)).abs().max() < 1e-6


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", EVERY, ids=name)
def test_a_reward_that_is_not_finite_is_refused(estimator: Any, wrong: float) -> None:
    bad = with_outcome(usual(), [1.0] * 7 + [wrong] + [0.0] * 8)
    with pytest.raises(ValueError, match="not finite"):
        estimator(bad)


@pytest.mark.parametrize("estimator", [IGPO(), IGPO(form="none"), BeliefGAE(), Sum(parts=(IGPO(),))], ids=name)
def test_a_belief_that_is_missing_or_not_finite_is_refused(estimator: Any) -> None:
    batch = usual()
    with pytest.raises(ValueError, match="score it first"):
        estimator(Batch(play(8)))
    cut = [replace(batch.episodes[0], belief=batch.episodes[0].belief[:1]), *batch.episodes[1:]]
    with pytest.raises(ValueError, match=f"{batch.episodes[0].question.id!r} has not been read"):
        estimator(replace(batch, episodes=cut))
    place = next(place for place, own in enumerate(batch.episodes) if len(own.turns) > 1)
    own = batch.episodes[place]
    hole = replace(own, turns=(with_reward(own.turns[0], info_gain=math.nan), *own.turns[1:]))
    with pytest.raises(ValueError, match="not finite"):
        estimator(replace(batch, episodes=[*batch.episodes[:place], hole, *batch.episodes[place + 1 :]]))


@pytest.mark.parametrize("column", ["old", "reference", "values"])
def test_a_log_probability_or_value_that_is_not_finite_is_refused(column: str) -> None:
    batch = usual()
    rows = [own.clone() for own in getattr(batch, column)]
    rows[5][batch.encoded[5].turn.index(0)] = math.nan
    changed: dict[str, Any] = {column: rows}
    with pytest.raises((ValueError, FloatingPointError), match="not finite"):
        PPO(kl=0.1)(replace(batch, **changed))
