"""What the policy losses say of one token: golden vectors, plainly right loops, closed-form gradients."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers.aggregation import token_weights
from agentgym_ig.trainers.loss_statistics import gradient_factors
from agentgym_ig.trainers.losses import (
    LOSSES,
    cispo_loss,
    clipped_loss,
    gipo_loss,
    gspo_loss,
    gspo_token_loss,
    sapo_loss,
)
from tests.loss_batches import ADVANTAGES, LOG_RATIO, MASK, TIGHT, Batch, batches, gradient, tensor

TOKEN_LOSSES = tensor(
    [
        [-2.228461, -1.824510, 0, 0, -0.568342, 0, -0.731838, -0.987877],
        [-0.250548, -0.285995, 0, -0.085484, 0, 0, 0, 0],
        [0.608262, 0, -0.658585, -0.367886, 0, 0, 0, 0],
        [2.010994, 1.317170, 0, 0, 0, 0, 0, 0],
    ]
)


def test_token_losses_golden() -> None:
    assert_close(clipped_loss(LOG_RATIO, torch.zeros_like(LOG_RATIO), ADVANTAGES, mask=MASK), TOKEN_LOSSES, **TIGHT)


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


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
def test_gspo_golden(loss: Any) -> None:
    x = tensor([[0.2, -0.1, 0.05], [-0.3, 0.1, math.nan]])
    mask, advantages = ~x.isnan(), tensor([[1.0] * 3, [-1.0] * 3])
    weights = token_weights(mask, "seq-mean-token-mean")
    losses = loss(x, torch.zeros_like(x), advantages, mask=mask)
    assert_close(losses, tensor([[-1.000400] * 3, [0.999700, 0.999700, 0]]), **TIGHT)
    assert float((losses * weights).sum()) == pytest.approx(-0.000350, abs=2e-6)
    # s = 1.051271 and 0.904837
    wide = loss(x, torch.zeros_like(x), advantages, mask=mask, clip_low=1.0, clip_high=math.inf)
    assert_close(wide, tensor([[-1.051271] * 3, [0.904837, 0.904837, 0]]), **TIGHT)
    assert float((wide * weights).sum()) == pytest.approx(-0.073217, abs=2e-6)


# tau → value at ratio 1 and at 2, gradient at some ratio
def test_sapo_golden() -> None:
    def value(ratio: float, tau: float) -> float:
        return -float(sapo_loss(tensor([ratio]).log(), tensor([0.0]), tensor([1.0]), tau_positive=tau))

    def factor(ratio: float, tau: float, advantage: float) -> float:
        taus = {"tau_positive" if advantage > 0 else "tau_negative": tau}
        batch = Batch(tensor([ratio]).log(), tensor([0.0]), tensor([advantage]), torch.tensor([True]))
        return float(gradient(sapo_loss, batch, **taus)) / -advantage

    assert [value(1, 1), value(1, 2), value(2, 1), value(2, 2)] == pytest.approx([2, 1, 2.924234, 1.761594], abs=2e-6)
    for advantage in (2.0, -0.5):
        factors = [factor(1, 1, advantage), factor(2, 1, advantage), factor(0.5, 2, advantage)]
        assert factors == pytest.approx([1, 1.572895, 0.393224], abs=2e-6)


# Worked by hand: ρ = 1/2, 2, 8 with log π = log ρ - 1; -min(ρ, 5) A log π
def test_cispo_by_hand() -> None:
    x = tensor([0.5, 2.0, 8.0]).log()
    expected = -tensor([0.5, 2.0, 5.0]) * 3 * (x - 1)
    assert_close(cispo_loss(x - 1, torch.full_like(x, -1), torch.full_like(x, 3)), expected)
    bounded = cispo_loss(x - 1, torch.full_like(x, -1), torch.full_like(x, 3), ratio_low=0.8, ratio_high=1.2)
    assert_close(bounded, -tensor([0.8, 1.2, 1.2]) * 3 * (x - 1))


# The same formulas a token at a time, in plain Python, each as (loss, factor); r = ρ, p = log π, a = A.
Token = tuple[float, float]


def plain_clip(r: float, p: float, a: float, low: float = 0.8, high: float = 1.2) -> Token:
    cut = r > high if a > 0 else r < low
    return -a * (min(r, high) if a > 0 else max(r, low)), 0.0 if cut else r


def plain_dual_clip(r: float, p: float, a: float) -> Token:
    return (-a * 3.0, 0.0) if a < 0 and r > 3.0 else plain_clip(r, p, a, 0.8, 1.28)


def plain_cispo(r: float, p: float, a: float) -> Token:
    return -min(r, 5.0) * a * p, min(r, 5.0)


def plain_sapo(r: float, p: float, a: float) -> Token:
    tau = 1.0 if a > 0 else 1.05
    gate = 1 / (1 + math.exp(-tau * (r - 1)))
    return -a * 4 * gate / tau, 4 * gate * (1 - gate) * r


def plain_gipo(kernel: str, r: float, p: float, a: float) -> Token:
    z = math.log(r) / (0.7 if a > 0 else 0.35)
    omega = {"gaussian": math.exp(-0.5 * z * z), "laplace": math.exp(-abs(z)), "cauchy": 1 / (1 + z * z)}[kernel]
    return -a * omega * r, omega * r


def loss_of(name: str) -> Any:
    settings: dict[str, Any] = {"clip_high": 0.28, "dual_clip": 3.0} if name == "dual" else {}
    if name in ("gaussian", "laplace", "cauchy"):
        return partial(gipo_loss, kernel=name, sigma=0.7, negative_ratio=0.5)
    return partial(LOSSES["clip" if name == "dual" else name], **settings)


PLAIN: dict[str, Callable[[float, float, float], Token]] = {
    "clip": plain_clip,
    "dual": plain_dual_clip,
    "cispo": plain_cispo,
    "sapo": plain_sapo,
    "gaussian": partial(plain_gipo, "gaussian"),
    "laplace": partial(plain_gipo, "laplace"),
    "cauchy": partial(plain_gipo, "cauchy"),
}


@settings(deadline=None)
@pytest.mark.parametrize("name", PLAIN)
@given(batch=batches(per_turn=True))
def test_losses_and_gradients_are_those_of_a_plain_loop(name: str, batch: Batch) -> None:
    loss, plain = loss_of(name), PLAIN[name]
    values, slopes = torch.zeros_like(batch.old), torch.zeros_like(batch.old)
    for i, j in batch.mask.nonzero().tolist():
        p, a = float(batch.logprobs[i, j]), float(batch.advantages[i, j])
        values[i, j], factor = plain(math.exp(p - float(batch.old[i, j])), p, a)
        slopes[i, j] = -a * factor
    assert_close(loss(*batch.inputs, mask=batch.mask), values, atol=1e-12, rtol=1e-10)
    assert_close(gradient(loss, batch), slopes, atol=1e-12, rtol=1e-10)
    factors = gradient_factors(loss, *batch.inputs, mask=batch.mask)
    assert_close(factors * -batch.advantages, slopes, atol=1e-12, rtol=1e-10)


def plain_gspo(x: list[float], a: list[float]) -> tuple[list[float], float, list[bool]]:
    """Each token's loss, the sequence's ratio, and what is clipped; for one episode's tokens on the mask."""
    s = math.exp(sum(x) / len(x))
    clipped = [(each > 0 and s > 1 + 4e-4) or (each < 0 and s < 1 - 3e-4) for each in a]
    used = [(1 + 4e-4 if s > 1 else 1 - 3e-4) if cut else s for cut in clipped]
    return [-each * ratio for each, ratio in zip(a, used, strict=True)], s, clipped


