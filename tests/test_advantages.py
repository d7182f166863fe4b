"""Golden vectors (worked by hand or by an independent script), then properties."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig import information_gains
from agentgym_ig.trainers import grpo_advantages, igpo_advantages, standardise

TIGHT: dict[str, Any] = {"atol": 2e-6, "rtol": 0.0}


def ragged(rows: list[list[float | None]]) -> tuple[Tensor, Tensor]:
    """Rows to values and mask, both padded; None marks a turn without a value."""
    width = max(map(len, rows))
    values = torch.zeros(len(rows), width, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is not None:
                values[i, j], mask[i, j] = value, True
    return values, mask


def igpo(
    gains: list[list[float | None]], outcomes: list[float], group: list[int] | None = None, **options: Any
) -> Tensor:
    """IGPO with the last turn right behind each row's gains."""
    padded = [[*row, None] for row in gains]
    values, mask = ragged(padded)
    return igpo_advantages(
        values,
        mask,
        torch.tensor(outcomes, dtype=torch.float64),
        torch.tensor([len(row) for row in gains]),
        torch.tensor(group or [0] * len(gains)),
        **options,
    )


# Four episodes of one question: A searches twice and wins, B once and loses, C once for half, D breaks the format.
GAINS: list[list[float | None]] = [[1.5, -0.1], [0.4], [-0.6], []]
OUTCOMES = [1.0, 0.0, 0.5, -2.0]

# Each table was computed by a numpy script that shares no code with ours.
IGPO_GOLDEN = [
    ({}, [[2.016395, 0.473619, 0.987877], [0.238329, 0.109764, 0], [-0.608262, 0.548821, 0], [-1.646462, 0, 0]]),
    (
        {"gamma": 0.5},
        [[1.532616, -0.020320, 0.987877], [0.183447, 0.109764, 0], [-0.882672, 0.548821, 0], [-1.646462, 0, 0]],
    ),
    (
        {"gamma": 0.0},
        [[1.542776, -0.514259, 0.987877], [0.128565, 0.109764, 0], [-1.157082, 0.548821, 0], [-1.646462, 0, 0]],
    ),
    (
        {"joint": True},
        [[2.141685, 0.726419, 0.914287], [0.225441, -0.087671, 0], [-0.275538, 0.413308, 0], [-2.091587, 0, 0]],
    ),
    (
        {"joint": True, "gamma": 0.5},
        [[1.549904, 0.269276, 0.914287], [0.269276, -0.087671, 0], [-0.482192, 0.413308, 0], [-2.091587, 0, 0]],
    ),
    ({"scale": False}, [[1.925, 0.725, 1.125], [0.225, 0.125, 0], [-0.275, 0.625, 0], [-1.875, 0, 0]]),
    (
        {"gain_weight": 0.0},
        [[0.987877] * 3, [0.109764, 0.109764, 0], [0.548821, 0.548821, 0], [-1.646462, 0, 0]],
    ),
    (
        {"outcome_weight": 0.0},
        [[1.028518, -0.514259, 0], [0.128565, 0, 0], [-1.157082, 0, 0], [0, 0, 0]],
    ),
]


