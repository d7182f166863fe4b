"""Policy losses: pure functions from log-probabilities and advantages to a loss per token.

They are kept apart from how tokens are averaged: `token_weights` gives each token's share of the whole
optimiser step, so a step cut into micro-batches has the same loss as one that is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before the exponential, as verl does."""


def clipped_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7), as a loss to be minimised.

    logprobs, old, advantages: equal shapes, nats. The probability ratio is clipped to
    [1 - clip_low, 1 + clip_high]; `dual_clip` (> 1) bounds the loss where the advantage is negative.
    Returns the loss of each token, same shape.
    """
    if not logprobs.shape == old.shape == advantages.shape:
        shapes = (tuple(logprobs.shape), tuple(old.shape), tuple(advantages.shape))
        raise ValueError(f"log-probabilities, old ones and advantages have shapes {shapes}; they must be equal")
    ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per token, an estimate of KL(policy ‖ reference) that is never negative: e^x - x - 1 with x = reference - policy
    (Schulman 2020, "Approximating KL divergence", k3). Inputs in nats; x is clamped to ± 20.
    """
    x = (reference - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return x.exp() - x - 1


def token_weights(mask: Tensor, mode: str, *, width: int | None = None) -> Tensor:
    """Each token's weight in the step's loss; the loss is the weighted sum of the token losses.

    mask (B, T) bool over *all* episodes of the optimiser step. Episodes without a token on the mask do not count.
    token-mean: every token the same. seq-mean-token-mean: every episode the same, its tokens share.
    seq-mean-token-sum: the mean over episodes of their token sums. seq-mean-token-sum-norm: all tokens over
    the constant `width` (Dr.GRPO). Returns (B, T) float64, 0 off the mask.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {mode!r}; choose one of {', '.join(AGGREGATIONS)}")
    on = mask.double()
    if mode == "token-mean":
        return on / on.sum().clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        if width is None or width < 1:
            raise ValueError(f"width={width}: seq-mean-token-sum-norm divides by a constant of 1 or more")
        return on / width
    episodes = mask.any(1).sum().clamp(min=1)
    if mode == "seq-mean-token-sum":
        return on / episodes
    return on / on.sum(1, keepdim=True).clamp(min=1) / episodes


def clip_fraction(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> float:
    """Share of the tokens on the mask whose gradient the clip has cut off."""
    ratio = (logprobs - old).exp()
    cut = torch.where(advantages > 0, ratio > 1 + clip_high, ratio < 1 - clip_low) & (advantages != 0)
    return float(cut[mask].double().mean()) if mask.any() else 0.0
