"""Likelihoods of tokens and of gold answers under a policy (IGPO, arXiv 2510.14967, §3).

`agentgym_ig.belief` says what a belief is. `reference_beliefs` reads each from a forward pass of its own. `score`
reads the whole episode once, as causal attention does it fastest, keeps the keys and values, and reads all forced
answers after all turns in one short second call. They agree to 1e-4 in float32. `docs/scoring.md` says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

from agentgym_ig.belief import with_belief
from agentgym_ig.lm.alone import reading
from agentgym_ig.lm.arguments import with_cache
from agentgym_ig.lm.attention import attending_by, kernel_of
from agentgym_ig.lm.encode import OBSERVED, Branch, ConversationEncoder, Encoded
from agentgym_ig.lm.kept import odd_positions
from agentgym_ig.prompts import Prompt
from agentgym_ig.trainers.batch import PackedBatch, Stem, TokenBatch, pack, pad
from agentgym_ig.trainers.packing import inputs_of, packing
from agentgym_ig.trainers.readout import Model, read_tokens_at
from agentgym_ig.types import Conversation, Trajectory


def token_logprobs(
    model: Model,
    batch: TokenBatch,
    temperature: float = 1.0,
    *,
    wanted: Tensor | None = None,
    cache: DynamicCache | None = None,
) -> Tensor:
    """(B, T) log-probability of each token given those before it; 0 at the first. Differentiable.

    wanted: (B, T) bool, the tokens to read, all real ones by default; the others get 0, and no logits are made for
    them. cache: an empty one, to be filled with the keys and values of all tokens; not inside `packing`.
    """
    values, _ = _read(model, batch, temperature, batch.real if wanted is None else wanted, cache)
    return values


def token_entropies(
    model: Model, batch: TokenBatch, temperature: float = 1.0, *, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities as `token_logprobs` gives them, and (B, T) the entropy of the distribution that each
    wanted token was drawn from, in nats. Both differentiable.
    """
    return _read(model, batch, temperature, wanted, None)


def _read(
    model: Model, batch: TokenBatch, temperature: float, wanted: Tensor, cache: DynamicCache | None
) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities and entropies of the wanted tokens, 0 at all others."""
    row, before = wanted[:, 1:].nonzero(as_tuple=True)
    inputs, places = inputs_of(model, batch.ids, batch.real, (row, before))
    if cache is not None:
        inputs |= with_cache(model, cache)
    values, entropies = read_tokens_at(model, places, batch.ids[row, before + 1], temperature, inputs)
    return _placed(values, row, before + 1, batch.ids), _placed(entropies, row, before + 1, batch.ids)


def _placed(values: Tensor, row: Tensor, column: Tensor, ids: Tensor) -> Tensor:
    """(N,) values at their rows and columns of (B, T) zeros."""
    return values.new_zeros(ids.shape).index_put((row, column), values)


_MASKED = ("sdpa", "eager", "flex_attention")
"""Attention kernels that `_mask` makes masks for."""


def branch_beliefs(
    model: Model,
    stems: Sequence[Sequence[Stem]],
    branches: Sequence[Sequence[Branch]],
    cache: DynamicCache,
    temperature: float,
) -> list[list[list[float]]]:
    """The belief in each of `branches[b]` behind each of `stems[b]`, in one forward pass that continues `cache`.

    The cache's rows are aligned at position 0 and get the new columns added. Returns (rows, stems, answers).
    """
    batch = pack(stems, branches, model.device)
    kernel = kernel_of(model)
    with attending_by(model, kernel if kernel in _MASKED else "sdpa"):  # FlashAttention takes no mask
        inputs = {
            "input_ids": batch.ids,
            "position_ids": batch.positions,
            "attention_mask": _tree_masks(model, batch, cache.get_seq_length()),
        } | with_cache(model, cache)
        logprobs, _ = read_tokens_at(model, (batch.row, batch.column), batch.token, temperature, inputs)
    means = iter([float(own.mean()) for own in logprobs.double().cpu().split(batch.scored.tolist())])
    return [[[next(means) for _ in answers] for _ in own] for own, answers in zip(stems, branches, strict=True)]


def _tree_masks(model: Model, batch: PackedBatch, width: int) -> Any:
    """What the model takes as its attention mask: one, or one for each kind of layer that it has.

    Raises ValueError for layers that cannot follow a tree.
    """
    config = model.config.get_text_config()
    _check_positions(config)
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of {', '.join(sorted(other))} cannot be scored; take a model with plain attention")
    if "sliding_attention" in kinds:
        every = {"full_attention": batch.allowed(width), "sliding_attention": batch.allowed(width, window)}
        return {kind: _mask(model, allowed) for kind, allowed in every.items()}
    return _mask(model, batch.allowed(width, None if kinds else window))  # without kinds, all layers are alike


def _check_positions(config: Any) -> None:
    """Raise ValueError for positions that no cache or tree can have."""
    if other := odd_positions(config):
        raise ValueError(f"a model with {' and '.join(other)} cannot be scored; take one with plain rotary positions")


def _mask(model: Model, allowed: Tensor) -> Any:
    """(B, S, width + S) bool in the form that the model's attention kernel wants."""
    kernel = kernel_of(model)
    if kernel == "flex_attention":
        rows, columns, width = allowed.shape
        return create_block_mask(lambda b, h, q, k: allowed[b, q, k], rows, None, columns, width, allowed.device)
    if kernel == "sdpa":
        return allowed[:, None]
    # Additive: `eager` would add a bool as 0 and 1.
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)[:, None]


