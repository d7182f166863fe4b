"""Weights of tokens: golden vectors, counts of a whole step, wrong input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig.trainers.aggregation import AGGREGATIONS, Counts, count, token_weights
from agentgym_ig.trainers.losses import clipped_loss, gipo_loss, gspo_loss
from tests.loss_batches import ADVANTAGES, LOG_RATIO, MASK, tensor

# PPO on policy, PPO off policy, GIPO off policy
GOLDEN = {
    "token-mean": (-0.328080, -0.311777, -0.353525),
    "seq-mean-token-mean": (-0.002143, 0.012283, -0.053084),
    "seq-mean-token-sum": (-1.066260, -1.013275, -1.148957),
    "seq-mean-token-sum-norm": (-0.533130, -0.506638, -0.574478),
}


@pytest.mark.parametrize(("mode", "expected"), GOLDEN.items())
def test_aggregation_golden(mode: str, expected: tuple[float, ...]) -> None:
    fresh, weights = torch.zeros_like(LOG_RATIO), token_weights(MASK, mode, width=8)
    losses = [
        clipped_loss(fresh, fresh, ADVANTAGES),
        clipped_loss(LOG_RATIO, fresh, ADVANTAGES),
        gipo_loss(LOG_RATIO, fresh, ADVANTAGES),
    ]
    # The advantages are rounded to six places themselves, hence 3e-6 and not 2e-6.
    assert [float((each * weights).sum()) for each in losses] == pytest.approx(list(expected), abs=3e-6)


def test_token_means_of_gipo_golden() -> None:
    losses = gipo_loss(LOG_RATIO, torch.zeros_like(LOG_RATIO), ADVANTAGES, mask=MASK)
    means = (losses.sum(1) / MASK.sum(1)).tolist()
    assert means == pytest.approx([-1.266291, -0.209898, -0.162379, 1.426231], abs=2e-6)


def test_aggregation_leaves_out_episodes_without_a_token() -> None:
    losses = tensor([[1, 2, 3, 9], [4, 9, 9, 9], [5, 5, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    expected = {
        "token-mean": 2.5,
        "seq-mean-token-sum": 5.0,
        "seq-mean-token-mean": 3.0,
        "seq-mean-token-sum-norm": 2.5,
    }
    for mode, value in expected.items():
        assert float((losses * token_weights(mask, mode, width=4)).sum()) == pytest.approx(value)
    assert float((losses * token_weights(mask, "seq-mean-token-sum-norm", width=8)).sum()) == pytest.approx(1.25)
    # counting all three episodes, as TRL does, is a matter of the counts
    all_three = token_weights(mask, "seq-mean-token-sum", step=Counts(tokens=4, episodes=3))
    assert float((losses * all_three).sum()) == pytest.approx(10 / 3)


def test_luspo_is_gspo_by_token_sums() -> None:
    x = tensor([[0.2, -0.1, 0.3], [0.1, 0.1, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    losses = gspo_loss(x, torch.zeros_like(x), torch.ones_like(x), mask=mask, clip_high=1.0)
    by_length = (losses[:, 0] * mask.sum(1)).mean()
    assert float((losses * token_weights(mask, "seq-mean-token-sum")).sum()) == pytest.approx(float(by_length))


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6), st.integers(1, 5))
def test_weights_are_cut_out_of_those_of_the_step(rows: list[list[bool]], cut: int) -> None:
    mask = torch.tensor(rows)
    parts = [mask[i : i + cut] for i in range(0, len(rows), cut)]
    whole = sum(map(count, parts), Counts())
    assert whole == count(mask)
    for mode in AGGREGATIONS:
        weights = token_weights(mask, mode, width=5)
        assert torch.equal(torch.cat([token_weights(part, mode, width=5, step=whole) for part in parts]), weights)
        assert not weights[~mask].any()


def test_a_mean_weighs_one_in_all_and_nothing_weighs_nothing() -> None:
    for mode in ("token-mean", "seq-mean-token-mean"):
        assert float(token_weights(MASK, mode).sum()) == pytest.approx(1.0)
    for mode in AGGREGATIONS:
        assert not token_weights(MASK & False, mode, width=1).any()


def test_wrong_input_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="token-mean, seq-mean"):
        token_weights(MASK, "mean")
    with pytest.raises(ValueError, match="width=None"):
        token_weights(MASK, "seq-mean-token-sum-norm")
    for small in (Counts(tokens=3, episodes=4), Counts(tokens=13, episodes=3)):
        with pytest.raises(ValueError, match="add up the counts of all parts"):
            token_weights(MASK, "token-mean", step=small)
    for wrong in (MASK.double(), MASK[0]):
        with pytest.raises(ValueError, match=r"wanted torch.bool \(B, T\)"):
            token_weights(wrong, "token-mean")
