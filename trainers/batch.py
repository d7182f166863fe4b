"""Encoded conversations to padded tensors. The only place of the trainers where padding is made.

Axis letters, here and in every module of this folder: `B` episodes, `K` turns, `T` tokens. Log-probabilities
are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentgym_ig.lm.encode import OBSERVED, Branch, Encoded


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Padded on the right. ids (B, T) long; real (B, T) bool; turn (B, T) long, `OBSERVED` off the policy's tokens."""

    ids: Tensor
    real: Tensor
    turn: Tensor

    @property
    def sampled(self) -> Tensor:
        """(B, T) bool: the tokens that the policy wrote, the only ones that are trained on."""
        return self.turn != OBSERVED

    def spread(self, per_turn: Tensor) -> Tensor:
        """(B, K) values per turn to (B, T) values per token, 0 off the policy's tokens."""
        return per_turn.gather(1, self.turn.clamp(min=0)) * self.sampled


def pad_rows(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
    """Ragged rows to (B, longest)."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=fill
    )


def pad(conversations: Sequence[Encoded], device: torch.device | str = "cpu") -> TokenBatch:
    """One row per conversation."""
    ids = pad_rows([encoded.ids for encoded in conversations], 0, torch.long)
    turn = pad_rows([encoded.turn for encoded in conversations], OBSERVED, torch.long)
    lengths = torch.tensor([len(encoded.ids) for encoded in conversations])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    return TokenBatch(ids.to(device), real.to(device), turn.to(device))


@dataclass(frozen=True, slots=True)
class Experience:
    """What an update learns from: B encoded episodes, each one's (T,) log-probabilities as they were sampled,
    and (B, K) an advantage per turn.
    """

    encoded: Sequence[Encoded]
    old: Sequence[Tensor]
    advantages: Tensor

    def rows(self, chosen: Sequence[int], device: torch.device | str) -> tuple[TokenBatch, Tensor, Tensor]:
        """Some of the episodes padded: their tokens, (B, T) old log-probabilities and (B, T) advantages per token."""
        batch = pad([self.encoded[row] for row in chosen], device)
        old = torch.nn.utils.rnn.pad_sequence([self.old[row] for row in chosen], batch_first=True)
        return batch, old.to(device), batch.spread(self.advantages[list(chosen)].to(device, torch.float32))


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Conversations with forced answers as branches behind them, for one forward pass.

    Columns are the trunk's tokens, then those of every branch; S is their padded number.
    ids, positions (B, S) long; allowed (B, S, S) bool, whether a row's token may look at a column's;
    source (B, S) long, the column whose output predicts this column's token.
    branch (B, S) long, the number of the branch whose scored token stands there, or -1.
    """

    ids: Tensor
    positions: Tensor
    allowed: Tensor
    source: Tensor
    branch: Tensor


def pack(
    conversations: Sequence[Encoded], branches: Sequence[Sequence[Branch]], device: torch.device | str = "cpu"
) -> PackedBatch:
    """Put every branch of a row behind every one of its decisions.

    `branches[b]` are the forced answers of conversation b. Branches of a row are numbered decision by decision:
    number = decision * len(branches[b]) + place in `branches[b]`. A branch sees the trunk up to its decision
    and itself; its positions go on from there.
    """
    rows = [_pack_row(encoded, own) for encoded, own in zip(conversations, branches, strict=True)]
    ids, positions, source, limit, owner, scored = (
        pad_rows([row[i] for row in rows], fill, torch.long) for i, fill in enumerate((0, 0, 0, 0, -2, -1))
    )
    width = ids.shape[1]
    column = torch.arange(width)
    sees_trunk = (owner[:, None, :] == -1) & (column < limit[:, :, None])
    sees_itself = (owner[:, :, None] == owner[:, None, :]) & (column <= column[:, None])
    sees_itself &= owner[:, :, None] != -1
    # Padding looks at itself, or its softmax would be over nothing.
    allowed = sees_trunk | sees_itself | torch.eye(width, dtype=torch.bool)
    packed = (ids, positions, allowed, source, scored)
    return PackedBatch(*(tensor.to(device) for tensor in packed))


def _pack_row(encoded: Encoded, branches: Sequence[Branch]) -> tuple[list[int], ...]:
    length = len(encoded.ids)
    ids, positions = list(encoded.ids), list(range(length))
    source = [max(i - 1, 0) for i in range(length)]
    limit, owner, scored = list(range(1, length + 1)), [-1] * length, [-1] * length
    number = 0
    for decision in encoded.decisions:
        for branch in branches:
            count, first = len(branch.ids), len(ids)
            ids += branch.ids
            positions += range(decision, decision + count)
            source += [decision - 1, *range(first, first + count - 1)]
            limit += [decision] * count
            owner += [number] * count
            scored += [-1] * (count - branch.scored) + [number] * branch.scored
            number += 1
    return ids, positions, source, limit, owner, scored
