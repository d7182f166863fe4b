"""Decoding a batch of conversations with a transformers model: what is read once is not read again.

In place of `generate`, which reads every prompt from its beginning, goes on with rows that have ended, and copies the
whole cache for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from agentgym_ig.lm.arguments import accepted, with_cache

_ROOM = 64
"""Columns that a cache is made longer than needed, at least."""
AT_ONCE = 4
"""Rows whose states are copied out of the cache together."""


class RoomyLayer(DynamicLayer):
    """Keys and values with room behind them that new ones are written into: `DynamicLayer` copies all for a token."""

    _rooms: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(B, heads, T, width) each, added to what the layer holds; returns all of it.

        Under autocast they are held in its type: attention would cast all of them to it, for every token anew.
        """
        new = (key_states, value_states)
        if torch.is_autocast_enabled(device := key_states.device.type):
            new = (key_states.to(dtype := torch.get_autocast_dtype(device)), value_states.to(dtype))
        if self._rooms is None:
            self.hold([own[:, :, :0] for own in new], 0)
        assert self._rooms is not None
        before, after = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if self._rooms[0].shape[2] < after:
            self._rooms = [_longer(room[:, :, :before], after) for room in self._rooms]
        for room, own in zip(self._rooms, new, strict=True):
            room[:, :, before:after] = own
        return self._show(after)

    def hold(self, rooms: Sequence[Tensor], length: int) -> None:
        """Begin with the first `length` columns of keys and values that have room behind them."""
        self.lazy_initialization(*rooms)
        self._rooms = list(rooms)
        self._show(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Have these rows, in this order; one may come several times."""
        if self._rooms is not None:
            length = self.get_seq_length()
            self._rooms = [room[indices] for room in self._rooms]
            self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        assert self._rooms is not None
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)
        return self.keys, self.values


def _longer(held: Tensor, needed: int) -> Tensor:
    room = held.new_empty(*held.shape[:2], needed + max(_ROOM, needed // 4), held.shape[3])
    room[:, :, : held.shape[2]] = held
    return room


class Decoding:
    """A batch of contexts that a model goes on with, a token at a time.

    A row's columns are: what was kept of it, what is new of its context, and what it was continued by, each padded on
    the left. Of a model that allows it equal contexts are read once.

    Args:
        model: in evaluation mode.
        contexts: tokens of each row, at least one.
        kept: of each row the states of its first tokens, fewer than all, as `states` gave them; None without.
        pad: a token that stands where there is none.
        reusable: whether `kept.reasons_against` had nothing against the model. If not, nothing may be kept, and rows
            cannot be selected.
    """

    def __init__(
        self, model: Any, contexts: Sequence[list[int]], kept: Sequence[Tensor | None], *, pad: int, reusable: bool
    ) -> None:
        self.model, self.pad, self.reusable = model, pad, reusable
        self.contexts, self.kept = contexts, kept
        config = model.config.get_text_config()
        self.cache: Any = Cache(layer_class_to_replicate=RoomyLayer) if reusable else DynamicCache(config=config)
        self._known = [0 if own is None else own.shape[2] for own in kept]
        self._past = self._width = 0
        self._mask: Tensor | None = None
        known = accepted(model)
        self._settings = with_cache(model, self.cache) | ({"logits_to_keep": 1} if "logits_to_keep" in known else {})
        self._wants_positions = "position_ids" in known

    def read(self) -> Tensor:
        """(B, vocabulary) logits behind the contexts."""
        number: dict[Any, int] = {}
        same = [
            number.setdefault(tuple(own) if self.reusable else place, len(number))
            for place, own in enumerate(self.contexts)
        ]
        rows = [same.index(own) for own in range(len(number))]  # the first of those that are equal
        new = [self.contexts[row][self._known[row] :] for row in rows]
        self._past, self._width = max(self._known[row] for row in rows), max(map(len, new))
        device = self.model.device
        ids = torch.tensor([[self.pad] * (self._width - len(own)) + own for own in new], device=device)
        real = [
            [0] * (self._past - known) + [1] * known + [0] * (self._width - len(own)) + [1] * len(own)
            for known, own in zip([self._known[row] for row in rows], new, strict=True)
        ]
        mask = torch.tensor(real, device=device)
        self._positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -self._width :]
        # Without a mask attention is faster, so none is made where nothing is padded.
        self._mask = None if all(all(own) for own in real) else mask
        self._recall(rows)
        logits = self._forward(ids)
        self._positions = self._positions[:, -1:]
        self._known = [self._known[rows[own]] for own in same]
        if len(rows) < len(same):
            logits = logits[self._select(same)]
        return logits

    def go_on(self, tokens: Tensor) -> Tensor:
        """(B,) one more token of each row to (B, vocabulary) logits behind it."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], -1)
        self._positions = self._positions + 1
        return self._forward(tokens[:, None])

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.contexts = [self.contexts[row] for row in rows]
        self._known = [self._known[row] for row in rows]
        self._select(rows)

    def states(self, rows: Sequence[int], lengths: Sequence[int]) -> Iterator[Tensor]:
        """The keys and values of the first `lengths` tokens of some rows, (2 layers, heads, tokens, width) each."""
        parts = [part for layer in self.cache.layers for part in (layer.keys, layer.values)]
        for first in range(0, len(rows), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            index = torch.tensor(rows[some], device=self.model.device)
            block = parts[0].new_empty(len(parts), len(index), *parts[0].shape[1:])
            for number, part in enumerate(parts):  # stacked, all of them would be there twice
                block[number] = part[index]
            for place, (row, length) in enumerate(zip(rows[some], lengths[some], strict=True)):
                known, own = self._known[row], len(self.contexts[row])
                spans = [
                    (self._past - known, self._past),
                    (self._past + self._width - (own - known), self._past + self._width + length - own),
                ]
                yield torch.cat([block[:, place, :, begin:end] for begin, end in spans], 2)

    @property
    def even(self) -> bool:
        """Whether keys and values have one shape in all layers, as `states` wants it."""
        return len({part.shape for layer in self.cache.layers for part in (layer.keys, layer.values)}) == 1

    def _recall(self, rows: Sequence[int]) -> None:
        """Put what was kept into the cache."""
        kept = [(place, own) for place, row in enumerate(rows) if (own := self.kept[row]) is not None]
        self.kept = ()
        if not kept:
            return
        parts, heads, _, width = kept[0][1].shape
        room = kept[0][1].new_zeros(parts, len(rows), heads, self._past + self._width + _ROOM, width)
        for place, own in kept:
            room[:, place, :, self._past - own.shape[2] : self._past] = own
        make: Any = RoomyLayer  # transformers leaves its layers untyped
        for number in range(0, parts, 2):
            layer = make()
            layer.hold([room[number], room[number + 1]], self._past)
            self.cache.layers.append(layer)

    def _select(self, rows: Sequence[int]) -> Tensor:
        index = torch.tensor(rows, device=self.model.device)
        self.cache.batch_select_indices(index)
        self._mask = None if self._mask is None else self._mask[index]
        self._positions = self._positions[index]
        return index

    def _forward(self, ids: Tensor) -> Tensor:
        positions = {"position_ids": self._positions} if self._wants_positions else {}
        out = self.model(input_ids=ids, attention_mask=self._mask, **positions, **self._settings)
        logits: Tensor = out.logits[:, -1]
        return logits
