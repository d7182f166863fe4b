"""Every estimator on real episodes, against the same sums in plain Python from the trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.envs import rollout
from agentgym_ig.envs.channels import SearchCost, SelfGuide
from agentgym_ig.envs.rollout import Start
from agentgym_ig.envs.wrappers import add_channel
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
    Sum,
    TokenAdvantages,
    estimators,
    recipe,
)
from agentgym_ig.trainers.collect import reward_weights
from agentgym_ig.trainers.estimators import IGPO_FORMS, beliefs_before_turns
from agentgym_ig.trainers.recipes import Gain
from agentgym_ig.trainers.state_graph import distances, gigpo_advantages, graph_gpo_advantages
from agentgym_ig.types import Trajectory
from tests.groups import f64, plain_z
from tests.runs import fresh, paid_env, scored
from tests.tiny import shipped_policy, tiny_env

WEIGHTS = {"outcome": 1.0, "search_cost": 0.25}
Rows = list[list[float]]


@cache
def batch(gain: Gain = "log") -> Batch:
    """Twenty-four episodes of four questions, in which searches are paid for."""
    env = paid_env(24)
    ids = list(env.questions)
    played = rollout(env, shipped_policy(), [Start(ids[number // 6], number // 6, number) for number in range(24)])
    run = fresh(Path("unused"), replace(recipe("igpo"), gain=gain))
    return replace(scored(run, episodes=played), weights=WEIGHTS)


def reward(episode: Trajectory) -> list[float]:
    return [sum(WEIGHTS.get(name, 0.0) * value for name, value in turn.rewards.items()) for turn in episode.turns]


def outcome(episode: Trajectory) -> float:
    return sum(reward(episode))


def pooled(of: Callable[[Trajectory], Sequence[float]]) -> dict[int, list[float]]:
    """Group → what all of its episodes have."""
    pools: dict[int, list[float]] = {}
    for episode in batch().episodes:
        pools.setdefault(episode.group, []).extend(of(episode))
    return pools


def check(got: Tensor | TokenAdvantages, wanted: Rows, **close: Any) -> None:
    """Of every turn that an episode had."""
    assert isinstance(got, Tensor)
    assert any(value for row in wanted for value in row)
    for row, own in zip(got, wanted, strict=True):
        assert_close(row[: len(own)], f64(own), **(close or {"atol": 1e-9, "rtol": 1e-9}))


def on_all(per_episode: Callable[[Trajectory], float]) -> Rows:
    return [[per_episode(own)] * len(own.turns) for own in batch().episodes]


def test_the_episodes_differ_as_the_tests_need() -> None:
    outcomes = pooled(lambda own: [outcome(own)])
    assert sum(len(set(own)) > 1 for own in outcomes.values()) >= 3
    assert {len(own.turns) for own in batch().episodes} >= {2, 3}
    assert any(own.total("outcome") for own in batch().episodes)
    assert len(set(batch("log").channel("info_gain")[0].flatten().tolist())) > 10


@pytest.mark.parametrize(("ddof", "eps"), [(1, 1e-6), (0, 1e-4)])
def test_grpo(ddof: int, eps: float) -> None:
    pools = pooled(lambda own: [outcome(own)])
    check(
        GRPO(ddof=ddof, eps=eps)(batch()),
        on_all(lambda own: plain_z(pools[own.group], ddof=ddof, eps=eps)(outcome(own))),
    )


def test_drgrpo_and_rloo() -> None:
    pools = pooled(lambda own: [outcome(own)])
    check(DrGRPO()(batch()), on_all(lambda own: outcome(own) - math.fsum(pools[own.group]) / 6))
    check(RLOO()(batch()), on_all(lambda own: outcome(own) - (math.fsum(pools[own.group]) - outcome(own)) / 5))


def gains(episode: Trajectory) -> list[float]:
    return [value for value in episode.channel("info_gain") if value is not None]


def plain_igpo(form: str, *, gamma: float, gain_weight: float, outcome_weight: float) -> Rows:
    def z(pool: Sequence[float]) -> Callable[[float], float]:
        return plain_z(pool, ddof=0, floor=1e-8)

    gain_pools, outcome_pools = pooled(gains), pooled(lambda own: [outcome(own)])
    cells: dict[tuple[int, int], list[float]] = {}
    for own in batch().episodes:
        for turn, gain in enumerate(gains(own)):
            cells.setdefault((own.group, turn), []).append(gain)
    every = [abs(z(gain_pools[own.group])(gain)) for own in batch().episodes for gain in gains(own)]
    ends = [abs(z(outcome_pools[own.group])(outcome(own))) for own in batch().episodes]
    factor = min(10.0, max(0.3, mean(ends)) / (mean(every) + 1e-6))
    rows = []
    for own in batch().episodes:
        mine, theirs = gain_pools[own.group], outcome_pools[own.group]
        spread = math.sqrt(float(np.var(mine)) + 1e-8) + 1e-6
        end = z(mine + theirs if form == "joint" else theirs)(outcome(own))
        end = {"mean-only": outcome(own) - mean(theirs), "none": outcome(own)}.get(form, end) * outcome_weight
        given = [
            gain_weight
            * {
                "separate": z(mine)(gain),
                "joint": z(mine + theirs)(gain),
                "mean-only": gain - mean(mine),
                "by-turn": z(cells[own.group, turn])(gain),
                "scaled": z(mine)(gain) * factor,
                "raw": gain / spread,
                "none": gain,
            }[form]
            for turn, gain in enumerate(gains(own))
        ]
        given += [0.0] * (len(own.turns) - len(given))
        if form == "raw":
            rows.append([value + end for value in given])
            continue
        given[-1] = end
        for turn in reversed(range(len(given) - 1)):
            given[turn] += gamma * given[turn + 1]
        rows.append(given)
    return rows


@pytest.mark.parametrize("form", IGPO_FORMS)
@pytest.mark.parametrize("settings", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.25)])
def test_igpo_in_all_forms(form: str, settings: tuple[float, float, float]) -> None:
    own = dict(zip(("gamma", "gain_weight", "outcome_weight"), settings, strict=True))
    if form == "raw":
        own["gamma"] = 1.0
    check(IGPO(form=form, **own)(batch()), plain_igpo(form, **own))


def test_the_gain_is_that_of_the_recipe() -> None:
    forms: dict[Gain, Callable[[float], float]] = {"log": float, "prob": math.exp}
    for gain, of in forms.items():
        for own in batch(gain).episodes:
            told = [of(after) - of(before) for before, after in zip(own.belief, own.belief[1:], strict=False)]
            assert gains(own) == pytest.approx(told, abs=1e-12)


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.5625, 0.75, 0.9375, 1.0])
def test_self_guide_is_grpo_with_verdicts_as_far_as_they_are_trusted(progress: float) -> None:
    trusted = {0.5625: 0.5, 0.75: 1.0, 0.9375: 0.5}.get(progress, 0.0)
    rng = np.random.default_rng(7)
    episodes = []
    for own in batch().episodes:
        told = rng.choice([0.1, 0.0, -0.1], len(own.turns)).tolist()
        turns = [
            replace(turn, rewards={**turn.rewards, "self_guide": value})
            for turn, value in zip(own.turns, told, strict=True)
        ]
        episodes.append(replace(own, turns=tuple(turns)))
    guided = replace(batch(), episodes=episodes, progress=progress)
    pools: dict[int, list[float]] = {}
    for own in episodes:
        pools.setdefault(own.group, []).append(outcome(own) + trusted * own.total("self_guide"))
    wanted = [plain_z(pools[own.group], ddof=1)(outcome(own) + trusted * own.total("self_guide")) for own in episodes]
    got = estimators.SelfGuide()(guided)
    check(got, [[value] * len(own.turns) for value, own in zip(wanted, episodes, strict=True)])
    assert torch.equal(got, GRPO()(batch())) == (trusted == 0)


def test_self_guide_wants_its_channel() -> None:
    with pytest.raises(ValueError, match="no turn has the channel self_guide"):
        estimators.SelfGuide()(batch())


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_belief_gae(lam: float) -> None:
    errors: list[list[float]] = []
    for own in batch().episodes:
        belief = [math.exp(value) for value in own.belief[: len(own.turns)]]
        after = [*belief[1:], outcome(own)]
        row = [b - a for a, b in zip(belief, after, strict=True)]
        for turn in reversed(range(len(row) - 1)):
            row[turn] += lam * row[turn + 1]
        errors.append(row)
    ends = pooled(lambda own: [outcome(own)])
    pools: dict[int, list[float]] = {}
    for own, row in zip(batch().episodes, errors, strict=True):
        pools.setdefault(own.group, []).extend(row)
    wanted = [
        [2.0 * plain_z(pools[own.group], ddof=0)(x) + 0.5 * plain_z(ends[own.group], ddof=0)(outcome(own)) for x in row]
        for own, row in zip(batch().episodes, errors, strict=True)
    ]
    check(BeliefGAE(lam=lam, gain_weight=2.0, outcome_weight=0.5)(batch()), wanted)
    assert beliefs_before_turns(batch())[0, 0] == math.exp(batch().episodes[0].belief[0])


def states() -> Tensor:
    """The sets of passages seen before each turn, numbered within groups; -1 where an episode is over."""
    known: dict[Any, int] = {}
    rows = torch.full((24, int(batch().last.max()) + 2), -1)
    for row, own in enumerate(batch().episodes):
        for place in range(len(own.turns)):
            seen = frozenset(name for turn in own.turns[:place] for name in turn.retrieved)
            rows[row, place] = known.setdefault((own.group, seen), len(known))
    return rows


def hand() -> tuple[Tensor, Tensor, Tensor]:
    own = batch().episodes
    return f64([outcome(each) for each in own]), torch.tensor([len(each.turns) - 1 for each in own]), batch().group


def test_gigpo_and_graph_gpo_read_the_same_states() -> None:
    ends, last, group = hand()
    rewards = torch.nn.utils.rnn.pad_sequence([f64(reward(own)) for own in batch().episodes], batch_first=True)
    own: dict[str, Any] = {"gamma": 0.5, "step_weight": 2.0, "episode_weight": 0.25, "scale": False}
    got = GiGPO(**own)(batch())
    assert_close(got, gigpo_advantages(rewards, ends, states(), last, group, **own))
    assert not torch.equal(got, GiGPO(**own | {"state": "evidence"})(batch()))
    success = torch.tensor([each.answer in each.question.answers for each in batch().episodes])
    assert success.any()
    settings: dict[str, Any] = {"omega": 0.5, "form": "progress", "graph_weight": 2.0, "episode_weight": 0.25}
    wanted = graph_gpo_advantages(ends, success, states(), last, group, **settings)
    assert_close(GraphGPO(**settings)(batch()), wanted)
    assert distances(states(), last, success, group).max() > 1


def test_graph_gpo_takes_malformed_turns_off_their_return() -> None:
    first = batch().episodes[0]
    marred = [replace(first.turns[0], rewards={**first.turns[0].rewards, "format": -1.0}), *first.turns[1:]]
    changed = replace(batch(), episodes=[replace(first, turns=tuple(marred)), *batch().episodes[1:]])
    ends, last, group = hand()
    penalty = torch.zeros(24, int(last.max()) + 1, dtype=torch.float64)
    penalty[0, 0] = 0.5
    settings: dict[str, Any] = {"omega": 0.2, "form": "code", "penalty": penalty}
    wanted = graph_gpo_advantages(ends, changed.success, states(), last, group, **settings)
    assert_close(GraphGPO(invalid_penalty=0.5)(changed), wanted)


def columns() -> Batch:
    """With a reference and values that are finite at the policy's tokens alone."""
    rng = torch.Generator().manual_seed(3)
    other = []
    for own in batch().encoded:
        noise = torch.randn(len(own.ids), generator=rng)
        other.append(noise.masked_fill(torch.tensor(own.turn) < 0, float("nan")))
    return replace(batch(), reference=[own - 1.0 for own in other], values=other)


