"""Intervals, paired tests and pass@k against known values, by simulation and by property."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig.statistics import bootstrap_interval, compare, pass_at


def covered(draw: object, truth: float, *, runs: int = 1000) -> float:
    """How often an interval of one draw holds the truth."""
    inside = 0
    for number in range(runs):
        low, high = bootstrap_interval(draw(np.random.default_rng(number)), resamples=600)  # type: ignore[operator]
        inside += low <= truth <= high
    return inside / runs


@pytest.mark.slow
def test_intervals_of_shares_hold_the_truth_95_times_of_100() -> None:
    assert covered(lambda rng: [rng.random(200) < 0.3], 0.3) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_intervals_of_f1_like_values_hold_the_truth_95_times_of_100() -> None:
    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        return [np.where(rng.random(150) < 0.5, 0.0, rng.beta(4, 2, 150))]

    assert covered(draw, 0.5 * 4 / 6) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_intervals_of_a_mean_over_datasets_hold_the_truth_95_times_of_100() -> None:
    shares = {100: 0.1, 300: 0.4, 80: 0.7}
    truth = sum(shares.values()) / len(shares)
    assert covered(lambda rng: [rng.random(n) < p for n, p in shares.items()], truth) == pytest.approx(0.95, abs=0.02)


def test_an_interval_is_about_twice_the_standard_error_and_the_same_again() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval([values])
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    assert low < values.mean() < high
    assert bootstrap_interval([values]) == (low, high)
    assert bootstrap_interval([values], seed=1) != (low, high)


def test_datasets_count_alike_whatever_their_size() -> None:
    low, high = bootstrap_interval([[1.0] * 900, [0.0, 1.0] * 50])
    assert (low + high) / 2 == pytest.approx(0.75, abs=0.01)
    assert high - low == pytest.approx(1.96 * 0.5 / 10, rel=0.15)
    assert bootstrap_interval([[1.0] * 5, [0.0] * 7]) == (0.5, 0.5)


@pytest.mark.parametrize("wrong", [[], [[]], [[1.0, float("nan")]], [[[1.0]]]])
def test_no_interval_without_finite_values(wrong: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"no values|finite"):
        bootstrap_interval(wrong)


def test_mcnemar_is_the_exact_binomial_test_of_the_pairs_that_differ() -> None:
    # 8 pairs differ, 7 of them in A's favour: 2 * (C(8,0) + C(8,1)) / 2^8 = 0.0703125
    a = {"x": [1.0] * 7 + [0.0] * 3 + [1.0] * 5}
    b = {"x": [0.0] * 7 + [1.0] + [0.0] * 2 + [1.0] * 5}
    found = compare(a, b)
    assert (found.a_only, found.b_only) == (7, 1)
    assert found.p == pytest.approx(2 * (comb(8, 0) + comb(8, 1)) / 2**8)
    assert found.difference == pytest.approx(6 / 15)
    assert found.interval[0] < found.difference < found.interval[1]


def test_pairs_make_a_narrower_interval_than_two_runs_apart() -> None:
    rng = np.random.default_rng(3)
    base = rng.random(300) < 0.5
    better = base | (rng.random(300) < 0.1)
    low, high = compare({"x": list(better * 1.0)}, {"x": list(base * 1.0)}).interval
    apart = [bootstrap_interval([own * 1.0]) for own in (better, base)]
    assert 0 < low < high
    assert high - low < 0.6 * max(end - start for start, end in apart)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
@settings(max_examples=30, deadline=None)
def test_swapping_the_runs_swaps_the_sign(pairs: list[tuple[int, int]]) -> None:
    a, b = ({"x": [float(pair[side]) for pair in pairs]} for side in (0, 1))
    one, other = compare(a, b), compare(b, a)
    assert one.difference == -other.difference
    assert (one.a_only, one.b_only, one.p) == (other.b_only, other.a_only, other.p)
    same = compare(a, a)
    assert (same.difference, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)


def test_runs_over_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="other questions"):
        compare({"x": [1.0]}, {"x": [1.0, 0.0]})


@pytest.mark.parametrize(("wins", "tries"), [(0, 4), (1, 4), (3, 5), (5, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_win(wins: int, tries: int) -> None:
    outcomes = [True] * wins + [False] * (tries - wins)
    for k in range(1, tries + 1):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at(k, wins, tries) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("wrong", [(0, 1, 2), (3, 1, 2), (1, 3, 2), (1, -1, 2)])
def test_pass_at_k_of_what_cannot_be(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="wanted 1 <= k <= tries"):
        pass_at(*wrong)
