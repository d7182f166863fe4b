"""Policy losses: pure functions from log-probabilities and advantages to a loss per token.

They are kept apart from how tokens are averaged: `token_weights` gives each token's share of the whole
optimiser step, so a step cut into micro-batches has the same loss as one that is not. A step's loss is

    (clipped_loss(logprobs, old, advantages, mask=mask) * token_weights(mask, "token-mean")).sum()

All of them take logprobs, old and advantages of one shape, (B, T) in the trainers, in nats; `old` are those of the
policy that sampled the tokens. `mask` (bool, None for all) is true on the tokens that the policy wrote; what stands
off it, nan included, changes nothing, and the loss there is 0. `old` and the advantages get no gradient.
All raise ValueError for unequal shapes and for settings out of range, FloatingPointError for a value on the mask that
is not finite. x = logprobs - old, the ratio is ρ = e^x with x clamped to ± 20.

The gradient of a token's loss by its log-probability is -A times a factor, which is all that they differ in:

| loss | factor |
|---|---|
| `clipped_loss` | ρ, or 0 past the clip |
| `gspo_loss`, `gspo_token_loss` | the sequence's ratio s, or 0 past the clip |
| `cispo_loss` | ρ, at most a bound |
| `sapo_loss` | 4 σ (1 - σ) ρ with σ = sigmoid(τ (ρ - 1)) |
| `gipo_loss` | ω ρ, with ω falling from 1 with the distance of x from 0 |

`loss_statistics` reports on these factors. A loss of one's own is a function of the same form, a `PolicyLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from agentgym_ig.trainers.aggregation import AGGREGATIONS, token_weights
from agentgym_ig.trainers.kl import kl_k3
from agentgym_ig.trainers.masked import FINITE, MAX_LOG_RATIO, bounded, on_mask, require

__all__ = [
    "AGGREGATIONS",
    "KERNELS",
    "LOSSES",
    "MAX_LOG_RATIO",
    "PolicyLoss",
    "cispo_loss",
    "clipped_loss",
    "gipo_log_omega",
    "gipo_loss",
    "gspo_loss",
    "gspo_token_loss",
    "kl_k3",
    "sapo_loss",
    "token_weights",
]

MAX_LOG_SEQUENCE_RATIO = 10.0
"""GSPO's log-ratio of a sequence is clamped to at most this, as in verl."""


class PolicyLoss(Protocol):
    """A loss per token, its settings already bound, as by functools.partial."""

    def __call__(self, logprobs: Tensor, old: Tensor, advantages: Tensor, /, *, mask: Tensor | None = None) -> Tensor:
        """(B, T) each to (B, T), 0 off the mask."""
        ...


def clipped_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7), as a loss to be minimised.

    The probability ratio is clipped to [1 - clip_low, 1 + clip_high]; DAPO's clip-higher (arXiv 2503.14476, eq. 10)
    is 0.2 and 0.28. `dual_clip` (above 1; 3 in verl) bounds the loss where the advantage is negative (Ye et al. 2020,
    arXiv 1912.09729). Returns the loss of each token, same shape.
    """
    _check_clip(clip_low, clip_high)
    _, (own, before, advantages) = _inputs(logprobs, old, advantages, mask)
    loss = _surrogate(bounded(own - before).exp(), advantages, clip_low, clip_high)
    if dual_clip is not None:
        require("dual_clip", dual_clip, 1.0, FINITE)
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def gspo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """GSPO (Zheng et al. 2025, arXiv 2507.18071, eqs. 5 to 7): one ratio for a sequence, clipped as in PPO.

    Its ratio s is the exponential of the mean x over the episode's tokens on the mask: the whole episode is the
    sequence, without what the environment wrote. log s is clamped to at most 10, as in verl. The paper weighs by
    `seq-mean-token-mean`. Every token bears the loss of its episode, so (B, T) each.

    Raises ValueError also when advantages differ within an episode: their mean is all that would count.
    """
    _check_clip(clip_low, clip_high)
    mask, (own, before, advantages) = _inputs(logprobs, old, advantages, mask)
    ratio = _sequence_log_ratio(own - before, mask).exp().expand_as(own)
    low = advantages.masked_fill(~mask, math.inf).amin(1)
    high = advantages.masked_fill(~mask, -math.inf).amax(1)
    if (low < high).any():
        raise ValueError("advantages differ within an episode, where GSPO has one; use gspo_token_loss for turns")
    return _surrogate(ratio, advantages, clip_low, clip_high)


def gspo_token_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """GSPO-token (arXiv 2507.18071, eqs. 13 and 14): the sequence's ratio in value, each token's own in gradient.

    The ratio is sg[s] π / sg[π] with s as in `gspo_loss`, to which it is equal, in value and gradient, if advantages
    are the same all over an episode; they need not be.
    """
    _check_clip(clip_low, clip_high)
    mask, (own, before, advantages) = _inputs(logprobs, old, advantages, mask)
    sequence = _sequence_log_ratio(own - before, mask).detach()
    ratio = (own - own.detach() + sequence).exp()
    return _surrogate(ratio, advantages, clip_low, clip_high)


def cispo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    ratio_low: float = 0.0,
    ratio_high: float = 5.0,
) -> Tensor:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eqs. 4 and 5): -sg[clip(ρ)] A log π. No token loses its gradient.

    The bounds are on ρ itself, and 5 is TRL's example; the paper writes 1 - ε and 1 + ε, and does without the lower
    one, as here by default. Weighed by `token-mean` in both.
    """
    require("ratio_high", ratio_high, 0.0, math.inf)
    if not 0 <= ratio_low <= min(1.0, ratio_high):
        raise ValueError(f"ratio_low={ratio_low}; wanted within 0 and 1 and not above ratio_high={ratio_high}")
    _, (own, before, advantages) = _inputs(logprobs, old, advantages, mask)
    weight = bounded(own - before).exp().clamp(ratio_low, ratio_high).detach()
    return -weight * advantages * own


