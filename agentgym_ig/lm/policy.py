"""A policy that any transformers chat model can be: batched sampling with exact token ids and log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from agentgym_ig.grammar import GRAMMARS
from agentgym_ig.lm.alone import reading
from agentgym_ig.lm.encode import ConversationEncoder, Tokenizer
from agentgym_ig.types import Action, Conversation


def load_model(name_or_path: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Tokenizer]:
    """A causal language model and its tokenizer, from the hub or a folder, ready to sample.

    Raises FileNotFoundError for a name that is neither, and ValueError for a model without a chat template or a device
    that is not there.
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
    return model.to(device).eval(), tokenizer


class TransformersPolicy:
    """Samples actions from a transformers causal language model.

    Random draws come from each conversation's own seed and turn, one per token, so neither the batch nor its
    order changes what an episode says.

    Args:
        model, tokenizer: as `load_model` gives them.
        temperature: of the sampling distribution; 0 takes the most probable token.
        max_new_tokens: per action; one that has not ended by then is cut and counts as malformed.
        batch_size: conversations per call of the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        batch_size: int = 128,
    ) -> None:
        if temperature < 0 or max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                f"temperature={temperature} must be at least 0, max_new_tokens={max_new_tokens} and"
                f" batch_size={batch_size} at least 1"
            )
        self.model, self.encoder = model, ConversationEncoder(tokenizer)
        self.temperature, self.max_new_tokens, self.batch_size = temperature, max_new_tokens, batch_size
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._longest_context = math.inf if longest is None else longest - max_new_tokens
        self._closing = _closing_tokens(tokenizer, len(tokenizer))
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._ends = frozenset([*ends, tokenizer.eos_token_id]) - {None}
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, conversations: Sequence[Conversation], /) -> list[Action | None]:
        """One action for each conversation, in order; None for one that no longer fits the model."""
        contexts = [self.encoder.encode(conversation).ids for conversation in conversations]
        actions: list[Action | None] = [None] * len(conversations)
        fitting = [place for place, context in enumerate(contexts) if len(context) <= self._longest_context]
        for start in range(0, len(fitting), self.batch_size):
            some = fitting[start : start + self.batch_size]
            sampled = self._sample([conversations[place] for place in some], [contexts[place] for place in some])
            for place, action in zip(some, sampled, strict=True):
                actions[place] = action
        return actions

    @torch.no_grad()
    def _sample(self, conversations: Sequence[Conversation], contexts: Sequence[list[int]]) -> list[Action]:
        width = max(map(len, contexts))
        device = self.model.device
        ids = torch.tensor([[self._pad] * (width - len(own)) + own for own in contexts], device=device)
        real = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in contexts], device=device)
        sampler = _Sampler(conversations, self.temperature, self.max_new_tokens)
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._ends) or None,
        )
        stops = [GRAMMARS[conversation.grammar].stop_strings for conversation in conversations]
        closed = _Closed(self.encoder.tokenizer, self._closing, stops, width)
        with reading(self.model), _without_own_defaults(self.model):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=real,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([closed]),
                synced_gpus=False,  # each rank plays its own episodes, on weights that it has whole
            )
        rows = out[:, width:].tolist()
        logprobs = torch.stack(sampler.logprobs, 1).tolist()
        return [self._action(*row) for row in zip(rows, logprobs, stops, strict=True)]

    def _action(self, row: list[int], logprobs: list[float], stops: tuple[str, ...]) -> Action:
        tokenizer, length = self.encoder.tokenizer, len(row)
        for place, token in enumerate(row):
            if token in self._ends or (token in self._closing and _closes(tokenizer, row[: place + 1], stops)):
                length = place + 1
                break
        # The end is no text, though some tokenizers do not call it special.
        written = row[: length - 1] if row[length - 1] in self._ends else row[:length]
        text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Action(text, tuple(row[:length]), tuple(logprobs[:length]))


@contextmanager
def _without_own_defaults(model: Any) -> Iterator[None]:
    """Keep the model's own generation settings out: a repetition penalty, as Qwen2.5 has one, would be sampled with but
    not be known to the training pass.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Sampler(LogitsProcessor):
    """Chooses each row's token from that row's own random numbers, and keeps its log-probability."""

    def __init__(self, conversations: Sequence[Conversation], temperature: float, max_new_tokens: int) -> None:
        draws = [np.random.default_rng((own.seed, own.turn)).random(max_new_tokens) for own in conversations]
        self.draws, self.temperature = np.stack(draws), temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores under which only the chosen token can be taken."""
        logprobs = torch.log_softmax(scores.float() / (self.temperature or 1.0), -1)
        if self.temperature:
            draw = torch.tensor(self.draws[:, len(self.logprobs), None], device=scores.device)
            below = logprobs.double().exp().cumsum(-1)
            chosen = torch.searchsorted(below, draw * below[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        else:
            chosen = logprobs.argmax(-1, keepdim=True)
        self.logprobs.append(logprobs.gather(-1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


class _Closed(StoppingCriteria):
    """Stops each row when it has written a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, closing: frozenset[int], stops: Sequence[tuple[str, ...]], prompt_width: int
    ) -> None:
        self.tokenizer, self.closing, self.stops, self.width = tokenizer, closing, stops, prompt_width
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,) whether each row is done."""
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        last = input_ids[:, -1].tolist()
        for row in (row for row, token in enumerate(last) if token in self.closing):
            if _closes(self.tokenizer, input_ids[row, self.width :].tolist(), self.stops[row]):
                self.done[row] = True
        return self.done


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
