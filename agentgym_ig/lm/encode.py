"""Conversations to token ids, message by message, so that sampled tokens are never tokenised again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from agentgym_ig.text import Prompt
from agentgym_ig.types import Conversation, Message

Tokenizer = Any
"""A transformers tokenizer; its own classes are only partly typed."""

OBSERVED = -1
"""The turn index of tokens that the policy did not write."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation in tokens.

    ids: (T,) all tokens. turn: (T,) for each token the turn in which the policy wrote it, or `OBSERVED`.
    decisions: (number of user and tool messages,) where the policy's next token stands, or would stand, after
    each of them: the prompt first, then every reply of the environment.
    """

    ids: list[int]
    turn: list[int]
    decisions: list[int]


@dataclass(frozen=True, slots=True)
class Branch:
    """A forced answer: its tokens, and how many of the last of them spell the gold answer itself."""

    ids: tuple[int, ...]
    scored: int


class ConversationEncoder:
    """Turns conversations and forced answers into token ids.

    The first message goes through the tokenizer's chat template with the generation prompt; in the `tags`
    grammar everything after it continues the assistant's text, so it is appended as it is. Text from outside
    is tokenised with special tokens split, and can never become one.

    Raises ValueError for a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or "this model"
            raise ValueError(f"{name} has no chat template; take an instruction-tuned model, or set its chat_template")
        self.tokenizer = tokenizer
        self._prompt = lru_cache(4096)(self._encode_prompt)
        self._text = lru_cache(65536)(self._encode_text)

    def encode(self, conversation: Conversation) -> Encoded:
        """The whole conversation; sampled messages keep the very ids that were sampled."""
        ids: list[int] = []
        turns: list[int] = []
        decisions: list[int] = []
        turn = 0
        for message in conversation.messages:
            own = self._message(message)
            ids += own
            turns += [turn if message.role == "assistant" else OBSERVED] * len(own)
            if message.role == "assistant":
                turn += 1
            else:
                decisions.append(len(ids))
        return Encoded(ids, turns, decisions)

    def _message(self, message: Message) -> Sequence[int]:
        if message.token_ids is not None:
            return message.token_ids
        return self._prompt(message.text) if message.role == "user" else self._text(message.text)

    def _encode_prompt(self, text: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return tuple(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def branch(self, answer: str, prompt: Prompt) -> Branch:
        """Prefix and answer as they would be tokenised with the suffix behind them.

        Scored are the tokens that overlap the answer's characters (methods: IGPO, arXiv 2510.14967, as its
        second release does it), so the span is exact where the answer's end merges with the suffix. Raises
        ValueError for an answer with no character in any token.
        """
        before = len(prompt.answer_prefix)
        end = before + len(answer)
        encoded = self.tokenizer(
            prompt.answer_prefix + answer + prompt.answer_suffix, add_special_tokens=False, return_offsets_mapping=True
        )
        offsets = encoded["offset_mapping"]
        span = [i for i, (left, right) in enumerate(offsets) if right > before and left < end and right > left]
        if not span:
            raise ValueError(f"the answer {answer!r} has no token to score; leave this question out")
        return Branch(tuple(encoded["input_ids"][: span[-1] + 1]), len(range(span[0], span[-1] + 1)))
