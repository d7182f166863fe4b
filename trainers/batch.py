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
class Stem:
    """Tokens of a conversation, at least one, that a forward pass is given again or for the first time.

    ids: the tokens. start: the position of the first; those before it are in the key-value cache.
    """

    ids: Sequence[int]
    start: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Stems with forced answers behind each, for one forward pass that continues cached conversations.

    A row's S columns are its stems one after the other, each followed by the prefix tree of its answers in
    pre-order: so a column sees itself and those columns before it whose subtree has not yet ended.

    ids, positions (B, S) long. cached (B, S) long, how many of the row's cached tokens a column sees.
    end (B, S) long, the column at which a column's subtree has ended.
    row, column, token (N,) long: where the log-probability of which scored token is read.
    scored: (A,) long, for every answer behind every stem of every row, how many of the N are its own.
    """

    ids: Tensor
    positions: Tensor
    cached: Tensor
    end: Tensor
    row: Tensor
    column: Tensor
    token: Tensor
    scored: Tensor

    def allowed(self, width: int, window: int | None = None) -> Tensor:
        """(B, S, width + S) bool: the cached tokens and the columns that each column sees.

        width: columns of the cache. window: how many positions a token looks back, itself included; None for all.
        """
        past = torch.arange(width, device=self.ids.device).expand(len(self.ids), -1)
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        sees_past = past[:, None, :] < self.cached[:, :, None]
        sees_column = (column <= column[:, None]) & (column[:, None] < self.end[:, None, :])
        allowed = torch.cat([sees_past, sees_column], -1)
        if window is not None:
            seen = torch.cat([past, self.positions], 1)
            allowed &= self.positions[:, :, None] - seen[:, None, :] < window
        return allowed


def pack(
    stems: Sequence[Sequence[Stem]], branches: Sequence[Sequence[Branch]], device: torch.device | str = "cpu"
) -> PackedBatch:
    """Put the forced answers `branches[b]` behind the last token of every stem of row b.

    Answers share the tokens that they begin with. The last token of an answer is predicted but never looked at,
    so it has no column of its own.
    """
    rows = [_pack_row(own, answers) for own, answers in zip(stems, branches, strict=True)]
    ids, positions, cached, end = (pad_rows([columns[i] for columns, _ in rows], 0, torch.long) for i in range(4))
    # Padding sees itself, or its softmax would be over nothing.
    end = end.maximum(torch.arange(end.shape[1]) + 1)
    places = [(b, *place) for b, (_, read) in enumerate(rows) for own in read for place in own]
    row, column, token = torch.tensor(places, dtype=torch.long).reshape(-1, 3).unbind(1)
    scored = torch.tensor([len(own) for _, read in rows for own in read], dtype=torch.long)
    tensors = (ids, positions, cached, end, row, column, token, scored)
    return PackedBatch(*(tensor.to(device) for tensor in tensors))


def _pack_row(stems: Sequence[Stem], branches: Sequence[Branch]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Ids, positions, cached and end of a row's columns; and per answer its (column, token) pairs."""
    nodes = sorted({branch.ids[:i] for branch in branches for i in range(len(branch.ids))} | {()})  # pre-order
    place = {node: i for i, node in enumerate(nodes)}
    ends = _subtree_ends([len(node) for node in nodes])
    ids: list[int] = []
    positions: list[int] = []
    cached: list[int] = []
    end: list[int] = []
    read: list[list[tuple[int, int]]] = []
    for stem in stems:
        root = len(ids) + len(stem.ids) - 1
        ids += [*stem.ids, *(node[-1] for node in nodes[1:])]
        last = stem.start + len(stem.ids) - 1
        positions += [*range(stem.start, last), *(last + len(node) for node in nodes)]
        cached += [stem.start] * (len(ids) - len(cached))
        end += [len(ids)] * len(stem.ids) + [root + own for own in ends[1:]]
        for branch in branches:
            spelt = range(len(branch.ids) - branch.scored, len(branch.ids))
            read.append([(root + place[branch.ids[:i]], branch.ids[i]) for i in spelt])
    return [ids, positions, cached, end], read


def _subtree_ends(depths: Sequence[int]) -> list[int]:
    """For each node of a tree in pre-order, the place after its last descendant."""
    ends = [len(depths)] * len(depths)
    for i in reversed(range(len(depths))):
        after = i + 1
        while after < len(depths) and depths[after] > depths[i]:
            after = ends[after]
        ends[i] = after
    return ends
