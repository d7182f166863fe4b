"""Figures about a step: by hand, for every loss, and the same however the step is cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig.trainers.loss_statistics import gradient_factors, loss_statistics, loss_sums
from agentgym_ig.trainers.losses import LOSSES, clipped_loss, gipo_log_omega, gipo_loss
from tests.loss_batches import ADVANTAGES, LOG_RATIO, MASK, Batch, batches, tensor


def test_clipping_by_hand() -> None:
    # ratios 2, 1/2, 1 and one without an advantage; the first is cut
    x = tensor([[2.0, 0.5, 1.0, 3.0]]).log()
    sums = loss_sums(clipped_loss, x, torch.zeros_like(x), tensor([[1.0, 2.0, -1.0, 0.0]]))
    figures = loss_statistics([sums])
    assert sums["tokens"] == 3
    assert figures["cut"] == figures["damped"] == pytest.approx(1 / 3)
    assert figures["trust"] == pytest.approx(2 / 3)
    assert figures["ratio"] == pytest.approx(3.5 / 3)
    assert figures["kl"] == pytest.approx((1 - math.log(2) + (-0.5 + math.log(2)) + 0) / 3)
    assert figures["effective"] == pytest.approx(1.5**2 / (3 * 1.25))


def test_trust_in_gipo_is_its_omega() -> None:
    inputs = (LOG_RATIO, torch.zeros_like(LOG_RATIO), ADVANTAGES)
    figures = loss_statistics([loss_sums(gipo_loss, *inputs, mask=MASK)])
    assert figures["trust"] == pytest.approx(float(gipo_log_omega(LOG_RATIO, ADVANTAGES)[MASK].exp().mean()))


def test_cut_is_the_share_of_tokens_that_the_clip_leaves_without_gradient() -> None:
    inputs = (LOG_RATIO, torch.zeros_like(LOG_RATIO), ADVANTAGES)
    ratio = LOG_RATIO.exp()
    cut = torch.where(ADVANTAGES > 0, ratio > 1.2, ratio < 0.8)[MASK]
    assert loss_statistics([loss_sums(clipped_loss, *inputs, mask=MASK)])["cut"] == float(cut.double().mean()) == 4 / 13


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=50)
@given(batch=batches(), size=st.integers(1, 4))
def test_parts_of_a_step_add_up(name: str, batch: Batch, size: int) -> None:
    parts = [batch[i : i + size] for i in range(0, len(batch.mask), size)]
    cut = loss_statistics(loss_sums(LOSSES[name], *part.inputs, mask=part.mask) for part in parts)
    whole = loss_statistics([loss_sums(LOSSES[name], *batch.inputs, mask=batch.mask)])
    assert cut == pytest.approx(whole)
    assert all(math.isfinite(value) for value in whole.values())
    assert 0 <= whole["effective"] <= 1 + 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_every_token_pulls_alike(name: str) -> None:
    old = torch.full((2, 3), -1.0)
    figures = loss_statistics([loss_sums(LOSSES[name], old, old, tensor([[1.0] * 3, [-2.0] * 3]))])
    assert figures == pytest.approx({"cut": 0, "damped": 0, "trust": 1, "ratio": 1, "kl": 0, "effective": 1})


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=50)
@given(batch=batches())
def test_what_stands_off_the_mask_changes_no_figure(name: str, batch: Batch) -> None:
    dirty = [each.masked_fill(~batch.mask, math.nan) for each in batch.inputs]
    factors = gradient_factors(LOSSES[name], *dirty, mask=batch.mask)
    clean = gradient_factors(LOSSES[name], *batch.inputs, mask=batch.mask)
    assert torch.equal(factors, clean)
    assert not factors[~batch.mask].any()
    assert loss_sums(LOSSES[name], *dirty, mask=batch.mask) == loss_sums(LOSSES[name], *batch.inputs, mask=batch.mask)


def test_nothing_is_zero_and_nothing_is_left_on_the_graph() -> None:
    zeros = torch.zeros(2, 3, requires_grad=True)
    nothing = dict.fromkeys(("cut", "damped", "trust", "ratio", "kl", "effective"), 0.0)
    assert loss_statistics([]) == nothing
    assert loss_statistics([loss_sums(clipped_loss, zeros, zeros, zeros)]) == nothing
    with torch.no_grad():  # as one would log
        factors = gradient_factors(clipped_loss, zeros, zeros, torch.ones(2, 3))
    assert not factors.requires_grad
    assert zeros.grad is None
    assert torch.equal(factors, torch.ones(2, 3))


def test_what_is_not_finite_is_told() -> None:
    with pytest.raises(FloatingPointError, match="old: a value on the mask"):
        loss_sums(clipped_loss, torch.zeros(1, 1), torch.full((1, 1), math.nan), torch.ones(1, 1))
