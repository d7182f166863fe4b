"""One number per episode: GRPO, Dr.GRPO, RLOO, Self-Guide's return. Golden vectors (worked by hand or by an independent
script), properties, and slow loops that are plainly right.

`test_trl` compares with the numbers of TRL itself.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers.advantages import (
    drgrpo_advantages,
    grpo_advantages,
    rloo_advantages,
    self_guide_returns,
    standardise,
    turn_returns,
)
from tests.groups import EIGHTHS, assert_golden, f64, plain_z, ragged

REWARDS = [1.0, 0.0, 0.5, 0.0]
ESTIMATORS = [grpo_advantages, drgrpo_advantages, rloo_advantages]

Batch = list[tuple[float, int]]
batches = st.lists(st.tuples(EIGHTHS, st.integers(0, 2)), min_size=1, max_size=12)


def one(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.long)


def split(batch: Batch) -> tuple[Tensor, Tensor]:
    return f64([reward for reward, _ in batch]), torch.tensor([group for _, group in batch])


@pytest.mark.parametrize(
    ("ddof", "eps", "expected"),
    [
        (1, 1e-6, [1.305580, -0.783348, 0.261116, -0.783348]),
        (1, 1e-4, [1.305310, -0.783186, 0.261062, -0.783186]),
        (0, 1e-6, [1.507553, -0.904532, 0.301511, -0.904532]),
    ],
)
def test_grpo_golden(ddof: int, eps: float, expected: list[float]) -> None:
    assert_golden(grpo_advantages(f64(REWARDS), one(4), ddof=ddof, eps=eps), expected)


def test_grpo_golden_with_a_format_penalty() -> None:
    got = grpo_advantages(f64([1.0, 0.0, 0.5, -2.0]), one(4))
    assert_golden(got, [0.855527, 0.095059, 0.475293, -1.425878])


def test_drgrpo_and_rloo_golden() -> None:
    assert_golden(drgrpo_advantages(f64(REWARDS), one(4)), [0.625, -0.375, 0.125, -0.375])
    assert_golden(rloo_advantages(f64(REWARDS), one(4)), [0.833333, -0.5, 0.166667, -0.5])


# Verdicts (pos, neu, pos), (neg, neg), (pos, neu, neg, neg), (neu): sums 0.2, -0.2, -0.1, 0.
VERDICTS = [[0.1, 0.0, 0.1], [-0.1, -0.1], [0.1, 0.0, -0.1, -0.1], [0.0]]


@pytest.mark.parametrize(
    ("successes", "trust", "returns", "ddof1", "ddof0"),
    [
        (
            [1, 0, 0, 1],
            0.0,
            [1, 0, 0, 1],
            [0.866024, -0.866024, -0.866024, 0.866024],
            [0.999998, -0.999998, -0.999998, 0.999998],
        ),
        (
            [1, 0, 0, 1],
            0.5,
            [1.1, -0.1, -0.05, 1.0],
            [0.940684, -0.902289, -0.825498, 0.787103],
            [1.086208, -1.041873, -0.953203, 0.908868],
        ),
        (
            [1, 0, 0, 1],
            1.0,
            [1.2, -0.2, -0.1, 1.0],
            [0.996647, -0.927912, -0.790444, 0.721710],
            [1.150828, -1.071461, -0.912726, 0.833358],
        ),
        ([0, 0, 0, 0], 1.0, [0.2, -0.2, -0.1, 0.0], [1.317457, -1.024689, -0.439152, 0.146384], None),
    ],
)
def test_self_guide_golden(
    successes: list[float], trust: float, returns: list[float], ddof1: list[float], ddof0: list[float] | None
) -> None:
    got = self_guide_returns(f64(successes), *ragged(VERDICTS), trust=trust)
    assert_golden(got, returns)
    assert_golden(grpo_advantages(got, one(4), ddof=1), ddof1)
    if ddof0 is not None:
        assert_golden(grpo_advantages(got, one(4), ddof=0), ddof0)


@settings(deadline=None)
@given(batches, st.floats(0, 1))
def test_self_guide_without_a_verdict_or_without_trust_is_grpo(batch: Batch, trust: float) -> None:
    outcome, group = split(batch)
    neutral, said = torch.zeros(len(batch), 3), torch.ones(len(batch), 3, dtype=torch.bool)
    plain = grpo_advantages(outcome, group)
    assert torch.equal(grpo_advantages(self_guide_returns(outcome, neutral, said, trust=trust), group), plain)
    assert torch.equal(grpo_advantages(self_guide_returns(outcome, neutral + 0.1, said, trust=0.0), group), plain)
    silent = self_guide_returns(outcome, neutral + torch.nan, ~said, trust=trust)
    assert torch.equal(grpo_advantages(silent, group), plain)


def test_self_guide_does_not_ask_for_the_order_of_verdicts() -> None:
    values, said = ragged(VERDICTS)
    there = self_guide_returns(f64(REWARDS), values, said, trust=0.7)
    assert_close(self_guide_returns(f64(REWARDS), values.flip(1), said.flip(1), trust=0.7), there)


@settings(deadline=None)
@given(batches)
def test_each_estimator_equals_a_slow_loop(batch: Batch) -> None:
    outcome, group = split(batch)
    expected: dict[str, list[float]] = {"grpo": [], "drgrpo": [], "rloo": []}
    for place, (reward, question) in enumerate(batch):
        pool = [other for other, its in batch if its == question]
        others = [other for i, (other, its) in enumerate(batch) if its == question and i != place]
        expected["grpo"].append(plain_z(pool, ddof=1)(reward))
        expected["drgrpo"].append(reward - sum(pool) / len(pool))
        expected["rloo"].append(reward - sum(others) / len(others) if others else 0.0)
    assert_close(grpo_advantages(outcome, group), f64(expected["grpo"]))
    assert_close(drgrpo_advantages(outcome, group), f64(expected["drgrpo"]), atol=1e-12, rtol=0)
    assert_close(rloo_advantages(outcome, group), f64(expected["rloo"]), atol=1e-12, rtol=0)


@settings(deadline=None)
@given(batches, EIGHTHS, st.integers(0, 10_000))
def test_sum_permutation_shift_and_scale(batch: Batch, shift: float, seed: int) -> None:
    outcome, group = split(batch)
    order = torch.tensor(random.Random(seed).sample(range(len(batch)), len(batch)))
    for estimator in ESTIMATORS:
        got = estimator(outcome, group)
        for question in group.unique():
            assert abs(got[group == question].sum()) < 1e-9
        assert_close(estimator(outcome[order], group[order]), got[order], atol=1e-9, rtol=0)
        assert_close(estimator(outcome + shift, group), got, atol=1e-9, rtol=0)
        size = 1.0 if estimator is grpo_advantages else 2.0
        assert_close(estimator(outcome * 2, group), got * size, atol=1e-4, rtol=0)  # GRPO's eps does not scale
        assert torch.equal(estimator(outcome, 5 - 3 * group), got)


@settings(deadline=None)
@given(st.integers(1, 20), st.floats(-100, 100))
def test_equal_rewards_give_zero(count: int, value: float) -> None:
    # In float32 the rounding of the mean, over eps, would not be: seven rewards of 0.7 would get 0.056 each.
    for estimator in ESTIMATORS:
        assert estimator(torch.full((count,), value, dtype=torch.float64), one(count)).abs().max() < 1e-6


@settings(deadline=None)
@given(
    st.lists(st.lists(st.one_of(st.none(), EIGHTHS), min_size=3, max_size=3), min_size=1, max_size=6),
    st.data(),
    st.sampled_from([0, 1]),
)
def test_standardise_equals_a_slow_loop_and_reads_the_mask_alone(
    rows: list[list[float | None]], data: st.DataObject, ddof: int
) -> None:
    values, mask = ragged(rows)
    group = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=len(rows))))
    group = group[: len(rows)]
    got = standardise(values, mask, group, ddof=ddof)
    assert torch.equal(standardise(values.masked_fill(~mask, torch.nan), mask, group, ddof=ddof), got)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            pool = values[mask & (group == group[i, j])].tolist()
            expected = 0.0 if value is None else plain_z(pool, ddof=ddof)(value)
            assert float(got[i, j]) == pytest.approx(expected, abs=1e-9)


def test_a_spread_below_the_least_is_none() -> None:
    values, mask = ragged([[1e-5], [-1e-5]])
    assert_golden(standardise(values, mask, one(2), ddof=1), [[0.660409], [-0.660409]])
    assert not standardise(values, mask, one(2), ddof=1, least=1e-4).any()
    for spread in (1e-3, 1e-5):  # a standard deviation, not a variance
        got = standardise(values * 1e5 * spread, mask, one(2), ddof=0, eps=0.0, least=1e-4)
        assert_golden(got, [[1.0], [-1.0]] if spread > 1e-4 else [[0.0], [0.0]])


@settings(deadline=None)
@given(
    st.lists(st.lists(EIGHTHS, min_size=1, max_size=4), min_size=1, max_size=5),
    st.lists(st.sampled_from([0.0, 0.5, 0.875, 1.0]), min_size=5, max_size=5),
)
def test_returns_equal_a_slow_loop(rows: list[list[float]], gammas: list[float]) -> None:
    values, mask = ragged([[*row, None] for row in rows])
    last, gamma = torch.tensor([len(row) - 1 for row in rows]), f64(gammas[: len(rows)])
    expected = [
        [sum(g**i * reward for i, reward in enumerate(row[turn:])) for turn in range(len(row))]
        for row, g in zip(rows, gammas, strict=False)
    ]
    assert_close(turn_returns(values.masked_fill(~mask, torch.nan), last, gamma=gamma), ragged_with_padding(expected))
    same = turn_returns(values, last, gamma=gammas[0])
    assert torch.equal(same, turn_returns(values, last, gamma=torch.full((len(rows),), gammas[0])))


def ragged_with_padding(rows: list[list[float]]) -> Tensor:
    return ragged([[*row, None] for row in rows])[0]


def test_wrong_input_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"\[1, 0\] is nan, not finite"):
        grpo_advantages(torch.tensor([1.0, torch.nan]), one(2))
    with pytest.raises(ValueError, match=r"wanted \(B, K\)"):
        standardise(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool), one(2), ddof=0)
    for estimator in ESTIMATORS:
        with pytest.raises(ValueError, match="wanted"):
            estimator(torch.zeros(3), one(2))
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=r"wanted indices from 0 to 2; leave out an empty episode"):
            turn_returns(torch.zeros(2, 3), torch.tensor([0, wrong]), gamma=1.0)
    said = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"guidance \(2, 2\): wanted \(2, 3\)"):
        self_guide_returns(torch.zeros(2), torch.zeros(2, 2), said, trust=1.0)
    with pytest.raises(ValueError, match=r"the verdict at \[0, 0\] is inf"):
        self_guide_returns(torch.zeros(2), torch.full((2, 3), torch.inf), said, trust=1.0)
    with pytest.raises(ValueError, match=r"the shaped return at \[1\] is nan"):
        self_guide_returns(f64([0.0, torch.nan]), torch.zeros(2, 3), said, trust=1.0)