def plain_tokens(kl: float) -> Rows:
    """Per episode the rewards of the tokens that the policy wrote, in a row."""
    rows = []
    for own, encoded, old, reference in zip(
        columns().episodes, columns().encoded, columns().old, columns().reference, strict=True
    ):
        row: list[float] = []
        for turn, paid in zip(own.turns, reward(own), strict=True):
            row += [0.0] * (len(turn.action.token_ids) - 1) + [paid]
        places = [place for place, turn in enumerate(encoded.turn) if turn >= 0]
        rows.append([x - kl * float(old[at] - reference[at]) for x, at in zip(row, places, strict=True)])
    return rows


def whitened(rows: Rows) -> Rows:
    every = np.array([value for row in rows for value in row])
    spread = math.sqrt(every.var(ddof=1) + 1e-8)
    return [[(value - every.mean()) / spread for value in row] for row in rows]


def check_tokens(got: Tensor | None, wanted: Rows) -> None:
    assert got is not None
    mask = batch().tokens.sampled
    assert not got.masked_fill(mask, 0.0).any()
    for row, on, own in zip(got, mask, wanted, strict=True):
        assert_close(row[on], f64(own), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("gamma", "kl"), [(1.0, 0.0), (0.9, 0.5)])
def test_reinforce_pp(gamma: float, kl: float) -> None:
    rows = plain_tokens(kl)
    for row in rows:
        for place in reversed(range(len(row) - 1)):
            row[place] += gamma * row[place + 1]
    check_tokens(ReinforcePP(gamma=gamma, kl=kl)(columns()).advantages, whitened(rows))


