"""IGPO in all its normalisations, and our `igpo-gae`. Golden vectors (worked by hand or by a script that shares no code
with ours), properties, and slow loops that are plainly right.
"""

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig import information_gains
from agentgym_ig.trainers.advantages import (
    grpo_advantages,
    igpo_advantages,
    igpo_by_turn_advantages,
    igpo_gae_advantages,
    igpo_raw_advantages,
    igpo_returns,
    igpo_scaled_advantages,
    standardise,
)
from agentgym_ig.trainers.token_advantages import token_returns
from tests.groups import EIGHTHS, Row, assert_golden, f64, plain_z, ragged

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def episodes(gains: list[Row], outcomes: list[float], group: list[int] | None = None) -> Inputs:
    """Gains, has_gain, outcome, last and group; the last turn right behind each row's gains."""
    values, mask = ragged([[*row, None] for row in gains])
    last = torch.tensor([len(row) for row in gains])
    return values, mask, f64(outcomes), last, torch.tensor(group or [0] * len(gains))


# Four episodes of one question: A searches twice and wins, B once and loses, C once for half, D breaks the format.
GAINS: list[Row] = [[1.5, -0.1], [0.4], [-0.6], []]
OUTCOMES = [1.0, 0.0, 0.5, -2.0]

GOLDEN: list[tuple[dict[str, Any], list[list[float]]]] = [
    ({}, [[2.016395, 0.473619, 0.987877], [0.238329, 0.109764], [-0.608262, 0.548821], [-1.646462]]),
    ({"gamma": 0.5}, [[1.532616, -0.020320, 0.987877], [0.183447, 0.109764], [-0.882672, 0.548821], [-1.646462]]),
    ({"gamma": 0.0}, [[1.542776, -0.514259, 0.987877], [0.128565, 0.109764], [-1.157082, 0.548821], [-1.646462]]),
    ({"joint": True}, [[2.141685, 0.726419, 0.914287], [0.225441, -0.087671], [-0.275538, 0.413308], [-2.091587]]),
    (
        {"joint": True, "gamma": 0.5},
        [[1.549904, 0.269276, 0.914287], [0.269276, -0.087671], [-0.482192, 0.413308], [-2.091587]],
    ),
    (
        {"joint": True, "gamma": 0.0},
        [[1.415265, -0.187867, 0.914287], [0.313112, -0.087671], [-0.688846, 0.413308], [-2.091587]],
    ),
    ({"scale": False}, [[1.925, 0.725, 1.125], [0.225, 0.125], [-0.275, 0.625], [-1.875]]),
    ({"gain_weight": 0.0}, [[0.987877] * 3, [0.109764] * 2, [0.548821] * 2, [-1.646462]]),
    ({"outcome_weight": 0.0}, [[1.028518, -0.514259, 0.0], [0.128565], [-1.157082], [0.0]]),
]


