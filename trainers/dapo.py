"""What DAPO (Yu et al. 2025, arXiv 2503.14476) adds beside its loss: overlong shaping and dynamic sampling.

Its loss is `clipped_loss` with `clip_high=0.28` under `token-mean`, without a KL term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentgym_ig.trainers.advantages import group_sums


def overlong_penalty(lengths: Tensor, *, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Soft overlong punishment (eq. 13): a reward that falls from 0 to -factor over the last `buffer` tokens.

    lengths (B,): tokens that the policy wrote. Up to limit - buffer it is 0, from limit on -factor (the paper's is 1).
    Returns (B,) float64. verl's released form has no floor and goes on falling past the limit, which its own length
    limit never reaches. Raises ValueError for a buffer not within 1..limit, a negative factor or length.
    """
    if not 1 <= buffer <= limit or not factor >= 0:
        raise ValueError(f"limit={limit}, buffer={buffer}, factor={factor}; wanted 1 <= buffer <= limit, factor >= 0")
    if lengths.dim() != 1 or (lengths < 0).any():
        raise ValueError(f"lengths {tuple(lengths.shape)}: wanted (B,), none negative")
    # Not -factor * x, which gives -0.0 to an episode within its limit.
    return ((limit - buffer - lengths.double()) / buffer).clamp(-1, 0) * factor


def varied_groups(scores: Tensor, group: Tensor) -> Tensor:
    """Dynamic sampling (eq. 11): true for the episodes of groups whose scores are not all the same.

    scores (B,), such as exact match or the outcome; group (B,) ids. Returns (B,) bool. Equality is exact: verl asks
    for a standard deviation above 0, which rounding gives to equal scores too (three times 0.1). A group of one is
    dropped, for it has no advantage (verl keeps it). Raises ValueError for other shapes and scores not finite.
    """
    if scores.dim() != 1 or scores.shape != group.shape:
        raise ValueError(f"scores {tuple(scores.shape)}, group {tuple(group.shape)}: wanted (B,) and (B,)")
    if not torch.isfinite(scores).all():
        raise ValueError("a score is not finite; leave out the episodes that have none")
    first = torch.full_like(group, len(group))
    _, place = group.unique(return_inverse=True)
    first.scatter_reduce_(0, place, torch.arange(len(group), device=group.device).to(group), "amin")
    return _in_groups(scores != scores[first[place]], group)


def groups_with_signal(advantages: Tensor, group: Tensor, *, tolerance: float = 1e-8) -> Tensor:
    """Dynamic sampling by what is learned from: true for the episodes of groups with any advantage beyond tolerance.

    advantages (B, K) per turn or (B, T) per token, 0 where there is none; group (B,). Returns (B,) bool. Ours, for
    dense rewards: a group whose outcomes are all equal can still differ in information gain.
    Raises ValueError for other shapes, advantages not finite, a negative tolerance.
    """
    if advantages.dim() != 2 or group.shape != advantages.shape[:1]:
        raise ValueError(f"advantages {tuple(advantages.shape)}, group {tuple(group.shape)}: wanted (B, K) and (B,)")
    if not torch.isfinite(advantages).all():
        raise ValueError("an advantage is not finite; wanted 0 where there is none")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}; wanted 0 or more")
    return _in_groups((advantages.abs() > tolerance).any(1), group)


def _in_groups(found: Tensor, group: Tensor) -> Tensor:
    """(B,) bool: whether any episode of the same group has `found`."""
    return group_sums(found.long(), group) > 0
