"""Golden vectors, closed-form gradients and properties of the policy losses."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers import clipped_loss, kl_k3, token_weights

TIGHT: dict[str, Any] = {"atol": 2e-6, "rtol": 0.0}


def tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Four episodes as in test_advantages; 0 stands off the mask. Columns are tokens, tool tokens included.
MASK = torch.tensor(
    [[1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 0, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
).bool()
ADVANTAGES = tensor(
    [
        [2.016395, 2.016395, 0, 0, 0.473619, 0, 0.987877, 0.987877],
        [0.238329, 0.238329, 0, 0.109764, 0, 0, 0, 0],
        [-0.608262, 0, 0.548821, 0.548821, 0, 0, 0, 0],
        [-1.646462, -1.646462, 0, 0, 0, 0, 0, 0],
    ]
)
LOG_RATIO = tensor(
    [
        [0.1, -0.1, 0, 0, 0.3, 0, -0.3, 0],
        [0.05, 0.25, 0, -0.25, 0, 0, 0, 0],
        [0, 0, 0.4, -0.4, 0, 0, 0, 0],
        [0.2, -0.5, 0, 0, 0, 0, 0, 0],
    ]
)
TOKEN_LOSSES = tensor(
    [
        [-2.228461, -1.824510, 0, 0, -0.568342, 0, -0.731838, -0.987877],
        [-0.250548, -0.285995, 0, -0.085484, 0, 0, 0, 0],
        [0.608262, 0, -0.658585, -0.367886, 0, 0, 0, 0],
        [2.010994, 1.317170, 0, 0, 0, 0, 0, 0],
    ]
)
AGGREGATED = {
    "token-mean": (-0.328080, -0.311777),
    "seq-mean-token-mean": (-0.002143, 0.012283),
    "seq-mean-token-sum": (-1.066260, -1.013275),
    "seq-mean-token-sum-norm": (-0.533130, -0.506638),
}


def test_token_losses_golden() -> None:
    assert_close(clipped_loss(LOG_RATIO, torch.zeros_like(LOG_RATIO), ADVANTAGES) * MASK, TOKEN_LOSSES, **TIGHT)


@pytest.mark.parametrize(("mode", "expected"), AGGREGATED.items())
def test_aggregation_golden(mode: str, expected: tuple[float, float]) -> None:
    weights = token_weights(MASK, mode, width=8)
    for log_ratio, value in zip((torch.zeros_like(LOG_RATIO), LOG_RATIO), expected, strict=True):
        loss = (clipped_loss(log_ratio, torch.zeros_like(log_ratio), ADVANTAGES) * weights).sum()
        assert float(loss) == pytest.approx(value, abs=3e-6)


# (ratio, advantage) → loss with clip 0.2, with clip 0.2 / 0.28, with clip 0.2 and dual clip 3
@pytest.mark.parametrize(
    ("ratio", "positive", "negative"),
    [
        (0.5, (-0.5, -0.5, -0.5), (0.8, 0.8, 0.8)),
        (0.9, (-0.9, -0.9, -0.9), (0.9, 0.9, 0.9)),
        (1.25, (-1.2, -1.25, -1.2), (1.25, 1.25, 1.25)),
        (1.5, (-1.2, -1.28, -1.2), (1.5, 1.5, 1.5)),
        (4.0, (-1.2, -1.28, -1.2), (4.0, 4.0, 3.0)),
    ],
)
def test_clip_golden(ratio: float, positive: tuple[float, ...], negative: tuple[float, ...]) -> None:
    for advantage, expected in ((1.0, positive), (-1.0, negative)):
        inputs = (tensor([ratio]).log(), tensor([0.0]), tensor([advantage]))
        got = [
            clipped_loss(*inputs),
            clipped_loss(*inputs, clip_high=0.28),
            clipped_loss(*inputs, dual_clip=3.0),
        ]
        assert [float(loss) for loss in got] == pytest.approx(list(expected), abs=2e-6)


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


@pytest.mark.parametrize(("x", "k3"), [(-0.5, 0.106531), (0.1, 0.005171), (0.5, 0.148721), (0.0, 0.0)])
def test_kl_golden(x: float, k3: float) -> None:
    assert float(kl_k3(tensor([-1.0]), tensor([-1.0 + x]))) == pytest.approx(k3, abs=2e-6)


floats = st.floats(-3, 3, allow_nan=False)


@settings(deadline=None)
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=8))
def test_gradient_is_minus_advantage_times_ratio_or_nothing(tokens: list[tuple[float, float]]) -> None:
    log_ratio = tensor([x for x, _ in tokens]).requires_grad_()
    advantages = tensor([a for _, a in tokens])
    clipped_loss(log_ratio, torch.zeros_like(advantages), advantages).sum().backward()
    ratio = log_ratio.detach().exp()
    cut = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert log_ratio.grad is not None
    assert_close(log_ratio.grad, torch.where(cut, 0.0, -advantages * ratio), atol=1e-9, rtol=1e-9)


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6), st.integers(1, 5))
def test_weights_of_a_step_do_not_depend_on_its_micro_batches(rows: list[list[bool]], cut: int) -> None:
    mask = torch.tensor(rows)
    losses = torch.arange(mask.numel(), dtype=torch.float64).reshape(mask.shape)
    for mode in AGGREGATED:
        weights = token_weights(mask, mode, width=5)
        parts = sum((losses[i : i + cut] * weights[i : i + cut]).sum() for i in range(0, len(rows), cut))
        assert_close(torch.as_tensor(parts), (losses * weights).sum())
        assert not weights[~mask].any()


def test_wrong_input_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        clipped_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="token-mean, seq-mean"):
        token_weights(MASK, "mean")
    with pytest.raises(ValueError, match="width=None"):
        token_weights(MASK, "seq-mean-token-sum-norm")