@pytest.mark.parametrize(("options", "expected"), IGPO_GOLDEN, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_igpo_golden(options: dict[str, Any], expected: list[list[float]]) -> None:
    assert_close(igpo(GAINS, OUTCOMES, **options), torch.tensor(expected, dtype=torch.float64), **TIGHT)


def test_a_turn_whose_standardised_gain_is_zero_is_still_a_turn() -> None:
    # Both gains of B are the group's mean, exactly. A rule that finds turns by "reward != 0" would give B
    # -0.999998 everywhere; the discount must act on each of its turns.
    got = igpo([[0.375, 0.125], [0.25, 0.25]], [1.0, 0.0], gamma=0.5)
    expected = [[0.957098, -0.914198, 0.999998], [-0.249999, -0.499999, -0.999998]]
    assert_close(got, torch.tensor(expected, dtype=torch.float64), **TIGHT)


def test_a_gain_of_exactly_zero_counts_in_the_statistics() -> None:
    got = igpo([[0.0, 0.4], [0.2, -0.2]], [1.0, 0.0])
    expected = [[1.894421, 2.341633, 0.999998], [-1.894421, -2.341633, -0.999998]]
    assert_close(got, torch.tensor(expected, dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize(("spread", "z"), [(1e-5, 0.098523), (1e-3, 0.994048)])
def test_the_variance_floor_limits_a_tiny_spread(spread: float, z: float) -> None:
    got = igpo([[spread], [-spread]], [0.0, 0.0], gamma=0.0)
    assert_close(got, torch.tensor([[z, 0.0], [-z, 0.0]], dtype=torch.float64), **TIGHT)


def test_equal_outcomes_and_a_single_gain_give_no_advantage() -> None:
    assert_close(igpo([[0.7], [], []], [0.5] * 3), torch.zeros(3, 2, dtype=torch.float64), **TIGHT)


def test_grpo_golden() -> None:
    one = torch.zeros(4, dtype=torch.long)
    expected = torch.tensor([0.855527, 0.095059, 0.475293, -1.425878], dtype=torch.float64)
    assert_close(grpo_advantages(torch.tensor(OUTCOMES), one), expected, **TIGHT)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0])
    for ddof, eps, values in [
        (1, 1e-6, [1.305580, -0.783348, 0.261116, -0.783348]),
        (1, 1e-4, [1.305310, -0.783186, 0.261062, -0.783186]),
        (0, 1e-6, [1.507553, -0.904532, 0.301511, -0.904532]),
    ]:
        expected = torch.tensor(values, dtype=torch.float64)
        assert_close(grpo_advantages(rewards, one, ddof=ddof, eps=eps), expected, **TIGHT)


def test_gains_are_differences_of_mean_log_probabilities_or_of_probabilities() -> None:
    beliefs = [-2.5, -1.0, -1.1, -0.15]
    assert information_gains(beliefs, log=True) == pytest.approx([1.5, -0.1, 0.95])
    assert information_gains(beliefs, log=False) == pytest.approx([0.285794, -0.035008, 0.527837], abs=2e-6)
    assert information_gains([-2.5], log=True) == []


eighths = st.integers(-80, 80).map(lambda i: i / 8)
batches = st.lists(st.tuples(st.lists(eighths, max_size=4), eighths, st.integers(0, 2)), min_size=1, max_size=9).map(
    lambda rows: ([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
)
Batch = tuple[list[list[float | None]], list[float], list[int]]


@settings(deadline=None)
@given(batches, st.randoms(use_true_random=False))
def test_permuting_episodes_permutes_advantages(batch: Batch, random: object) -> None:
    gains, outcomes, group = batch
    order = list(range(len(gains)))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = igpo([gains[i] for i in order], [outcomes[i] for i in order], [group[i] for i in order])
    assert_close(moved, igpo(gains, outcomes, group)[order], atol=1e-9, rtol=0)


@settings(deadline=None)
@given(batches, eighths)
def test_adding_a_constant_to_all_gains_of_a_question_changes_nothing(batch: Batch, constant: float) -> None:
    gains, outcomes, group = batch
    moved = [[g + constant for g in row if g is not None] for row in gains]
    assert_close(igpo(moved, outcomes, group), igpo(gains, outcomes, group), atol=1e-7, rtol=0)  # type: ignore[arg-type]


@settings(deadline=None)
@given(batches)
def test_other_questions_change_nothing(batch: Batch) -> None:
    gains, outcomes, group = batch
    whole = igpo(gains, outcomes, group)
    for one in set(group):
        rows = [i for i, own in enumerate(group) if own == one]
        alone = igpo([gains[i] for i in rows], [outcomes[i] for i in rows])
        assert_close(whole[rows][:, : alone.shape[1]], alone, atol=1e-9, rtol=0)
        assert not whole[rows][:, alone.shape[1] :].any()


@settings(deadline=None)
@given(st.lists(eighths, min_size=2, max_size=9))
def test_one_turn_episodes_reduce_igpo_to_grpo(outcomes: list[float]) -> None:
    rewards = torch.tensor(outcomes, dtype=torch.float64)
    grpo = grpo_advantages(rewards, torch.zeros(len(outcomes), dtype=torch.long), ddof=0)
    assert_close(igpo([[] for _ in outcomes], outcomes)[:, 0], grpo, atol=1e-5, rtol=1e-5)  # floors differ


@settings(deadline=None)
@given(st.integers(1, 20), st.floats(-100, 100))
def test_equal_rewards_give_zero(count: int, value: float) -> None:
    # In float32 the rounding of the mean, over eps, would not be: seven rewards of 0.7 would get 0.056 each.
    got = grpo_advantages(torch.full((count,), value, dtype=torch.float64), torch.zeros(count, dtype=torch.long))
    assert got.abs().max() < 1e-6


@settings(deadline=None)
@given(batches)
def test_what_stands_off_the_mask_changes_nothing(batch: Batch) -> None:
    values, mask = ragged([[*row, None] for row in batch[0]])
    group = torch.tensor(batch[2])
    spoilt = values.masked_fill(~mask, torch.nan)
    for ddof in (0, 1):
        clean = standardise(values, mask, group, ddof=ddof)
        assert torch.equal(standardise(spoilt, mask, group, ddof=ddof), clean)
        assert not clean[~mask].any()


def test_wrong_input_says_what_is_wrong() -> None:
    one = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="not finite"):
        grpo_advantages(torch.tensor([1.0, torch.nan]), one)
    with pytest.raises(ValueError, match=r"wanted \(B, K\)"):
        standardise(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool), one, ddof=0)
    values, mask = ragged([[0.1, 0.2], [0.3, 0.4]])
    with pytest.raises(ValueError, match="last turn"):
        igpo_advantages(values, mask, torch.zeros(2), torch.tensor([1, 1]), one)
