"""A policy that any transformers chat model can be: batched sampling with exact token ids and log-probabilities."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentgym_ig.grammar import GRAMMARS
from agentgym_ig.lm import CACHED_TOKENS
from agentgym_ig.lm.alone import alone_with, reading
from agentgym_ig.lm.attention import kernel_of
from agentgym_ig.lm.decoding import Decoding
from agentgym_ig.lm.encode import OBSERVED, ConversationEncoder, Encoded, Tokenizer
from agentgym_ig.lm.kept import Kept, key_of, reasons_against
from agentgym_ig.lm.sampling import choose
from agentgym_ig.types import Action, Conversation

logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str, *, device: str = "cpu", dtype: str = "auto", attention: str | None = None
) -> tuple[Any, Tokenizer]:
    """A causal language model and its tokenizer, from the hub or a folder, ready to sample.

    attention: its kernel by transformers' name, as flash_attention_2; by default `sdpa`, where the model has it.

    Raises FileNotFoundError for a name that is neither, ImportError for a kernel whose package is missing, and
    ValueError for a model without a chat template, and a device or kernel that is not there.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch {torch.__version__} sees no CUDA device here; take cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    except (OSError, ValueError) as error:  # a folder without a tokenizer is a ValueError
        here = "no such folder here" if not Path(name_or_path).exists() else "the folder holds no usable model"
        raise FileNotFoundError(
            f"cannot load model {name_or_path!r} ({here}, and the hub gave none): {error}"
        ) from error
    ConversationEncoder(tokenizer)
    if attention is not None:
        model.set_attn_implementation(attention)
        if kernel_of(model) != attention:
            raise ValueError(f"a {model.config.model_type} cannot attend by {attention!r}; leave it out")
    return model.to(device).eval(), tokenizer