@pytest.mark.parametrize(("options", "expected"), GOLDEN, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_golden(options: dict[str, Any], expected: list[list[float]]) -> None:
    assert_golden(igpo_advantages(*episodes(GAINS, OUTCOMES), **options), expected)


def test_one_discount_an_episode() -> None:
    both = [igpo_advantages(*episodes(GAINS, OUTCOMES), gamma=gamma) for gamma in (1.0, 0.5)]
    got = igpo_advantages(*episodes(GAINS, OUTCOMES), gamma=f64([1.0, 0.5, 1.0, 0.5]))
    assert torch.equal(got[::2], both[0][::2])
    assert torch.equal(got[1::2], both[1][1::2])


def test_scaled_golden() -> None:
    # mean |z(outcome)| = .823231, mean |z(gain)| = .835670: gains shrink to .985113 of themselves.
    inputs = episodes(GAINS, OUTCOMES)
    expected = [[2.001084, 0.481274, 0.987877], [0.236415, 0.109764], [-0.591036, 0.548821], [-1.646462]]
    assert_golden(igpo_scaled_advantages(*inputs), expected)
    expected = [[1.513477, -0.012664, 0.987877], [0.181533, 0.109764], [-0.865447, 0.548821], [-1.646462]]
    assert_golden(igpo_scaled_advantages(*inputs, gamma=0.5), expected)
    # Outcomes all alike have size 0, which counts as .3; gains of one size 1: .3 of them is left.
    got = igpo_scaled_advantages(*episodes([[1.0], [-1.0]], [0.5, 0.5]))
    assert_golden(got, [[0.3, 0.0], [-0.3, 0.0]])
    # Gains whose size is all but gone in the floor are not blown up more than tenfold.
    got = igpo_scaled_advantages(*episodes([[1e-6], [-1e-6]], [1.0, 0.0]), gamma=0.0)
    assert_golden(got, [[0.099005, 0.999998], [-0.099005, -0.999998]])
    # Without a single gain there is nothing to scale.
    got = igpo_scaled_advantages(*episodes([[], []], [1.0, 0.0]))
    assert_golden(got, [[0.999998], [-0.999998]])


def test_raw_golden() -> None:
    # Each gain over .777817, plus the standardised outcome; no sum over turns.
    inputs = episodes(GAINS, OUTCOMES)
    expected = [[2.916348, 0.859313, 0.987877], [0.624023, 0.109764], [-0.222567, 0.548821], [-1.646462]]
    assert_golden(igpo_raw_advantages(*inputs), expected)
    # No spread: a single gain, or gains all alike, stay as they are.
    assert_golden(igpo_raw_advantages(*episodes([[0.7], []], [0.5, 0.5])), [[0.699999, 0.0], [0.0, 0.0]])
    for other in (0.4, 0.400001):
        assert_golden(igpo_raw_advantages(*episodes([[0.4], [other]], [0.5, 0.5])), [[0.4, 0.0], [other, 0.0]])
    # A turn without a gain has the outcome of its episode.
    assert_golden(igpo_raw_advantages(*episodes([[None], []], [1.0, 0.0])), [[0.999998] * 2, [-0.999998]])


def test_by_turn_golden() -> None:
    # First turns: gains 1.5, .4, -.6, mean .433333, sd .857645. The only second gain stands alone and gets 0.
    expected = [[2.231591, 0.987877, 0.987877], [0.070898, 0.109764], [-0.656027, 0.548821], [-1.646462]]
    assert_golden(igpo_by_turn_advantages(*episodes(GAINS, OUTCOMES)), expected)


def test_gae_golden() -> None:
    # A believes .1, .4, .8 and wins; B .1, .15 and loses; C .1 and loses. Errors summed with .5: A .55, .5, .2,
    # B -.025, -.15, C -.1; mean .1625, sd .279042.
    beliefs, known = ragged([[0.1, 0.4, 0.8], [0.1, 0.15], [0.1]])
    last, group = torch.tensor([2, 1, 0]), torch.zeros(3, dtype=torch.long)
    outcome = f64([1.0, 0.0, 0.0])
    spoilt = beliefs.masked_fill(~known, torch.nan)
    expected = [[2.802884, 2.623700, 1.548598], [-1.379044, -1.827003], [-1.647820]]
    assert_golden(igpo_gae_advantages(spoilt, outcome, last, group), expected)
    z = [[1.388674, 1.209490, 0.134388], [-0.671939, -1.119898], [-0.940714]]
    assert_golden(igpo_gae_advantages(beliefs, outcome, last, group, outcome_weight=0.0), z)
    own = [[1.414211] * 3, [-0.707105] * 2, [-0.707105]]
    assert_golden(igpo_gae_advantages(beliefs, outcome, last, group, gain_weight=0.0), own)


def test_a_turn_whose_standardised_gain_is_zero_is_still_a_turn() -> None:
    # Both gains of B are the group's mean, exactly. A rule that finds turns by "reward != 0" would give B
    # -0.999998 everywhere; the discount must act on each of its turns.
    inputs = episodes([[0.375, 0.125], [0.25, 0.25]], [1.0, 0.0])
    expected = [[0.957098, -0.914198, 0.999998], [-0.249999, -0.499999, -0.999998]]
    assert_golden(igpo_advantages(*inputs, gamma=0.5), expected)
    assert_golden(igpo_advantages(*inputs, gamma=0.0), [[1.414197, -1.414197, 0.999998], [0.0, 0.0, -0.999998]])
    assert_golden(igpo_advantages(*inputs), [[0.999998, -0.414199, 0.999998], [-0.999998] * 3])


def test_a_gain_of_exactly_zero_counts_in_the_statistics() -> None:
    inputs = episodes([[0.0, 0.4], [0.2, -0.2]], [1.0, 0.0])
    assert_golden(igpo_advantages(*inputs), [[1.894421, 2.341633, 0.999998], [-1.894421, -2.341633, -0.999998]])
    z = [[-0.447212, 1.341635, 0.999998], [0.447212, -1.341635, -0.999998]]
    assert_golden(igpo_advantages(*inputs, gamma=0.0), z)


@pytest.mark.parametrize(("spread", "z"), [(1e-5, 0.098523), (1e-3, 0.994048)])
def test_the_variance_floor_limits_a_tiny_spread(spread: float, z: float) -> None:
    inputs = episodes([[spread], [-spread]], [0.0, 0.0])
    assert_golden(igpo_advantages(*inputs, gamma=0.0), [[z, 0.0], [-z, 0.0]])
    if spread == 1e-5:
        without = igpo_advantages(*inputs, gamma=0.0, ddof=1, floor=0.0)
        assert_golden(without, [[0.660409, 0.0], [-0.660409, 0.0]])


def test_equal_outcomes_and_a_single_gain_give_no_advantage() -> None:
    inputs = episodes([[0.7], [], []], [0.5] * 3)
    for estimator in (igpo_advantages, igpo_by_turn_advantages, igpo_scaled_advantages):
        assert_golden(estimator(*inputs), [[0.0, 0.0], [0.0], [0.0]])


def test_the_first_release_out_of_parts() -> None:
    # It takes the mean over all padded rows at a token's position off the return: padding is the baseline of A's end.
    rewards, real = ragged([[0.0, 0.0, 0.2, 0.0, 1.0], [0.0, 0.1, 0.0]])
    returns = token_returns(rewards, real)
    assert_golden(returns, [[1.2, 1.2, 1.2, 1.0, 1.0], [0.1, 0.1, 0.0]])
    everywhere, position = torch.ones_like(real), torch.arange(5).expand(2, -1)
    got = standardise(returns, everywhere, position, ddof=0, scale=False) * real
    assert_golden(got, [[0.55, 0.55, 0.6, 0.5, 0.5], [-0.55, -0.55, -0.6]])


def test_gains_are_differences_of_mean_log_probabilities_or_of_probabilities() -> None:
    beliefs = [-2.5, -1.0, -1.1, -0.15]
    assert information_gains(beliefs, log=True) == pytest.approx([1.5, -0.1, 0.95])
    assert information_gains(beliefs, log=False) == pytest.approx([0.285794, -0.035008, 0.527837], abs=2e-6)
    assert information_gains([-2.5], log=True) == []


Batch = tuple[list[Row], list[float], list[int]]
batches = st.lists(
    st.tuples(st.lists(st.one_of(st.none(), EIGHTHS), max_size=4), EIGHTHS, st.integers(0, 2)), min_size=1, max_size=9
).map(lambda rows: ([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))

ESTIMATORS: dict[str, Any] = {
    "separate": igpo_advantages,
    "joint": lambda *inputs, **options: igpo_advantages(*inputs, joint=True, **options),
    "by_turn": igpo_by_turn_advantages,
    "scaled": igpo_scaled_advantages,
    "raw": igpo_raw_advantages,
    "none": lambda *inputs, **options: igpo_returns(*inputs[:4], **options),
}
every = pytest.mark.parametrize("name", ESTIMATORS)


def slow(name: str, batch: Batch, gamma: float) -> list[list[float]]:
    """Every form once more, an episode at a time."""
    gains, outcomes, group = batch
    found = []
    for row, outcome, question in zip(gains, outcomes, group, strict=True):
        peers = [i for i, own in enumerate(group) if own == question]
        own = [outcomes[i] for i in peers]
        pool = [gain for i in peers for gain in gains[i] if gain is not None]
        if name == "joint":
            own = pool = own + pool
        of_outcome = plain_z(own, ddof=0, floor=1e-8)
        of_gain = plain_z(pool, ddof=0, floor=1e-8) if pool else float
        if name == "none":
            of_gain = of_outcome = float
        z = [0.0 if gain is None else of_gain(gain) for gain in row]
        if name == "by_turn":
            columns = [[gains[i][t] for i in peers if t < len(gains[i])] for t in range(len(row))]
            at_turn = [[gain for gain in column if gain is not None] for column in columns]
            z = [0.0 if g is None else plain_z(p, ddof=0, floor=1e-8)(g) for g, p in zip(row, at_turn, strict=True)]
        if name == "raw":
            spread = math.sqrt(sum((g - sum(pool) / len(pool)) ** 2 for g in pool) / len(pool)) if pool else 0.0
            over = (math.sqrt(spread**2 + 1e-8) if spread > 1e-4 else 1.0) + 1e-6
            found.append([(gain or 0.0) / over + of_outcome(outcome) for gain in row] + [of_outcome(outcome)])
            continue
        rewards = [*z, of_outcome(outcome)]
        found.append([sum(gamma**i * r for i, r in enumerate(rewards[t:])) for t in range(len(rewards))])
    return found


@every
@settings(deadline=None)
@given(batch=batches, gamma=st.sampled_from([0.0, 0.5, 1.0]))
def test_each_form_equals_a_slow_loop(name: str, batch: Batch, gamma: float) -> None:
    expected = slow_scaled(batch, gamma) if name == "scaled" else slow(name, batch, gamma)
    options = {} if name == "raw" else {"gamma": gamma}
    got = ESTIMATORS[name](*episodes(*batch), **options)
    assert_close(got, ragged(expected)[0], atol=1e-8, rtol=1e-8)


def slow_scaled(batch: Batch, gamma: float) -> list[list[float]]:
    alone = slow("separate", batch, 0.0)
    sizes = [
        abs(z)
        for row, gains in zip(alone, batch[0], strict=True)
        for z, g in zip(row, gains, strict=False)
        if g is not None
    ]
    own = [abs(row[-1]) for row in alone]
    mean = sum(sizes) / len(sizes) if sizes else 1.0
    factor = min(max(sum(own) / len(own), 0.3) / (mean + 1e-6), 10.0)
    rows = [[*(factor * z for z in row[:-1]), row[-1]] for row in alone]
    return [[sum(gamma**i * r for i, r in enumerate(row[t:])) for t in range(len(row))] for row in rows]


@every
@settings(deadline=None)
@given(batch=batches, seed=st.integers(0, 10_000))
def test_permuting_episodes_permutes_advantages(name: str, batch: Batch, seed: int) -> None:
    order = torch.tensor(random.Random(seed).sample(range(len(batch[0])), len(batch[0])))
    inputs = episodes(*batch)
    moved = ESTIMATORS[name](*(tensor[order] for tensor in inputs))
    assert_close(moved, ESTIMATORS[name](*inputs)[order], atol=1e-9, rtol=0)


@every
@settings(deadline=None)
@given(batch=batches, width=st.integers(1, 3))
def test_padding_and_what_stands_off_the_mask_change_nothing(name: str, batch: Batch, width: int) -> None:
    gains, has_gain, *rest = episodes(*batch)
    got = ESTIMATORS[name](gains, has_gain, *rest)
    wide = torch.nn.functional.pad(gains, (0, width)), torch.nn.functional.pad(has_gain, (0, width))
    spoilt = wide[0].masked_fill(~wide[1], torch.nan)
    assert_close(ESTIMATORS[name](spoilt, wide[1], *rest), torch.nn.functional.pad(got, (0, width)), atol=1e-9, rtol=0)


@settings(deadline=None)
@given(batches, EIGHTHS)
def test_adding_a_constant_to_all_gains_of_a_question_changes_nothing(batch: Batch, constant: float) -> None:
    gains, has_gain, *rest = episodes(*batch)
    for name in ("separate", "by_turn", "scaled"):
        there = ESTIMATORS[name](gains, has_gain, *rest)
        assert_close(ESTIMATORS[name](gains + constant, has_gain, *rest), there, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "scaled"])
@settings(deadline=None)
@given(batch=batches)
def test_other_questions_change_nothing(name: str, batch: Batch) -> None:
    inputs = episodes(*batch)
    whole = ESTIMATORS[name](*inputs)
    for one in set(batch[2]):
        rows = inputs[4] == one
        alone = ESTIMATORS[name](*(tensor[rows] for tensor in inputs))
        assert_close(whole[rows], alone, atol=1e-9, rtol=0)


@settings(deadline=None)
@given(batches)
def test_without_a_discounted_future_the_advantage_is_the_standardised_reward(batch: Batch) -> None:
    gains, has_gain, outcome, last, group = episodes(*batch)
    got = igpo_advantages(gains, has_gain, outcome, last, group, gamma=0.0)
    at_last = torch.arange(got.shape[1]) == last[:, None]
    for question in group.unique():
        own = (group == question)[:, None]
        assert abs(got[own & has_gain].sum()) < 1e-9
        assert abs(got[own & at_last].sum()) < 1e-9
    assert not got[~(has_gain | at_last)].any()


@settings(deadline=None)
@given(st.lists(EIGHTHS, min_size=2, max_size=9))
def test_one_turn_episodes_reduce_igpo_to_grpo(outcomes: list[float]) -> None:
    inputs = episodes([[] for _ in outcomes], outcomes)
    grpo = grpo_advantages(inputs[2], inputs[4], ddof=0)
    assert torch.equal(igpo_advantages(*inputs, floor=0.0)[:, 0], grpo)
    for name in ("separate", "by_turn", "scaled", "raw"):
        assert_close(ESTIMATORS[name](*inputs)[:, 0], grpo, atol=1e-5, rtol=1e-5)  # floors differ


@settings(deadline=None)
@given(st.lists(EIGHTHS, min_size=1, max_size=5), EIGHTHS)
def test_unnormalised_gains_telescope(beliefs: list[float], outcome: float) -> None:
    gains = [after - before for before, after in pairwise(beliefs)]
    got = igpo_returns(*episodes([gains], [outcome])[:4])
    assert got[0].tolist() == [beliefs[-1] - before + outcome for before in beliefs]


believers = st.lists(
    st.tuples(
        st.lists(st.integers(0, 8).map(lambda i: i / 8), min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 1.0])
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(believers, st.sampled_from([0.0, 0.5, 1.0]))
def test_gae_equals_a_slow_loop(rows: list[tuple[list[float], float]], lam: float) -> None:
    errors = []
    for beliefs, outcome in rows:
        single = [after - before for before, after in zip(beliefs, [*beliefs[1:], outcome], strict=True)]
        errors.append([sum(lam**i * e for i, e in enumerate(single[t:])) for t in range(len(single))])
    pool, own = [e for row in errors for e in row], [outcome for _, outcome in rows]
    expected = [
        [plain_z(pool, ddof=0)(e) + plain_z(own, ddof=0)(o) for e in row]
        for row, (_, o) in zip(errors, rows, strict=True)
    ]
    last, group = torch.tensor([len(beliefs) - 1 for beliefs, _ in rows]), torch.zeros(len(rows), dtype=torch.long)
    padded = ragged([beliefs for beliefs, _ in rows])[0]
    got = igpo_gae_advantages(padded, f64(own), last, group, lam=lam)
    assert_close(got, ragged(expected)[0], atol=1e-8, rtol=0)
    if lam == 1.0:  # the belief as a baseline
        plain = [[outcome - before for before in beliefs] for beliefs, outcome in rows]
        assert_close(ragged(errors)[0], ragged(plain)[0], atol=1e-12, rtol=0)


def test_gae_of_certain_belief_and_equal_outcomes_is_zero() -> None:
    last, group = torch.tensor([1, 1]), torch.zeros(2, dtype=torch.long)
    assert not igpo_gae_advantages(torch.ones(2, 2), torch.ones(2), last, group).any()
    nearly = 1 + f64([[1e-5, 0.0], [0.0, 0.0]])  # below the least spread
    assert not igpo_gae_advantages(nearly, torch.ones(2), last, group).any()


def test_wrong_input_says_what_is_wrong() -> None:
    gains, has_gain, outcome, last, group = episodes([[0.1, 0.2], [0.3, 0.4]], [0.0, 0.0])
    for name, estimator in ESTIMATORS.items():
        with pytest.raises(ValueError, match="on or after an episode's last turn"):
            estimator(gains, has_gain, outcome, torch.tensor([1, 1]), group)
        for turn, wrong in (((0, 1), torch.inf), ((1, 0), torch.nan)):
            spoilt = gains.clone()
            spoilt[turn] = wrong
            with pytest.raises(ValueError, match=rf"the reward at \[{turn[0]}, {turn[1]}\] is {wrong}"):
                estimator(spoilt, has_gain, outcome, last, group)
        with pytest.raises(ValueError, match=r"the reward at \[1, 2\] is nan"):
            estimator(gains, has_gain, f64([0.0, torch.nan]), last, group)
        with pytest.raises(ValueError, match=r"has_gain \(2, 2\): wanted \(2, 3\)"):
            estimator(gains, has_gain[:, :2], outcome, last, group)
        with pytest.raises(ValueError, match=r"outcome \(1,\): wanted \(2,\)"):
            estimator(gains, has_gain, outcome[:1], last, group)
        with pytest.raises(ValueError, match=r"wanted \(B, K\)"):
            estimator(gains[0], has_gain, outcome, last, group)
        if name != "none":
            with pytest.raises(ValueError, match="wanted"):
                estimator(gains, has_gain, outcome, last, torch.zeros(3))
    with pytest.raises(ValueError, match=r"the belief at \[0, 2\] is nan"):
        igpo_gae_advantages(f64([[0.1, 0.2, torch.nan]]), outcome[:1], last[:1], group[:1])
    with pytest.raises(ValueError, match=r"wanted \(B, K\)"):
        igpo_gae_advantages(gains[0], outcome, last, group)
