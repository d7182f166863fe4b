"""Likelihoods of tokens and of gold answers under a policy (IGPO, arXiv 2510.14967, §3).

`agentgym_ig.belief` says what a belief is. `reference_beliefs` reads each from a forward pass of its own; `score`
reads all of them, and the log-probabilities of the policy's own tokens, from one pass over the episode. They
agree to 1e-4 in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agentgym_ig.belief import with_belief
from agentgym_ig.lm.encode import Branch, ConversationEncoder, Encoded
from agentgym_ig.text import Prompt
from agentgym_ig.trainers.batch import PackedBatch, TokenBatch, pack, pad
from agentgym_ig.types import Conversation, Trajectory

Model = Any
"""A transformers causal language model; its own classes are only partly typed."""


def token_logprobs(model: Model, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
    """(B, T) log-probability of each token given those before it; 0 at the first. Differentiable."""
    logits = model(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False).logits
    before = (torch.arange(batch.ids.shape[1], device=batch.ids.device) - 1).clamp(min=0).expand_as(batch.ids)
    return _gather_logprobs(logits, before, batch.ids, temperature)


def _gather_logprobs(logits: Tensor, source: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """(B, T) log-probability of `ids` under the outputs at columns `source`; 0 in column 0, that nothing predicts."""
    logits = logits.float() / temperature
    row = torch.arange(len(ids), device=ids.device)[:, None]
    logprobs = logits[row, source, ids] - logits.logsumexp(-1)[row, source]
    return logprobs * (torch.arange(ids.shape[1], device=ids.device) > 0)


@dataclass(frozen=True, slots=True)
class Scored:
    """One episode's likelihoods: `logprobs` (T,) of all its tokens, `beliefs` (decisions, answers)."""

    logprobs: Tensor
    beliefs: list[list[float]]


class Scorer:
    """Reads likelihoods from a transformers model without a gradient, `batch_size` episodes at a time."""

    def __init__(
        self,
        model: Model,
        encoder: ConversationEncoder,
        prompt: Prompt,
        *,
        temperature: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        self.model, self.encoder, self.prompt = model, encoder, prompt
        self.temperature, self.batch_size = temperature, batch_size

    def _branches(self, answers: Sequence[str]) -> list[Branch]:
        return [self.encoder.branch(answer, self.prompt) for answer in answers]

    @torch.no_grad()
    def score(self, conversations: Sequence[Encoded], answers: Sequence[Sequence[str]]) -> list[Scored]:
        """One packed forward pass for all decisions and all answers of each conversation.

        With no answers for a conversation its beliefs are empty lists; the token log-probabilities come anyway.
        """
        branches = [self._branches(own) for own in answers]
        scored: list[Scored] = []
        for start in range(0, len(conversations), self.batch_size):
            some = slice(start, start + self.batch_size)
            scored += self._score_batch(conversations[some], branches[some])
        return scored

    def _score_batch(self, conversations: Sequence[Encoded], branches: Sequence[Sequence[Branch]]) -> list[Scored]:
        batch = pack(conversations, branches, self.model.device)
        logprobs = self._packed_logprobs(batch)
        scored: list[Scored] = []
        for row, encoded in enumerate(conversations):
            decisions, answers = len(encoded.decisions), len(branches[row])
            mine = batch.branch[row]
            beliefs = [
                [float(logprobs[row][mine == decision * answers + answer].double().mean()) for answer in range(answers)]
                for decision in range(decisions)
            ]
            scored.append(Scored(logprobs[row, : len(encoded.ids)], beliefs))
        return scored

    def _packed_logprobs(self, batch: PackedBatch) -> Tensor:
        dtype = self.model.dtype
        mask = torch.zeros(batch.allowed.shape, dtype=dtype, device=batch.ids.device)
        mask.masked_fill_(~batch.allowed, torch.finfo(dtype).min)  # additive: right with every attention kernel
        logits = self.model(
            input_ids=batch.ids, attention_mask=mask[:, None], position_ids=batch.positions, use_cache=False
        ).logits
        return _gather_logprobs(logits, batch.source, batch.ids, self.temperature)

    @torch.no_grad()
    def reference_beliefs(self, conversation: Conversation, answers: Sequence[str]) -> list[list[float]]:
        """The same beliefs, a forward pass each: plainly right, and what `score` is tested against."""
        encoded = self.encoder.encode(conversation)
        return [
            [self._forced(encoded.ids[:decision], branch) for branch in self._branches(answers)]
            for decision in encoded.decisions
        ]

    def _forced(self, context: list[int], branch: Branch) -> float:
        ids = [*context, *branch.ids]
        batch = pad([Encoded(ids, [0] * len(ids), [])], self.model.device)
        logprobs = token_logprobs(self.model, batch, self.temperature)
        return float(logprobs[0, -branch.scored :].double().mean())

    def with_beliefs(self, episodes: Sequence[Trajectory]) -> list[Trajectory]:
        """The episodes with the belief in their first accepted answer filled in."""
        encoded = [self.encoder.encode(episode.conversation) for episode in episodes]
        scored = self.score(encoded, [episode.question.answers[:1] for episode in episodes])
        return [
            with_belief(episode, [own[0] for own in each.beliefs])
            for episode, each in zip(episodes, scored, strict=True)
        ]

    def beliefs(self, conversations: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """The belief at the end of each conversation, per answer: what an environment wrapper asks for.

        The last message of every conversation must be the environment's.
        """
        encoded = [self.encoder.encode(conversation) for conversation in conversations]
        last = [Encoded(own.ids, own.turn, own.decisions[-1:]) for own in encoded]
        return [scored.beliefs[0] for scored in self.score(last, answers)]
