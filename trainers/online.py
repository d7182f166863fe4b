"""Beliefs turn by turn, without reading a conversation again from its beginning."""

from __future__ import annotations

import weakref
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import DynamicCache

from agentgym_ig.lm import CACHED_TOKENS
from agentgym_ig.lm.alone import reading
from agentgym_ig.lm.encode import Branch, ConversationEncoder, Encoded
from agentgym_ig.prompts import Prompt
from agentgym_ig.trainers.batch import Stem
from agentgym_ig.trainers.readout import Model
from agentgym_ig.trainers.scoring import Scorer, branch_beliefs
from agentgym_ig.types import Conversation


class OnlineScorer(Scorer):
    """A scorer whose `beliefs` keeps the keys and values of what it has read: a later call reads only new tokens.

    A conversation finds its own by its exact tokens, up to the last reply that was read before; so conversations
    may come in any order, end, or begin alike. Whichever were not asked about for the longest are forgotten first,
    and read again when they come back. All are forgotten with every step of any optimizer in this process, and when
    a weight of the model has been written to, moved or replaced; a write into `.data`, and an adapter that is switched
    on or off, go unseen and need a `clear()`.

    max_cached_tokens: tokens kept between calls, equal beginnings counted once. One takes two vectors per layer and
    key-value head: 24 KB in Qwen2.5-0.5B in float32, 56 KB in Qwen2.5-7B in bfloat16. Fewer than all unfinished
    conversations hold makes it slow, never wrong.
    """

    def __init__(
        self,
        model: Model,
        encoder: ConversationEncoder,
        prompt: Prompt,
        *,
        temperature: float = 1.0,
        batch_size: int = 64,
        max_cached_tokens: int = CACHED_TOKENS,
    ) -> None:
        super().__init__(model, encoder, prompt, temperature=temperature, batch_size=batch_size)
        self.max_cached_tokens = max_cached_tokens
        self._weights: Any = None
        self.clear()
        own = weakref.ref(self)

        def forget(*_: object) -> None:  # a fused optimizer leaves a weight's version as it was
            scorer = own()
            if scorer is not None:
                scorer.clear()

        weakref.finalize(self, register_optimizer_step_post_hook(forget).remove)

    def clear(self) -> None:
        """Forget all that was read."""
        # From a conversation's tokens up to one of its decisions to (tokens since the decision before, features).
        # What a conversation has later is older here, so it is forgotten first and no entry lacks its beginning.
        self._read: OrderedDict[bytes, Tensor] = OrderedDict()
        self.cached_tokens = 0

    @torch.no_grad()
    def beliefs(self, conversations: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """As `Scorer.beliefs`. Threads may call it at once; they take turns."""
        encoded = [self.encoder.encode(conversation) for conversation in conversations]
        branches = [self._branches(own) for own in answers]
        found: list[list[float]] = []
        with reading(self.model):
            weights = [(id(own), own._version, own.data_ptr(), own.dtype) for own in self.model.parameters()]
            if weights != self._weights:
                self.clear()
                self._weights = weights
            for start in range(0, len(encoded), self.batch_size):
                some = slice(start, start + self.batch_size)
                found += self._continue(encoded[some], branches[some])
        return found

    def _continue(self, conversations: Sequence[Encoded], branches: Sequence[Sequence[Branch]]) -> list[list[float]]:
        keys = [_keys(own) for own in conversations]
        known = [self._recall(own) for own in keys]
        lengths = [sum(map(len, own)) for own in known]
        # The last token is read in any case: the answers' first tokens are predicted from it.
        starts = [min(n, own.decisions[-1] - 1) for n, own in zip(lengths, conversations, strict=True)]
        stems = [
            [Stem(own.ids[start : own.decisions[-1]], start)] for start, own in zip(starts, conversations, strict=True)
        ]
        cache = self._cache(known)
        beliefs = branch_beliefs(self.model, stems, branches, cache, self.temperature)
        new = self._features(cache, max(lengths))
        for row, own in enumerate(conversations):
            for key, decision in zip(keys[row], own.decisions, strict=True):
                if key not in self._read:
                    self._read[key] = new[row, lengths[row] - starts[row] : decision - starts[row]].clone()
                    self.cached_tokens += len(self._read[key])
                lengths[row] = max(lengths[row], decision)
            for key in reversed(keys[row]):
                self._read.move_to_end(key)
        while self.cached_tokens > self.max_cached_tokens:
            self.cached_tokens -= len(self._read.popitem(last=False)[1])
        return [own[0] for own in beliefs]

    def _recall(self, keys: Sequence[bytes]) -> list[Tensor]:
        """What is known of a conversation, from its beginning."""
        known: list[Tensor] = []
        for key in keys:
            if key not in self._read:
                break
            known.append(self._read[key])
        return known

    def _features(self, cache: DynamicCache, start: int) -> Tensor:
        """(B, tokens, features): the keys and values of all layers from column `start` on, side by side."""
        layers: list[Any] = cache.layers
        parts: list[Tensor] = [part[:, :, start:] for layer in layers for part in (layer.keys, layer.values)]
        self._shapes = [(part.shape[1], part.shape[3]) for part in parts]
        return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1)

    def _cache(self, known: Sequence[Sequence[Tensor]]) -> DynamicCache:
        """The cache of a batch, padded on the right."""
        cache = DynamicCache()
        if not any(known):
            return cache
        features = next(own for own in known if own)[0]
        padded = pad_sequence([torch.cat([features[:0], *own]) for own in known], batch_first=True)
        sizes = [heads * width for heads, width in self._shapes]
        parts = [
            part.unflatten(-1, shape).transpose(1, 2)
            for part, shape in zip(padded.split(sizes, -1), self._shapes, strict=True)
        ]
        for layer, (key, value) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            cache.update(key, value, layer)
        return cache


def _keys(encoded: Encoded) -> list[bytes]:
    """The tokens before each decision, exactly, as something that is quickly looked up."""
    ids = array("q", encoded.ids)
    return [ids[:decision].tobytes() for decision in encoded.decisions]
