"""How the token losses of an optimiser step become one number: each token has a weight, the loss is their sum.

The weights come from counts over the *whole* step: all its micro-batches, on all ranks. With counts of a part alone,
as in TRL's `bnpo`, the loss would depend on how the step was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens on the mask, and episodes that have any. The counts of parts add up to those of the whole."""

    tokens: int = 0
    episodes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.episodes + other.episodes)


def count(mask: Tensor) -> Counts:
    """Counts of a mask (B, T) bool."""
    _check(mask)
    return Counts(int(mask.sum()), int(mask.any(1).sum()))


def token_weights(mask: Tensor, mode: str, *, width: int | None = None, step: Counts | None = None) -> Tensor:
    """Each token's weight in the step's loss; the loss is the weighted sum of the token losses.

    mask (B, T) bool over *all* episodes of the optimiser step, or over a part of them if `step` has the counts of
    all. An episode is never cut. Under data parallelism `step` sums over ranks; where the wrapper then averages
    gradients over ranks, as DistributedDataParallel does, multiply by their number.

    Episodes without a token on the mask do not count (TRL counts them; verl's present code does not).
    token-mean (DAPO; TRL `dapo`, `cispo`): every token the same.
    seq-mean-token-mean (GRPO, GSPO, SAPO; TRL `grpo`): every episode the same, its tokens share.
    seq-mean-token-sum (IGPO's code; with `gspo_loss` it is TRL's `luspo`): the mean over episodes of token sums.
    seq-mean-token-sum-norm (Dr.GRPO as in verl): all tokens over the constant `width`. For TRL's `dr_grpo` make it
    episodes of the step times the longest length allowed.

    Returns (B, T) float64, 0 off the mask; all 0 when nothing counts. Raises ValueError for another mode, shape or
    type of mask, a missing width, and a `step` smaller than its part.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {mode!r}; choose one of {', '.join(AGGREGATIONS)}")
    own = count(mask)
    whole = own if step is None else step
    if whole.tokens < own.tokens or whole.episodes < own.episodes:
        raise ValueError(f"the step has {whole}, less than this part's {own}; add up the counts of all parts first")
    on = mask.double()
    if mode == "token-mean":
        return on / max(whole.tokens, 1)
    if mode == "seq-mean-token-sum-norm":
        if width is None or width < 1:
            raise ValueError(f"width={width}: seq-mean-token-sum-norm divides by a constant of 1 or more")
        return on / width
    if mode == "seq-mean-token-mean":
        on = on / on.sum(1, keepdim=True).clamp(min=1)
    return on / max(whole.episodes, 1)


def _check(mask: Tensor) -> None:
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; wanted torch.bool (B, T)")