class LocalPolicy(ABC):
    """What the policies of a local model have in common: encoding, limits, and where an action ends.

    One that extends it says how tokens are sampled (`sample`).
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, *, temperature: float, max_new_tokens: int) -> None:
        if temperature < 0 or max_new_tokens < 1:
            raise ValueError(
                f"temperature={temperature} must be at least 0, and max_new_tokens={max_new_tokens} at least 1"
            )
        self.model, self.encoder = model, ConversationEncoder(tokenizer)
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._longest_context = math.inf if longest is None else longest - max_new_tokens
        self._closing = _closing_tokens(tokenizer, len(tokenizer))
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._ends = frozenset([*ends, tokenizer.eos_token_id]) - {None}
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, conversations: Sequence[Conversation], /) -> list[Action | None]:
        """One action for each conversation, in order; None for one that no longer fits the model."""
        contexts = [self.encoder.encode(conversation) for conversation in conversations]
        actions: list[Action | None] = [None] * len(conversations)
        fitting = [place for place, context in enumerate(contexts) if len(context.ids) <= self._longest_context]
        fitting.sort(key=lambda place: len(contexts[place].ids))  # little padding
        with reading(self.model):
            sampled = self._sample([conversations[place] for place in fitting], [contexts[place] for place in fitting])
        for place, own in zip(fitting, sampled, strict=True):
            actions[place] = self._action(own)
        return actions

    @abstractmethod
    def _sample(self, conversations: Sequence[Conversation], contexts: Sequence[Encoded]) -> list[Sampled]:
        """The tokens of an action for each conversation, up to and with the one that ends it."""

    def _ended(self, written: list[int], stops: tuple[str, ...]) -> bool:
        """Whether the last token ends the action."""
        return written[-1] in self._ends or (
            written[-1] in self._closing and _closes(self.encoder.tokenizer, written, stops)
        )

    def _action(self, sampled: Sampled) -> Action:
        ids = sampled.ids
        # The end is no text, though some tokenizers do not call it special.
        written = ids[:-1] if ids[-1] in self._ends else ids
        text = self.encoder.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Action(text, tuple(ids), tuple(sampled.logprobs))


@dataclass(slots=True)
class Sampled:
    """An action's tokens and their log-probabilities, in nats."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersPolicy(LocalPolicy):
    """Samples actions from a transformers causal language model.

    Random draws come from each conversation's own seed and turn, one per token, so neither the batch nor its
    order changes what an episode says. The model's own generation settings, such as Qwen2.5's repetition penalty, are
    not used: the training pass would not know of them.

    Args:
        model, tokenizer: as `load_model` gives them.
        temperature: of the sampling distribution; 0 takes the most probable token.
        max_new_tokens: per action; one that has not ended by then is cut and counts as malformed.
        batch_size: conversations per call of the model.
        max_cached_tokens: tokens whose keys and values are kept from turn to turn in a `session`; 0 for none. One
            takes two vectors per layer and key-value head: 24 KB in Qwen2.5-0.5B in float32, 56 KB in Qwen2.5-7B in
            bfloat16. Fewer than all unfinished conversations have make it slower, and change nothing.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        batch_size: int = 128,
        max_cached_tokens: int = CACHED_TOKENS,
    ) -> None:
        super().__init__(model, tokenizer, temperature=temperature, max_new_tokens=max_new_tokens)
        if batch_size < 1 or max_cached_tokens < 0:
            raise ValueError(
                f"batch_size={batch_size} must be 1 or more, max_cached_tokens={max_cached_tokens} 0 or more"
            )
        self.batch_size, self.max_cached_tokens = batch_size, max_cached_tokens
        self._against = reasons_against(model.config.get_text_config())
        self._kept: Kept | None = None
        self._sessions = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        """Within it a conversation that has become longer is read from where it was longer, not from its beginning.

        `rollout` opens one. Nothing is kept beyond its end, nor when the model's weights change within.
        """
        with alone_with(self.model):
            if self.max_cached_tokens and not self._sessions:
                if self._against:
                    logger.warning("every turn is read from its beginning: the model has %s", ", ".join(self._against))
                else:
                    self._kept = Kept(self.model, self.max_cached_tokens)
            self._sessions += 1
        try:
            yield
        finally:
            with alone_with(self.model):
                self._sessions -= 1
                if not self._sessions and self._kept is not None:
                    self._kept.close()
                    self._kept = None

    def _sample(self, conversations: Sequence[Conversation], contexts: Sequence[Encoded]) -> list[Sampled]:
        if self._kept is not None:
            self._kept.begin(map(_key_before, contexts))
        sampled: list[Sampled] = []
        for start in range(0, len(contexts), self.batch_size):
            some = slice(start, start + self.batch_size)
            sampled += self._sample_batch(conversations[some], contexts[some])
        return sampled

    @torch.no_grad()
    def _sample_batch(self, conversations: Sequence[Conversation], contexts: Sequence[Encoded]) -> list[Sampled]:
        known = [self._kept.take(_key_before(own)) if self._kept else None for own in contexts]
        batch = Decoding(self.model, [own.ids for own in contexts], known, pad=self._pad, reusable=not self._against)
        del known  # so that the batch can let go of them
        stops = [GRAMMARS[own.grammar].stop_strings for own in conversations]
        random = [np.random.default_rng((own.seed, own.turn)).random(self.max_new_tokens) for own in conversations]
        draws = torch.tensor(np.stack(random), device=self.model.device)
        sampled = [Sampled() for _ in contexts]
        unfinished = set(range(len(contexts)))
        rows = list(unfinished)  # of the batch
        logits = batch.read()
        for number in range(self.max_new_tokens):
            tokens, values = choose(logits, self.temperature, draws[:, number])
            for place, token, value in zip(rows, tokens.tolist(), values.tolist(), strict=True):
                if place in unfinished:
                    sampled[place].ids.append(token)
                    sampled[place].logprobs.append(value)
                    if self._ended(sampled[place].ids, stops[place]):
                        unfinished.remove(place)
            if not unfinished or number + 1 == self.max_new_tokens:
                break
            if batch.reusable and 2 * len(unfinished) <= len(rows):
                self._keep(batch, {row: sampled[own] for row, own in enumerate(rows) if own not in unfinished})
                going = [row for row, own in enumerate(rows) if own in unfinished]
                batch.select(going)
                rows, tokens, draws = [rows[row] for row in going], tokens[going], draws[going]
            logits = batch.go_on(tokens)
        self._keep(batch, {row: sampled[own] for row, own in enumerate(rows)})
        return sampled

    def _keep(self, batch: Decoding, ended: dict[int, Sampled]) -> None:
        """Keep what was read of some rows of the batch, given their actions."""
        if self._kept is None or not batch.even:
            return
        # The last token was sampled, but not read.
        read = [batch.contexts[row] + own.ids[:-1] for row, own in ended.items()]
        for ids, states in zip(read, batch.states(list(ended), [len(own) for own in read]), strict=True):
            self._kept.add(key_of(ids), states)


def _key_before(context: Encoded) -> bytes:
    """The tokens that had been read when the context's last action was complete; none before the first action."""
    last = max((place for place, turn in enumerate(context.turn) if turn != OBSERVED), default=0)
    return key_of(context.ids[:last])


_TAIL = 16
"""Tokens that surely hold the longest stop string, however finely it is cut."""


def _closes(tokenizer: Tokenizer, row: list[int], stops: tuple[str, ...]) -> bool:
    """Whether the row's last token completes a stop string; more may follow within that token, as in `></`."""
    tail: str = tokenizer.decode(row[-_TAIL:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return any(stop in tail for stop in stops)


def _closing_tokens(tokenizer: Tokenizer, size: int) -> frozenset[int]:
    """The tokens that can end a stop string: only these are worth decoding a row for."""
    tokens = tokenizer.convert_ids_to_tokens(range(size))
    return frozenset(i for i, token in enumerate(tokens) if token is not None and ">" in token) | frozenset(
        tokenizer(">", add_special_tokens=False)["input_ids"]
    )