@dataclass(frozen=True, slots=True)
class Scored:
    """One episode's likelihoods: `logprobs` (T,) of the tokens that the policy wrote, 0 at all others, and `beliefs`
    (decisions, answers). A value that is not finite is passed on as it is.
    """

    logprobs: Tensor
    beliefs: list[list[float]]


class Scorer:
    """Reads likelihoods from a transformers model without a gradient, `batch_size` episodes at a time.

    The model may be in training mode; it is read in evaluation mode.

    Raises ValueError for settings out of range, and, when it reads, for a model that it cannot.
    """

    def __init__(
        self,
        model: Model,
        encoder: ConversationEncoder,
        prompt: Prompt,
        *,
        temperature: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        if not temperature > 0 or batch_size < 1:
            raise ValueError(f"temperature={temperature} must be above 0 and batch_size={batch_size} at least 1")
        self.model, self.encoder, self.prompt = model, encoder, prompt
        self.temperature, self.batch_size = temperature, batch_size

    def _branches(self, answers: Sequence[str]) -> list[Branch]:
        return [self.encoder.branch(answer, self.prompt) for answer in answers]

    @torch.no_grad()
    def score(self, conversations: Sequence[Encoded], answers: Sequence[Sequence[str]]) -> list[Scored]:
        """All decisions and all answers of each conversation, and its own tokens.

        With no answers for a conversation its beliefs are empty lists; the token log-probabilities come anyway.
        """
        branches = [self._branches(own) for own in answers]
        order = sorted(range(len(conversations)), key=lambda i: len(conversations[i].ids))  # little padding
        scored: dict[int, Scored] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            found = self._score_batch([conversations[i] for i in rows], [branches[i] for i in rows])
            scored |= zip(rows, found, strict=True)
        return [scored[i] for i in range(len(conversations))]

    def _score_batch(self, conversations: Sequence[Encoded], branches: Sequence[Sequence[Branch]]) -> list[Scored]:
        batch = pad(conversations, self.model.device)
        cache = DynamicCache() if any(branches) else None  # made without a config, it also keeps what a window leaves
        # The token before each answer is read again, so that all predictions come from the second pass.
        stems = [[Stem(own.ids[d - 1 : d], d - 1) for d in own.decisions] for own in conversations]
        beliefs: list[list[list[float]]] = [[[] for _ in own] for own in stems]
        with reading(self.model), packing(self.model if cache is None else None):
            logprobs = token_logprobs(self.model, batch, self.temperature, wanted=batch.sampled, cache=cache)
            if cache is not None:
                beliefs = branch_beliefs(self.model, stems, branches, cache, self.temperature)
        rows = zip(logprobs, conversations, beliefs, strict=True)
        return [Scored(row[: len(encoded.ids)], own) for row, encoded, own in rows]

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
        with reading(self.model):
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
        last = [Encoded(own.ids, [OBSERVED] * len(own.ids), own.decisions[-1:]) for own in encoded]
        return [scored.beliefs[0] for scored in self.score(last, answers)]