def test_reinforce_pp_with_a_baseline() -> None:
    pools = pooled(lambda own: [outcome(own)])
    rows = [
        [outcome(own) - mean(pools[own.group])] * sum(len(turn.action.token_ids) for turn in own.turns)
        for own in batch().episodes
    ]
    check_tokens(ReinforcePPBaseline()(batch()).advantages, whitened(rows))


@pytest.mark.parametrize(("gamma", "lam", "kl"), [(1.0, 1.0, 0.0), (0.9, 0.5, 0.25)])
def test_ppo(gamma: float, lam: float, kl: float) -> None:
    advantages, returns = [], []
    for row, values, encoded in zip(plain_tokens(kl), columns().values, columns().encoded, strict=True):
        value = [float(values[place]) for place, turn in enumerate(encoded.turn) if turn >= 0]
        own = [x + gamma * after - v for x, v, after in zip(row, value, [*value[1:], 0.0], strict=True)]
        for place in reversed(range(len(own) - 1)):
            own[place] += gamma * lam * own[place + 1]
        advantages.append(own)
        returns.append([a + v for a, v in zip(own, value, strict=True)])
    given = PPO(gamma=gamma, lam=lam, kl=kl)(columns())
    check_tokens(given.advantages, whitened(advantages))
    check_tokens(given.returns, returns)
    if (gamma, lam, kl) == (1.0, 1.0, 0.0):  # then the critic learns what was still paid
        check_tokens(given.returns, [[sum(row[at:]) for at in range(len(row))] for row in plain_tokens(0.0)])