@settings(deadline=None)
@given(batches(per_turn=True))
def test_gspo_of_tokens_is_that_of_a_plain_loop(batch: Batch) -> None:
    values, slopes = torch.zeros_like(batch.old), torch.zeros_like(batch.old)
    for i, on in enumerate(batch.mask):
        if on.any():
            a = batch.advantages[i][on]
            losses, s, cut = plain_gspo((batch.logprobs - batch.old)[i][on].tolist(), a.tolist())
            values[i][on] = tensor(losses)
            slopes[i][on] = -a * s * ~torch.tensor(cut)
    assert_close(gspo_token_loss(*batch.inputs, mask=batch.mask), values, atol=1e-12, rtol=1e-10)
    assert_close(gradient(gspo_token_loss, batch), slopes, atol=1e-12, rtol=1e-10)


@settings(deadline=None)
@given(batches())
def test_both_forms_of_gspo_agree_where_an_episode_has_one_advantage(batch: Batch) -> None:
    forms = [loss(*batch.inputs, mask=batch.mask) for loss in (gspo_loss, gspo_token_loss)]
    assert_close(forms[0], forms[1], atol=1e-12, rtol=1e-10)
    assert_close(gradient(gspo_loss, batch), gradient(gspo_token_loss, batch), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
def test_the_ratio_of_a_sequence_is_bounded(loss: Any) -> None:
    x = torch.full((1, 2), 30.0, dtype=torch.float64)
    assert loss(x, torch.zeros_like(x), -torch.ones_like(x))[0].tolist() == pytest.approx([math.exp(10)] * 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip", {"clip_low": 0.0}),
        ("clip", {"clip_low": 1.5}),
        ("clip", {"clip_high": math.nan}),
        ("clip", {"dual_clip": 1.0}),
        ("clip", {"dual_clip": math.inf}),
        ("gspo", {"clip_low": -1e-4}),
        ("gspo-token", {"clip_high": 0.0}),
        ("cispo", {"ratio_high": 0.0}),
        ("cispo", {"ratio_low": 1.1}),
        ("cispo", {"ratio_low": 0.5, "ratio_high": 0.4}),
        ("sapo", {"tau_positive": 0.0}),
        ("sapo", {"tau_negative": math.inf}),
        ("gipo", {"sigma": 0.0}),
        ("gipo", {"sigma": 1e-50}),
        ("gipo", {"negative_ratio": -1.0}),
        ("gipo", {"kernel": "box"}),
        ("gipo", {"truncate": 0.0}),
        ("gipo", {"max_log_ratio": math.nan}),
    ],
)
def test_settings_out_of_range_are_named(name: str, options: dict[str, Any]) -> None:
    wrong = list(options)[-1] if name != "cispo" or len(options) == 1 else "ratio_low"
    with pytest.raises(ValueError, match=wrong):
        LOSSES[name](LOG_RATIO, LOG_RATIO, ADVANTAGES * 0, **options)


