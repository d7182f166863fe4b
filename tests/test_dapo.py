"""Overlong shaping and dynamic sampling."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig.trainers.dapo import groups_with_signal, overlong_penalty, varied_groups
from tests.loss_batches import tensor

# The paper's own 16384 + 4096 tokens.
LENGTHS = [(0, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (30000, -1.0)]


def test_overlong_penalty_by_hand() -> None:
    lengths = torch.tensor([length for length, _ in LENGTHS])
    expected = [penalty for _, penalty in LENGTHS]
    assert overlong_penalty(lengths, limit=20480, buffer=4096).tolist() == expected
    doubled = overlong_penalty(lengths, limit=20480, buffer=4096, factor=2.0)
    assert doubled.tolist() == [2 * penalty for penalty in expected]
    assert overlong_penalty(torch.tensor([9, 10, 11]), limit=10, buffer=1).tolist() == [0, -1, -1]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 40), st.integers(0, 20))
def test_overlong_penalty_is_the_three_cases_of_the_paper(lengths: list[int], buffer: int, free: int) -> None:
    def plain(length: int) -> float:
        if length <= free:
            return 0.0
        return (free - length) / buffer if length <= free + buffer else -1.0

    got = overlong_penalty(torch.tensor(lengths), limit=free + buffer, buffer=buffer)
    assert got.tolist() == pytest.approx([plain(length) for length in lengths])


def test_varied_groups_by_hand() -> None:
    # 7: all lose; 3: one wins; 5: all win; 9: alone
    group = torch.tensor([7, 3, 5, 7, 3, 5, 9, 3])
    scores = tensor([0, 0, 1, 0, 1, 1, 1, 0])
    assert varied_groups(scores, group).tolist() == [False, True, False, False, True, False, False, True]


def test_equal_scores_are_equal_though_their_standard_deviation_is_not_zero() -> None:
    scores = [0.1, 0.1, 0.1]
    assert np.std(scores) > 0
    assert not varied_groups(tensor(scores), torch.zeros(3, dtype=torch.long)).any()


rows = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 1.0])), max_size=10)


@settings(deadline=None)
@given(rows)
def test_groups_are_those_of_a_plain_loop(episodes: list[tuple[int, float]]) -> None:
    scores, group = tensor([score for _, score in episodes]), torch.tensor([own for own, _ in episodes]).long()
    members = {own: {score for other, score in episodes if other == own} for own, _ in episodes}
    assert varied_groups(scores, group).tolist() == [len(members[own]) > 1 for own, _ in episodes]
    signal = [any(members[own] - {0.0}) for own, _ in episodes]
    assert groups_with_signal(scores[:, None], group).tolist() == signal


def test_a_group_of_equal_outcomes_can_hold_a_signal() -> None:
    group = torch.tensor([0, 0, 1, 1])
    advantages = tensor([[0.0, -0.5], [0.0, 0.0], [1e-12, 0.0], [0.0, 0.0]])
    assert not varied_groups(tensor([0, 0, 0, 0]), group).any()
    assert groups_with_signal(advantages, group).tolist() == [True, True, False, False]
    assert groups_with_signal(advantages, group, tolerance=0.0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 10, "buffer": 0},
        {"limit": 10, "buffer": 11},
        {"limit": 10, "buffer": 2, "factor": -1.0},
        {"limit": 10, "buffer": 2, "factor": math.nan},
    ],
)
def test_overlong_settings_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted 1 <= buffer <= limit"):
        overlong_penalty(torch.tensor([1]), **options)


def test_wrong_input_says_what_is_wrong() -> None:
    pair = torch.zeros(2).long()
    for lengths in (torch.tensor([-1]), torch.tensor([[1]])):
        with pytest.raises(ValueError, match="none negative"):
            overlong_penalty(lengths, limit=2, buffer=1)
    with pytest.raises(ValueError, match=r"scores \(3,\), group \(2,\)"):
        varied_groups(torch.zeros(3), pair)
    with pytest.raises(ValueError, match="a score is not finite"):
        varied_groups(tensor([math.nan, 0]), pair)
    with pytest.raises(ValueError, match=r"wanted \(B, K\) and \(B,\)"):
        groups_with_signal(torch.zeros(2), pair)
    with pytest.raises(ValueError, match="an advantage is not finite"):
        groups_with_signal(tensor([[math.inf], [0]]), pair)
    with pytest.raises(ValueError, match="tolerance=-1"):
        groups_with_signal(torch.zeros(2, 1), pair, tolerance=-1)