def test_a_penalty_wants_its_reference_and_ppo_its_critic() -> None:
    with pytest.raises(ValueError, match="the batch has no reference"):
        ReinforcePP(kl=0.1)(batch())
    with pytest.raises(ValueError, match="the batch has no values"):
        PPO()(batch())


def test_a_reward_on_a_turn_without_tokens_is_not_lost_in_silence() -> None:
    encoded = list(batch().encoded)
    gone = int(batch().last[0])
    encoded[0] = replace(encoded[0], turn=[-1 if turn == gone else turn for turn in encoded[0].turn])
    paid = replace(batch(), encoded=encoded, weights={"format": 1.0, "search_cost": 1.0, "outcome": 1.0})
    last = replace(batch().episodes[0].turns[-1], rewards={"outcome": 1.0})
    own = replace(batch().episodes[0], turns=(*batch().episodes[0].turns[:-1], last))
    with pytest.raises(ValueError, match="a reward on a turn without tokens"):
        ReinforcePP()(replace(paid, episodes=[own, *batch().episodes[1:]]))


def test_sums_add_turns_alone() -> None:
    parts = (IGPO(), GiGPO(episode_weight=0.0), GRPO())
    got = Sum(parts=parts)(batch())
    assert_close(got, torch.stack([part(batch()) for part in parts]).sum(0))
    with pytest.raises(ValueError, match="only advantages per turn"):
        Sum(parts=(GRPO(), ReinforcePP()))(batch())


def test_weights_are_the_environments_at_that_moment_but_for_channels_that_are_read() -> None:
    price = [0.5]
    env = add_channel(add_channel(tiny_env(4), SearchCost(), weight=lambda: -price[0]), SelfGuide(), weight=3.0)
    own = dict(tiny_env(4).rules.weights)
    assert reward_weights(env, recipe("grpo")) == own | {"search_cost": -0.5, "self_guide": 3.0}
    price[0] = 0.25
    assert reward_weights(env, recipe("self-guide")) == own | {"search_cost": -0.25}
    assert reward_weights(env, recipe("igpo")) == own | {"search_cost": -0.25, "self_guide": 3.0}
    assert reward_weights(env, recipe("self-guide+dapo")) == own | {"search_cost": -0.25, "overlong": 1.0}