def bad(inputs: list[Tensor], which: int, value: float) -> list[Tensor]:
    return [each.index_fill(1, torch.tensor([0]), value) if i == which else each for i, each in enumerate(inputs)]


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_input_says_what_is_wrong(name: str) -> None:
    loss, zeros = LOSSES[name], torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"advantages \(2, 1\); they must be equal"):
        loss(zeros, zeros, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"mask is torch.float32 \(2, 3\); wanted torch.bool"):
        loss(zeros, zeros, zeros, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"wanted torch.bool \(2, 3\)"):
        loss(zeros, zeros, zeros, mask=torch.ones(2, 2).bool())
    for which, what in enumerate(("logprobs", "old", "advantages")):
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(FloatingPointError, match=f"{what}: a value on the mask is not finite"):
                loss(*bad([zeros] * 3, which, value))


def test_gspo_wants_sequences_of_one_advantage() -> None:
    x = torch.zeros(2)
    for loss in (gspo_loss, gspo_token_loss):
        with pytest.raises(ValueError, match=r"needs \(B, T\)"):
            loss(x, x, x)
    with pytest.raises(ValueError, match="use gspo_token_loss"):
        gspo_loss(torch.zeros(1, 2), torch.zeros(1, 2), tensor([[1.0, 2.0]]))
