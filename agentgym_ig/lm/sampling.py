"""One token from each row of logits, drawn with random numbers that the caller gives."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 512
"""Tokens whose probabilities are summed first: only the sums, and one block of each row, are gone through in order."""
_SMALL = 8 * _BLOCK
"""Tokens of a vocabulary that are gone through in order at once."""


def choose(logits: Tensor, temperature: float, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row whose part of the cumulated distribution holds the row's draw; 0 takes the likeliest.

    logits (B, vocabulary); draws (B,) float64, from 0 to below 1, not read at temperature 0. Returns (B,) tokens and
    (B,) float32 log-probabilities, in nats, under the distribution at that temperature. A token of probability 0 is
    never drawn.
    """
    scores = logits.float()
    probable = (scores / temperature if temperature not in (0.0, 1.0) else scores).softmax(-1)
    chosen = _drawn(probable, draws) if temperature else scores.argmax(-1, keepdim=True)
    return chosen[:, 0], probable.gather(-1, chosen)[:, 0].log()


def _drawn(probable: Tensor, draws: Tensor) -> Tensor:
    """(B, 1) tokens. Sums are in float64: over 150,000 tokens float32 would lose the unlikely ones."""
    size = probable.shape[-1]
    if size <= _SMALL:
        return _place(probable.double(), draws[:, None])[1]
    whole = size // _BLOCK * _BLOCK
    sums = [probable[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1), probable[:, whole:].sum(-1, keepdim=True)]
    share, block = _place(torch.cat(sums, -1).double(), draws[:, None])
    columns = block * _BLOCK + torch.arange(_BLOCK, device=probable.device)
    within = probable.gather(-1, columns.clamp(max=size - 1)).double().masked_fill(columns >= size, 0.0)
    return columns.gather(-1, _place(within, share)[1])


def _place(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Where a share (B, 1) of each row's sum is reached: how far into the weight that stands there, as a share of it,
    and its place, (B, 1) each. Weights of 0 are never reached.
    """
    upto = weights.cumsum(-1)
    # Rounding must not lead past the last weight that is above 0.
    wanted = torch.minimum(share * upto[:, -1:], torch.nextafter(upto[:, -1:], torch.zeros_like(share)))
    place = torch.searchsorted(upto, wanted, right=True).clamp(max=weights.shape[-1] - 1)
    own = weights.gather(-1, place)
    return ((wanted - upto.gather(-1, place) + own) / own).clamp(0.0, 1.0), place
