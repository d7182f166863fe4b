"""What holds for every policy loss: of masks, order, padding, scale, and steps cut into micro-batches."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers.aggregation import AGGREGATIONS, Counts, count, token_weights
from agentgym_ig.trainers.losses import LOSSES
from tests.loss_batches import Batch, batches, gradient

EXACT: dict[str, Any] = {"atol": 0.0, "rtol": 0.0}
CLOSE: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-10}
every_loss = pytest.mark.parametrize("name", LOSSES)


def losses_of(name: str, batch: Batch) -> Tensor:
    return LOSSES[name](*batch.inputs, mask=batch.mask)


@every_loss
@settings(deadline=None, max_examples=50)
@given(batch=batches(), junk=st.sampled_from([math.nan, math.inf, -math.inf, 7.0]))
def test_what_stands_off_the_mask_changes_nothing(name: str, batch: Batch, junk: float) -> None:
    dirty = Batch(*batch.over(lambda each: each.masked_fill(~batch.mask, junk)), batch.mask)
    losses, slopes = losses_of(name, dirty), gradient(LOSSES[name], dirty)
    assert_close(losses, losses_of(name, batch), **EXACT)
    assert_close(slopes, gradient(LOSSES[name], batch), **EXACT)
    assert not losses[~batch.mask].any()
    assert not slopes[~batch.mask].any()


@every_loss
@settings(deadline=None, max_examples=50)
@given(batch=batches(), data=st.data())
def test_permuting_episodes_permutes_losses(name: str, batch: Batch, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(batch.mask))))
    # Not exactly: where a token lies decides which of two routines, a last place apart, does its exponential.
    assert_close(losses_of(name, batch[order]), losses_of(name, batch)[order], **CLOSE)


@every_loss
@settings(deadline=None, max_examples=50)
@given(batch=batches(), columns=st.integers(1, 3))
def test_padding_changes_nothing(name: str, batch: Batch, columns: int) -> None:
    padded = batch.over(lambda each: torch.nn.functional.pad(each, (0, columns), value=math.nan))
    wide = Batch(*padded, torch.nn.functional.pad(batch.mask, (0, columns)))
    assert_close(losses_of(name, wide)[:, :-columns], losses_of(name, batch), **CLOSE)


@every_loss
@settings(deadline=None, max_examples=50)
@given(batch=batches(), scale=st.integers(0, 40).map(lambda i: i / 8))
def test_losses_are_linear_in_the_size_of_advantages(name: str, batch: Batch, scale: float) -> None:
    scaled = Batch(batch.logprobs, batch.old, batch.advantages * scale, batch.mask)
    assert_close(losses_of(name, scaled), losses_of(name, batch) * scale, **CLOSE)
    assert_close(gradient(LOSSES[name], scaled), gradient(LOSSES[name], batch) * scale, **CLOSE)


@every_loss
@settings(deadline=None, max_examples=50)
@given(batch=batches())
def test_on_policy_all_have_the_gradient_of_reinforce(name: str, batch: Batch) -> None:
    fresh = Batch(batch.old, batch.old, batch.advantages, batch.mask)
    assert_close(gradient(LOSSES[name], fresh), -batch.advantages * batch.mask, **CLOSE)


@every_loss
@settings(deadline=None, max_examples=50)
@given(batch=batches())
def test_no_token_is_pulled_against_its_advantage(name: str, batch: Batch) -> None:
    assert (gradient(LOSSES[name], batch) * batch.advantages <= 0).all()


@every_loss
def test_neither_old_nor_advantages_get_a_gradient(name: str) -> None:
    inputs = [torch.full((1, 2), value, dtype=torch.float64, requires_grad=True) for value in (-1.0, -1.1, 2.0)]
    LOSSES[name](*inputs).sum().backward()
    assert [each.grad is not None for each in inputs] == [True, False, False]


@every_loss
def test_float32_agrees_with_float64_far_from_the_policy(name: str) -> None:
    x = torch.linspace(-60, 60, 121, dtype=torch.float64)[:, None]
    for advantage in (1.0, -1.0):
        wide = LOSSES[name](x, torch.zeros_like(x), torch.full_like(x, advantage))
        single = LOSSES[name](x.float(), torch.zeros_like(x).float(), torch.full_like(x, advantage).float())
        assert torch.isfinite(single).all()
        assert_close(single.double(), wide, rtol=1e-4, atol=1e-30)


@every_loss
@pytest.mark.parametrize("mode", AGGREGATIONS)
@settings(deadline=None, max_examples=25)
@given(batch=batches(), size=st.integers(1, 5), ranks=st.integers(1, 2))
def test_a_step_is_the_same_however_it_is_cut(name: str, mode: str, batch: Batch, size: int, ranks: int) -> None:
    def step(rows: slice, counts: Counts | None) -> tuple[Tensor, Tensor]:
        own = batch.logprobs[rows].clone().requires_grad_()
        part = batch[rows]
        weights = token_weights(part.mask, mode, width=7, step=counts)
        loss = (LOSSES[name](own, part.old, part.advantages, mask=part.mask) * weights).sum()
        (slope,) = torch.autograd.grad(loss, own)
        return loss, slope

    height = len(batch.mask)
    cuts = [slice(i, i + size) for i in range(0, height, size)]
    shares = [cuts[rank::ranks] for rank in range(ranks)]  # which micro-batches a rank has, in any order
    counted = sum((count(batch.mask[rows]) for share in shares for rows in share), Counts())
    parts = [step(rows, counted) for share in shares for rows in share]
    whole, slope = step(slice(None), None)
    assert_close(torch.stack([loss for loss, _ in parts]).sum(), whole, **CLOSE)
    order = torch.cat([torch.arange(height)[rows] for share in shares for rows in share])
    assert_close(torch.cat([own for _, own in parts]), slope[order], **CLOSE)
