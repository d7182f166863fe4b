"""Advantages: pure functions from rewards to one number per turn.

Each takes tensors, computes in float64 and returns float64. `group` (B,) holds one id per question; statistics
never cross groups. Values off their mask, nan included, change nothing. A spread over a single value, or over
equal values, gives 0, never nan.
"""

from __future__ import annotations

import torch
from torch import Tensor


def standardise(
    values: Tensor, mask: Tensor, group: Tensor, *, ddof: int, floor: float = 0.0, eps: float = 1e-6, scale: bool = True
) -> Tensor:
    """Each value less its group's mean, over (sqrt(variance + floor) + eps) of its group.

    values, mask (B, K), mask bool; group (B,). ddof 0 is the population's variance, 1 the sample's.
    `scale=False` only takes off the mean. Returns (B, K) float64, 0 off the mask. Raises ValueError for other
    shapes and for a value on the mask that is not finite.
    """
    if values.shape != mask.shape or values.dim() != 2 or group.shape != values.shape[:1]:
        shapes = f"values {tuple(values.shape)}, mask {tuple(mask.shape)}, group {tuple(group.shape)}"
        raise ValueError(f"{shapes}: wanted (B, K), (B, K) and (B,)")
    x = values.double().masked_fill(~mask, 0.0)  # not values * mask: nan * 0 is nan
    if not torch.isfinite(x).all():
        raise ValueError("a reward is not finite; mask out what has no value")
    count = _group_sums(mask.sum(1).double(), group)
    mean = _group_sums(x.sum(1), group) / count.clamp(min=1)
    # float64 keeps the mean of equal values from becoming a difference that eps would blow up.
    centred = (x - mean[:, None]).masked_fill(~mask, 0.0)
    if not scale:
        return centred
    variance = _group_sums(centred.square().sum(1), group) / (count - ddof).clamp(min=1)
    return centred / ((variance + floor).sqrt() + eps)[:, None]


def _group_sums(values: Tensor, group: Tensor) -> Tensor:
    """(B,) for each row the sum over its group."""
    ids, place = group.unique(return_inverse=True)
    return torch.zeros(len(ids), dtype=values.dtype).index_add(0, place, values)[place]


def grpo_advantages(outcome: Tensor, group: Tensor, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): the outcome, standardised in its group, the same for all turns.

    outcome, group (B,). Returns (B,). A group of one gets 0 (verl hands it its raw reward instead).
    """
    return standardise(
        outcome[:, None], torch.ones_like(outcome, dtype=torch.bool)[:, None], group, ddof=ddof, eps=eps
    )[:, 0]


def igpo_advantages(
    gains: Tensor,
    has_gain: Tensor,
    outcome: Tensor,
    last: Tensor,
    group: Tensor,
    *,
    gamma: float = 1.0,
    joint: bool = False,
    scale: bool = True,
    gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
) -> Tensor:
    """IGPO (arXiv 2510.14967 v2, eqs. 5 and 6): discounted sum of standardised turn rewards, from the last turn back.

    gains, has_gain (B, K): information gain of each turn and whether it has one; outcome, group (B,);
    last (B,) long: index of each episode's last turn, where its outcome stands. gamma discounts per turn.
    joint: gains and outcomes in one standardisation (v1) instead of one each. Weights act afterwards.
    Returns (B, K), 0 after the last turn.

    Population variance, sqrt(variance + 1e-8) + 1e-6, as the released code. Unlike it, a turn without a gain
    contributes nothing and the others keep theirs; turn boundaries come from indices, so a turn whose
    standardised gain is exactly 0 is still a turn. Raises ValueError for a gain on or after the last turn.
    """
    turns = torch.arange(gains.shape[1])
    if (has_gain & (turns >= last[:, None])).any():
        raise ValueError("a gain stands on or after an episode's last turn; the answering turn has none")
    at_last = turns == last[:, None]
    rewards = torch.where(at_last, outcome[:, None].double(), gains.double())
    pools = [has_gain | at_last] if joint else [has_gain, at_last]
    z = sum(standardise(rewards, pool, group, ddof=0, floor=1e-8, scale=scale) for pool in pools)
    z = torch.as_tensor(z) * torch.where(at_last, outcome_weight, gain_weight)
    advantages = torch.zeros_like(z)
    after = torch.zeros(len(z), dtype=z.dtype)
    for turn in reversed(range(z.shape[1])):
        after = torch.where(turn <= last, z[:, turn] + gamma * after, 0.0)
        advantages[:, turn] = after
    return advantages