def sapo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Tensor:
    """SAPO (arXiv 2511.20347, eqs. 5 and 6): a soft gate, -A sigmoid(τ (ρ - 1)) 4 / τ.

    τ is tau_positive where the advantage is above 0, else tau_negative; the defaults are those of the paper and of
    verl. On policy the factor is 1, as for all others, but the value is -2 A / τ. Weighed by `seq-mean-token-mean`.
    """
    require("tau_positive", tau_positive, 0.0, FINITE)
    require("tau_negative", tau_negative, 0.0, FINITE)
    _, (own, before, advantages) = _inputs(logprobs, old, advantages, mask)
    tau = _by_sign(advantages, tau_positive, tau_negative)
    gate = torch.sigmoid(tau * (bounded(own - before).exp() - 1)) * 4 / tau
    return -advantages * gate


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda z: -z.square() / 2,
    "laplace": lambda z: -z.abs(),
    "cauchy": lambda z: -z.square().log1p(),
}
"""GIPO's log ω as a function of z = x / sigma."""
MIN_SIGMA = 1e-6
"""GIPO's sigma is above this: one that float32 rounds to 0 would make the loss 0 / 0."""


def gipo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    sigma: float = 1.0,
    negative_ratio: float = 1.0,
    kernel: str = "gaussian",
    truncate: float | None = None,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """GIPO (Lu et al. 2026, arXiv 2603.03955): -ω ρ A, with the trust weight ω = exp(-(x / sigma)² / 2) detached.

    No clip. The settings of ω are those of `gipo_log_omega`. x is first clamped to ± max_log_ratio, beyond which
    there is no gradient. The default sigma is that of AcceRL-Agent, which weighs by `seq-mean-token-mean`.

    Departures from the released code (distanceLu/GIPO): symmetric by default, where its script halves sigma for
    negative advantages; x is read from the log-probabilities, not as the logarithm of max(ρ, 1e-9); ω ρ is one
    exponential, so it does not become inf times 0.
    """
    require("max_log_ratio", max_log_ratio, 0.0, math.inf)
    _, (own, before, advantages) = _inputs(logprobs, old, advantages, mask)
    x = bounded(own - before, max_log_ratio)
    trust = gipo_log_omega(x, advantages, sigma=sigma, negative_ratio=negative_ratio, kernel=kernel, truncate=truncate)
    return -advantages * (x + trust).exp()


def gipo_log_omega(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    sigma: float = 1.0,
    negative_ratio: float = 1.0,
    kernel: str = "gaussian",
    truncate: float | None = None,
) -> Tensor:
    """Logarithm of GIPO's trust weight ω, 0 or less, detached; same shape as log_ratio and advantages.

    kernel: gaussian exp(-z² / 2), laplace exp(-|z|) or cauchy 1 / (1 + z²), with z = log_ratio / sigma. Where the
    advantage is 0 or less, sigma is sigma * negative_ratio (0.5 in the released script).
    truncate: within ω alone, log_ratio is clamped to ± this; None for no bound.
    """
    require("sigma", sigma, MIN_SIGMA, math.inf)
    require("sigma * negative_ratio", sigma * negative_ratio, MIN_SIGMA, math.inf)
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; choose one of {', '.join(KERNELS)}")
    x = log_ratio.detach()
    if truncate is not None:
        require("truncate", truncate, 0.0, math.inf)
        x = bounded(x, truncate)
    return KERNELS[kernel](x / _by_sign(advantages, sigma, sigma * negative_ratio))


LOSSES: dict[str, PolicyLoss] = {
    "clip": clipped_loss,
    "gspo": gspo_loss,
    "gspo-token": gspo_token_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "gipo": gipo_loss,
}


def _inputs(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    return on_mask(mask, logprobs=logprobs, old=old.detach(), advantages=advantages.detach())


def _check_clip(low: float, high: float) -> None:
    require("clip_low", low, 0.0, 1.0)
    require("clip_high", high, 0.0, math.inf)


def _by_sign(advantages: Tensor, positive: float, other: float) -> Tensor:
    """One number where the advantage is above 0, the other elsewhere; shape and type of the advantages."""
    return torch.full_like(advantages, other).masked_fill(advantages > 0, positive)


def _surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))


def _sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """(B, 1) mean over each row's tokens on the mask, 0 for a row without any. log_ratio is 0 off the mask."""
    if log_ratio.dim() != 2:
        raise ValueError(f"log-probabilities have shape {tuple(log_ratio.shape)}; a sequence's ratio needs (B, T)")
    mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.clamp(max=MAX_LOG_SEQUENCE_RATIO)
