"""Advantages per token: REINFORCE++ and generalised advantage estimation.

`mask` (B, T) bool holds the tokens that the policy wrote. In an episode of several turns the tokens between them are
the environment's: here they take no time, so a return passes over them as if they were not there. Everything is
computed and returned in float64 and is 0 off the mask; values off it, nan included, change nothing, and on it they
must be finite. There are no groups in these methods: whitening is over the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentgym_ig.trainers.advantages import drgrpo_advantages, finite, masked_returns, require_shape


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(variance + eps) over all tokens on the mask; the variance is the sample's (ddof 1).

    values, mask (B, T). Returns (B, T) float64; a single token, or equal values, get 0.
    """
    require_shape(mask.shape, values=values)
    x = finite("the value", values, mask)
    count = mask.sum()
    centred = (x - x.sum() / count.clamp(min=1)).masked_fill(~mask, 0.0)
    return centred * (centred.square().sum() / (count - 1).clamp(min=1) + eps).rsqrt()


def token_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each token on, over the tokens on the mask alone.

    rewards, mask (B, T); gamma per token of the policy. Returns (B, T) float64.
    """
    require_shape(mask.shape, rewards=rewards)
    return masked_returns(rewards, mask, gamma=gamma)


def reinforce_pp_advantages(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, eps: float = 1e-8) -> Tensor:
    """REINFORCE++ (Hu 2025, arXiv 2501.03262): the return from each token on, whitened over the batch.

    rewards, mask (B, T). Returns (B, T). Differs from verl's, which starts again from 0 before every observation, so
    that a reward at the end of an episode never reaches its earlier turns.
    """
    return whiten(token_returns(rewards, mask, gamma=gamma), mask, eps=eps)


def reinforce_pp_baseline_advantages(outcome: Tensor, mask: Tensor, group: Tensor, *, eps: float = 1e-8) -> Tensor:
    """REINFORCE++ with a baseline (same paper): the outcome less its group's mean, on every token, then whitened.

    outcome, group (B,); mask (B, T). Returns (B, T). A group of one has nothing to be compared with and enters the
    whitening with 0 (verl lets its raw reward in).
    """
    require_shape(mask.shape[:1], outcome=outcome, group=group)
    return whiten(drgrpo_advantages(outcome, group)[:, None].expand(mask.shape), mask, eps=eps)


def gae_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438), over the tokens on the mask.

    rewards, mask (B, T); values (B, T): what a value head expects from before each token on. The next value and the
    next advantage are those of the next token on the mask, and 0 after the last.

    Returns advantages and returns (advantage + value, what the value head is to learn), both (B, T). PPO then
    takes `whiten(advantages, mask)`.
    """
    require_shape(mask.shape, rewards=rewards, values=values)
    reward, value = finite("the reward", rewards, mask), finite("the value", values, mask)
    advantages = torch.zeros_like(reward)
    next_value, after = torch.zeros_like(reward[:, 0]), torch.zeros_like(reward[:, 0])
    for token in reversed(range(reward.shape[1])):
        on = mask[:, token]
        error = reward[:, token] + gamma * next_value - value[:, token]
        after = torch.where(on, error + gamma * lam * after, after)
        next_value = torch.where(on, value[:, token], next_value)
        advantages[:, token] = after.masked_fill(~on, 0.0)
    return advantages, advantages + value
