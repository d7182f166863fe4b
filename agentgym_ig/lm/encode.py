"""From a conversation to the tokens of a language model, and to the turn that each token belongs to."""

from __future__ import annotations

import json
import re
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from jinja2 import TemplateError

from agentgym_ig.grammar import GRAMMARS
from agentgym_ig.prompts import Prompt
from agentgym_ig.text import clean
from agentgym_ig.types import Conversation, Message, Role

Tokenizer = Any
"""A transformers tokenizer; its own classes are only partly typed."""

OBSERVED = -1
"""The turn index of tokens that the policy did not write."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation in tokens.

    ids: (T,) all tokens. turn: (T,) for each token the turn in which the policy wrote it, or `OBSERVED`.
    decisions: (number of replies + 1,) where the policy's next token stands, or would stand, after the opening
    and after every reply of the environment.
    """

    ids: list[int]
    turn: list[int]
    decisions: list[int]


@dataclass(frozen=True, slots=True)
class Branch:
    """A forced answer: its tokens, and how many of the last of them spell the gold answer itself."""

    ids: tuple[int, ...]
    scored: int


_FORMS: tuple[Callable[[str], str], ...] = (
    str, str.lstrip, str.rstrip, str.strip, partial(json.dumps, ensure_ascii=False)
)  # fmt: skip
"""What a chat template may do to a message before it shows it."""

_TOKENISING = threading.Lock()
"""A tokenizer keeps whether it splits special tokens as its own state: two threads would tokenise each other's way."""

