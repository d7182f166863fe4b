"""REINFORCE++ and generalised advantage estimation: golden vectors (by an independent script), properties, and slow
loops that are plainly right.
"""

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers.token_advantages import (
    gae_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    token_returns,
    whiten,
)
from tests.groups import EIGHTHS, assert_golden, f64


def bools(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


@pytest.mark.parametrize(
    ("gamma", "returns", "advantages"),
    [
        (1.0, [[1.0, 1.0, 1.0], [-0.5, -0.5]], [[0.730297] * 3, [-1.095445] * 2]),
        (0.9, [[0.81, 0.9, 1.0], [-0.45, -0.5]], [[0.604113, 0.722826, 0.854728], [-1.057858, -1.123809]]),
    ],
)
def test_reinforce_pp_golden(gamma: float, returns: list[list[float]], advantages: list[list[float]]) -> None:
    rewards, mask = f64([[0, 0, 1], [0, -0.5, torch.nan]]), bools([[1, 1, 1], [1, 1, 0]])
    assert_golden(token_returns(rewards, mask, gamma=gamma), returns)
    assert_golden(reinforce_pp_advantages(rewards, mask, gamma=gamma), advantages)


def test_reinforce_pp_baseline_golden() -> None:
    mask = bools([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    got = reinforce_pp_baseline_advantages(f64([1, 0, 0.5, 0]), mask, torch.zeros(4, dtype=torch.long))
    assert_golden(got, [[1.410190] * 2, [-0.846114], [0.282038] * 2, [-0.846114] * 3])


def test_a_reward_at_the_end_reaches_the_turns_before_an_observation() -> None:
    rewards, mask = f64([[0, 0, 0, 1]]), bools([[1, 0, 1, 1]])
    assert_golden(token_returns(rewards, mask), [[1.0, 0.0, 1.0, 1.0]])
    # verl starts from 0 again at the observation, so its first turn would be blamed for a success:
    assert_golden(whiten(f64([[0, 0, 1, 1]]), mask), [[-1.154701, 0.0, 0.577350, 0.577350]])


def test_gae_golden() -> None:
    expected = [0.446829, 0.375150, 0.300000]
    rewards, values, mask = f64([[0, 0, 1]]), f64([[0.5, 0.6, 0.7]]), bools([[1, 1, 1]])
    advantages, returns = gae_advantages(rewards, values, mask, gamma=0.99, lam=0.95)
    assert_golden(advantages, [expected])
    assert_golden(returns, [[0.946829, 0.975150, 1.0]])
    assert_golden(whiten(advantages, mask), [[0.992026, 0.015760, -1.007786]])
    # An observation between the tokens, whatever stands there, takes no time.
    rewards, values, mask = f64([[0, 0, 0, 1]]), f64([[0.5, 9, 0.6, 0.7]]), bools([[1, 0, 1, 1]])
    advantages, returns = gae_advantages(rewards, values, mask, gamma=0.99, lam=0.95)
    assert_golden(advantages, [[expected[0], 0.0, *expected[1:]]])
    assert_golden(returns, [[0.946829, 0.0, 0.975150, 1.0]])


rows = st.lists(st.lists(st.tuples(EIGHTHS, EIGHTHS, st.booleans()), min_size=4, max_size=4), min_size=1, max_size=4)
Rows = list[list[tuple[float, float, bool]]]
gammas = st.sampled_from([0.0, 0.5, 0.875, 1.0])


def tensors(batch: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask; off the mask the numbers are not numbers."""
    mask = torch.tensor([[on for *_, on in row] for row in batch])
    rewards, values = (f64([[token[i] for token in row] for row in batch]) for i in (0, 1))
    return rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf), mask


def closed(row: list[tuple[float, float, bool]]) -> list[tuple[float, float]]:
    return [(reward, value) for reward, value, on in row if on]


def put_back(mask: Tensor, found: list[list[float]]) -> Tensor:
    result = torch.zeros(mask.shape, dtype=torch.float64)
    result[mask] = f64([value for row in found for value in row])
    return result


@settings(deadline=None)
@given(rows, gammas)
def test_returns_equal_a_slow_loop_over_the_policys_tokens(batch: Rows, gamma: float) -> None:
    rewards, _, mask = tensors(batch)
    expected = [
        [sum(gamma**i * reward for i, (reward, _) in enumerate(closed(row)[t:])) for t in range(len(closed(row)))]
        for row in batch
    ]
    assert_close(token_returns(rewards, mask, gamma=gamma), put_back(mask, expected), atol=1e-9, rtol=0)
    whole = [value for row in expected for value in row]
    mean = statistics.fmean(whole) if whole else 0.0
    variance = statistics.variance(whole) if len(whole) > 1 else 0.0
    z = [[(value - mean) / math.sqrt(variance + 1e-8) for value in row] for row in expected]
    assert_close(reinforce_pp_advantages(rewards, mask, gamma=gamma), put_back(mask, z), atol=1e-7, rtol=0)


@settings(deadline=None)
@given(rows, gammas, gammas)
def test_gae_equals_a_slow_loop_over_the_policys_tokens(batch: Rows, gamma: float, lam: float) -> None:
    expected = []
    for row in batch:
        own = closed(row)
        values = [value for _, value in own] + [0.0]
        errors = [reward + gamma * values[t + 1] - values[t] for t, (reward, _) in enumerate(own)]
        expected.append([sum((gamma * lam) ** i * e for i, e in enumerate(errors[t:])) for t in range(len(errors))])
    rewards, expectations, mask = tensors(batch)
    advantages, returns = gae_advantages(rewards, expectations, mask, gamma=gamma, lam=lam)
    assert_close(advantages, put_back(mask, expected), atol=1e-9, rtol=0)
    assert_close(returns, advantages + expectations.masked_fill(~mask, 0.0), atol=0, rtol=0)
    if lam == 1.0:  # then the value head learns the plain return
        assert_close(returns, token_returns(rewards, mask, gamma=gamma), atol=1e-9, rtol=0)


@settings(deadline=None)
@given(st.lists(st.tuples(EIGHTHS, st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=6))
def test_the_baseline_form_equals_a_slow_loop(batch: list[tuple[float, int, int]]) -> None:
    mask = torch.arange(3) < torch.tensor([length for *_, length in batch])[:, None]
    expected = []
    for reward, group, length in batch:
        peers = [other for other, its, _ in batch if its == group]
        expected.append([reward - statistics.fmean(peers)] * length)
    got = reinforce_pp_baseline_advantages(f64([r for r, *_ in batch]), mask, torch.tensor([g for _, g, _ in batch]))
    assert_close(got, whiten(put_back(mask, expected), mask), atol=1e-7, rtol=0)
    assert abs(got.sum()) < 1e-6


@settings(deadline=None)
@given(rows, st.permutations(range(4)), EIGHTHS)
def test_whitening(batch: Rows, order: list[int], shift: float) -> None:
    values, _, mask = tensors(batch)
    got = whiten(values, mask)
    assert abs(got.sum()) < 1e-6
    assert not got[~mask].any()
    if len(values[mask].unique()) > 1:
        assert float(got[mask].var()) == pytest.approx(1.0, abs=1e-4)
    else:
        assert not got.any()
    assert_close(whiten(values + shift, mask), got, atol=1e-6, rtol=0)
    rearranged = [place for place in order if place < len(batch)]
    assert_close(whiten(values[rearranged], mask[rearranged]), got[rearranged], atol=1e-9, rtol=0)
    wide = torch.nn.functional.pad(values, (0, 2), value=torch.nan), torch.nn.functional.pad(mask, (0, 2))
    assert_close(whiten(*wide), torch.nn.functional.pad(got, (0, 2)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("value", [0.7, -9.9])
def test_equal_values_a_single_one_and_none_give_zero(value: float) -> None:
    for mask in (bools([[1] * 7] * 3), bools([[0, 0, 1]]), bools([[0, 0, 0]])):
        assert whiten(torch.full(mask.shape, value, dtype=torch.float64), mask).abs().max() < 1e-6
    lone = reinforce_pp_baseline_advantages(f64([value]), bools([[1, 1]]), torch.tensor([0]))
    assert not lone.any()


def test_wrong_input_says_what_is_wrong() -> None:
    mask, zeros = bools([[1, 1, 0]]), torch.zeros(1, 3)
    calls: list[Any] = [
        lambda bad: whiten(bad, mask),
        lambda bad: token_returns(bad, mask),
        lambda bad: reinforce_pp_advantages(bad, mask),
        lambda bad: gae_advantages(bad, zeros, mask),
        lambda bad: gae_advantages(zeros, bad, mask),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"at \[0, 1\] is inf, not finite"):
            call(f64([[0, torch.inf, 0]]))
        with pytest.raises(ValueError, match=r"\(1, 2\): wanted \(1, 3\)"):
            call(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="not finite"):
        reinforce_pp_baseline_advantages(f64([torch.nan]), mask, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"outcome \(2,\): wanted \(1,\)"):
        reinforce_pp_baseline_advantages(f64([0, 1]), mask, torch.tensor([0]))
