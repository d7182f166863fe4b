"""KL estimators: golden vectors, gradients, and what they are on average over all tokens."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers.kl import KL_ESTIMATORS, kl_k3, kl_loss, kl_penalty
from tests.loss_batches import Batch, batches, tensor


@pytest.mark.parametrize(
    ("x", "k1", "k2", "k3"),
    [(-0.5, 0.5, 0.125, 0.106531), (0.1, -0.1, 0.005, 0.005171), (0.5, -0.5, 0.125, 0.148721), (0.0, 0, 0, 0)],
)
def test_kl_golden(x: float, k1: float, k2: float, k3: float) -> None:
    policy, reference = tensor([-1.0]), tensor([-1.0 + x])
    expected = {"k1": k1, "abs": abs(k1), "k2": k2, "k3": k3, "k1+": k1, "abs+": abs(k1), "k3+": k3}
    assert expected.keys() == KL_ESTIMATORS.keys()
    for name, value in expected.items():
        assert float(kl_loss(policy, reference, name)) == pytest.approx(value, abs=2e-6)
        assert float(kl_penalty(policy, reference, name, coefficient=0.5)) == pytest.approx(-value / 2, abs=2e-6)
    assert float(kl_k3(policy, reference)) == pytest.approx(k3, abs=2e-6)


def slope(name: str, logprobs: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    own = logprobs.clone().requires_grad_()
    kl_loss(own, reference, name, mask=mask).sum().backward()
    assert own.grad is not None
    return own.grad


SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: torch.ones_like(x),
    "abs": lambda x: -x.sign(),
    "k2": lambda x: -x,
    "k3": lambda x: 1 - x.exp(),
    "k1+": lambda x: -x,
    "abs+": lambda x: -x,
    "k3+": lambda x: -x,
}


@settings(deadline=None)
@pytest.mark.parametrize("name", SLOPES)
@given(batch=batches(), junk=st.sampled_from([math.nan, math.inf]))
def test_gradients_are_the_closed_forms_and_the_mask_holds(name: str, batch: Batch, junk: float) -> None:
    dirty = [each.masked_fill(~batch.mask, junk) for each in (batch.logprobs, batch.old)]
    x = (batch.old - batch.logprobs).masked_fill(~batch.mask, 0.0)
    assert_close(slope(name, dirty[0], dirty[1], batch.mask), SLOPES[name](x) * batch.mask, atol=1e-12, rtol=1e-12)
    got = kl_loss(dirty[0], dirty[1], name, mask=batch.mask)
    assert_close(got, kl_loss(batch.logprobs, batch.old, name, mask=batch.mask), atol=0, rtol=0)
    assert not got[~batch.mask].any()


logit_rows = st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=6)


@settings(deadline=None)
@given(logit_rows)
def test_over_all_tokens_values_and_gradients_are_on_average_what_is_said(rows: list[tuple[float, float]]) -> None:
    logits = tensor([own for own, _ in rows]).requires_grad_()
    policy, reference = logits.log_softmax(0), tensor([other for _, other in rows]).log_softmax(0)
    truth = (policy.exp() * (policy - reference)).sum()  # KL(policy ‖ reference)
    backwards = (reference.exp() * (reference - policy)).sum()

    def grad(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    close: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9}
    chances = policy.exp().detach()  # tokens are sampled from the policy; how often is not part of the loss
    for name in ("k1", "k3", "k1+", "k3+"):
        assert_close((chances * kl_loss(policy, reference, name)).sum(), truth, **close)
    for name in ("k2", "k1+", "abs+", "k3+"):
        assert_close(grad((chances * kl_loss(policy, reference, name)).sum()), grad(truth), **close)
    assert_close(grad((chances * kl_loss(policy, reference, "k1")).sum()), torch.zeros_like(logits), **close)
    assert_close(grad((chances * kl_loss(policy, reference, "k3")).sum()), grad(backwards), **close)


@settings(deadline=None)
@given(st.floats(-30, 30))
def test_k3_is_never_negative_and_bounded_far_away(x: float) -> None:
    for dtype in (torch.float64, torch.float32):
        value = float(kl_loss(torch.zeros(1, dtype=dtype), torch.full((1,), x, dtype=dtype)))
        assert 0 <= value <= math.exp(20)


def test_near_the_reference_k3_is_more_than_rounding() -> None:
    x = torch.tensor([1e-4])  # float32
    assert float(kl_k3(torch.zeros(1), x)) == pytest.approx(5e-9, rel=0.02)


def test_a_penalty_has_no_gradient_and_the_reference_never() -> None:
    own, reference = (torch.zeros(2, requires_grad=True) for _ in range(2))
    assert not kl_penalty(own, reference, coefficient=0.1).requires_grad
    kl_loss(own, reference).sum().backward()
    assert reference.grad is None


def test_wrong_input_says_what_is_wrong() -> None:
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="choose one of k1, abs, k2, k3"):
        kl_loss(zeros, zeros, "k4")
    with pytest.raises(ValueError, match=r"reference \(2, 1\); they must be equal"):
        kl_loss(zeros, zeros[:, :1])
    with pytest.raises(ValueError, match=r"coefficient=-0.1"):
        kl_penalty(zeros, zeros, coefficient=-0.1)
    with pytest.raises(FloatingPointError, match="reference: a value on the mask"):
        kl_loss(zeros, zeros / 0)