_THINKING = re.compile(r"<think>\s*\Z")


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the chat template writes around some messages (one text more than messages), and what it does to each.

    `special` are the special tokens in all of its texts. `end` is the first token in front of the messages that the
    tokenizer reads as one whatever is beside it (of a reply's frame, what ends the policy's turn); None without one.
    """

    texts: tuple[str, ...]
    forms: tuple[Callable[[str], str], ...]
    special: tuple[int, ...]
    end: int | None


class ConversationEncoder:
    """Turns conversations and forced answers into token ids.

    The opening goes through the tokenizer's chat template, with the generation prompt. In the `tags` grammar
    everything after it continues the assistant's text, so it is appended as it is; in the `tools` grammar the
    template's own text stands around every reply. That text is found once, by rendering messages of known content:
    nothing that the policy wrote is rendered, so a template that alters older turns alters nothing here. Templates
    without a system role get the system's text in front of the user's, those without a tool role get replies as the
    user's. A `<think>` at the end of the generation prompt is left to the policy to write.

    Text from outside can never become a special token. The tokens of a longer conversation begin with those of
    the shorter.

    Raises ValueError for a tokenizer without a chat template, or with one that has no place for the messages.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or "this model"
            raise ValueError(f"{name} has no chat template; take an instruction-tuned model, or set its chat_template")
        self.tokenizer = tokenizer
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._opening = lru_cache(4096)(self._encode_opening)
        self._reply = lru_cache(16384)(self._encode_reply)
        self._text = lru_cache(16384)(self._encode_text)
        self._branch = lru_cache(16384)(self._encode_branch)

    def encode(self, conversation: Conversation) -> Encoded:
        """The whole conversation; sampled messages keep the very ids that were sampled.

        Raises ValueError for one that does not begin with a user message, or a system and a user message.
        """
        system, asked, *rest = _opened(conversation.messages)
        ids = list(self._opening(system.text, asked.text))
        turns, turn = [OBSERVED] * len(ids), 0
        decisions = [len(ids)]
        framed = not GRAMMARS[conversation.grammar].one_message
        before = asked
        for message in rest:
            if message.role == "assistant":
                own: Sequence[int] = self._text(message.text) if message.token_ids is None else message.token_ids
                turns += [turn] * len(own)
                turn += 1
                ids += own
            else:
                own = self._framed_reply(message.text, before) if framed else self._text(message.text)
                turns += [OBSERVED] * len(own)
                ids += own
                decisions.append(len(ids))
            before = message
        return Encoded(ids, turns, decisions)

    def branch(self, answer: str, prompt: Prompt) -> Branch:
        """Prefix and answer as they would be tokenised with the suffix behind them.

        White space around the answer does not count. Scored are the tokens that overlap the answer's characters
        (IGPO, arXiv 2510.14967, as its second release does it), so the span is exact where the answer's end merges
        with the suffix. Raises ValueError for an empty answer, and one with no character in any token.
        """
        return self._branch(answer.strip(), prompt.answer_prefix, prompt.answer_suffix)

    def _encode_branch(self, answer: str, prefix: str, suffix: str) -> Branch:
        before, end = len(prefix), len(prefix) + len(answer)
        encoded = self._tokenise(prefix + answer + suffix, split=True, offsets=True)
        offsets = encoded["offset_mapping"]
        span = [i for i, (left, right) in enumerate(offsets) if right > before and left < end and right > left]
        if not answer or not span:  # the suffix may merge with the prefix
            raise ValueError(f"the answer {answer!r} has no token to score; leave this question out")
        return Branch(tuple(encoded["input_ids"][: span[-1] + 1]), len(range(span[0], span[-1] + 1)))

    def _tokenise(self, text: str, *, split: bool, offsets: bool = False) -> Any:
        """The tokenizer's own answer; with `split` no special token is read out of the text."""
        with _TOKENISING:
            return self.tokenizer(
                clean(text), add_special_tokens=False, split_special_tokens=split, return_offsets_mapping=offsets
            )

    def _encode_text(self, text: str) -> array[int]:
        return array("I", self._tokenise(text, split=True)["input_ids"])

    def _encode_opening(self, system: str, asked: str) -> array[int]:
        if system and self._system_frame is not None:
            return self._fill(self._system_frame, (system, asked))
        frame = self._frame("user")
        if frame is None:
            raise ValueError("the chat template shows no user message; set another chat_template")
        return self._fill(frame, (f"{system}\n\n{asked}" if system else asked,))

    def _encode_reply(self, text: str) -> array[int]:
        return self._fill(self._reply_frame, (text,))

    def _framed_reply(self, text: str, before: Message) -> Sequence[int]:
        """The reply's tokens, without the end of turn where the policy has sampled it already."""
        own, end = self._reply(text), self._reply_frame.end
        return own[own.index(end) + 1 :] if before.token_ids and before.token_ids[-1] == end else own

    @cached_property
    def _system_frame(self) -> _Frame | None:
        return self._frame("system", "user")

    @cached_property
    def _reply_frame(self) -> _Frame:
        roles: tuple[Role, ...] = ("tool", "user")
        for role in roles:
            frame = self._frame("user", "assistant", role, skip=2)
            if frame is not None:
                return frame
        raise ValueError(
            "the chat template has no place for a reply, neither as a tool's nor as a user's message;"
            " set another chat_template, or take a prompt of the tags grammar"
        )

    def _frame(self, *roles: Role, skip: int = 0) -> _Frame | None:
        """The frame around the last messages of these roles, without the first `skip`; None where one is not shown."""
        # The white space and the quotes tell what the template does to a message.
        chat = [{"role": role, "content": f'\n \n"message {number}"\n \n'} for number, role in enumerate(roles)]
        try:
            rest = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except TemplateError:
            return None
        texts, forms = [], []
        for message in chat:
            form = next((form for form in _FORMS if form(message["content"]) in rest), None)
            if form is None:
                return None
            before, _, rest = rest.partition(form(message["content"]))
            texts.append(before)
            forms.append(form)
        texts = [*texts[skip:], _THINKING.sub("", rest)]
        ids = [self._tokenise(text, split=False)["input_ids"] for text in texts]
        special = self._specials([token for own in ids for token in own])
        end = next((token for token in ids[0] if token in self._added), None)
        return _Frame(tuple(texts), tuple(forms[skip:]), special, end)

    def _specials(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(token for token in ids if token in self._special)

    def _fill(self, frame: _Frame, messages: Sequence[str]) -> array[int]:
        """The frame with messages in it, tokenised as one text unless that made another special token of them."""
        shown = [form(message) for form, message in zip(frame.forms, messages, strict=True)]
        parts = [part for pair in zip(frame.texts, [*shown, ""], strict=True) for part in pair]
        ids = self._tokenise("".join(parts), split=False)["input_ids"]
        if self._specials(ids) != frame.special:
            each = (self._tokenise(part, split=place % 2 == 1)["input_ids"] for place, part in enumerate(parts))
            ids = [token for own in each for token in own]
        return array("I", ids)


def _opened(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with a system message at their head, empty where there was none."""
    if messages and messages[0].role != "system":
        messages = (Message("system", ""), *messages)
    if len(messages) < 2 or messages[1].role != "user":
        roles = ", ".join(message.role for message in messages) or "nothing"
        raise ValueError(f"a conversation begins with a user message, or with system and user; this one: {roles}")
    return messages
