"""A policy that any OpenAI-compatible server can be, in both grammars."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agentgym_ig.errors import ContextTooLong, ServerFailed
from agentgym_ig.grammar import GRAMMARS, Grammar
from agentgym_ig.remote.server import Choice, OpenAIServer
from agentgym_ig.types import Action, Conversation, Message

if TYPE_CHECKING:
    from agentgym_ig.lm.encode import ConversationEncoder

logger = logging.getLogger(__name__)


class OpenAIPolicy:
    """Samples actions from the model behind an OpenAI-compatible server, one request for each conversation.

    `chat` sends messages, and the server applies its chat template. Replies of the environment go as user messages,
    in the `tools` grammar inside `<tool_response>`, which is what Qwen's and Hermes's templates make of the role
    `tool`, and which every template can take. Structured `tool_calls` and split-off reasoning in the answer become
    text again: `<tool_call>` and `<think>`.

    `completions` sends the prompt itself: exact token ids with an `encoder` (vLLM, SGLang), the plain text of all
    messages without one. Take it with an encoder for a model trained in the `tags` grammar, where the episode is
    one assistant message that chat cannot continue.

    Every request has a seed made of the conversation's seed and turn; whether equal seeds give equal actions is up
    to the server. Actions have token ids and log-probabilities only where they are certain: with an encoder,
    temperature 1, and a server that sends both (vLLM with `extra={"logprobs": 0, "return_token_ids": True}`).

    Args:
        server: as `OpenAIServer` gives it.
        temperature, max_tokens: of the sampling; an action longer than that is cut, and counts as malformed.
        encoder: for `completions` alone.
        cuts_stops: whether the server leaves the stop string out of its text, as most do; `transformers serve` keeps
            it. Where it does and does not say why it stopped, as vLLM and SGLang do, a tag that is still open counts
            as closed.
        extra: fields added to every request; None takes one out, as in `{"seed": None}` for a server without.

    Raises, when called, ServerFailed once all requests are done and one of them failed. Gives None in place of an
    action where the conversation has become too long for the model.
    """

    def __init__(
        self,
        server: OpenAIServer,
        *,
        endpoint: Literal["chat", "completions"] = "chat",
        temperature: float = 1.0,
        max_tokens: int = 512,
        encoder: ConversationEncoder | None = None,
        cuts_stops: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if endpoint not in ("chat", "completions"):
            raise ValueError(f"unknown endpoint {endpoint!r}; choose chat or completions")
        if encoder is not None and endpoint == "chat":
            raise ValueError("chat sends text, so it takes no encoder; give endpoint='completions', or no encoder")
        if not 0 <= temperature < float("inf") or max_tokens < 1:
            raise ValueError(f"temperature={temperature} must be at least 0, max_tokens={max_tokens} at least 1")
        self.server, self.chat, self.encoder, self.cuts_stops = server, endpoint == "chat", encoder, cuts_stops
        self.temperature, self.max_tokens, self.extra = temperature, max_tokens, dict(extra or {})

    @property
    def max_new_tokens(self) -> int:
        """As it is called of the policies of a local model."""
        return self.max_tokens

    def restart(self) -> None:
        """Wait until the server answers again. Raises ServerFailed where it does not."""
        self.server.wait()

    def __call__(self, conversations: Sequence[Conversation], /) -> list[Action | None]:
        """One action for each conversation, in order; None where it no longer fits the model."""
        bodies = [self._body(conversation) for conversation in conversations]
        choices = self.server.ask("chat/completions" if self.chat else "completions", bodies)
        failed = [own for own in choices if isinstance(own, ServerFailed) and not isinstance(own, ContextTooLong)]
        if failed:
            first = failed[0]
            raise type(first)(f"{len(failed)} of {len(choices)} requests failed; the first: {first}") from first
        return [self._action(own, choice) for own, choice in zip(conversations, choices, strict=True)]

    def _body(self, conversation: Conversation) -> dict[str, Any]:
        grammar = GRAMMARS[conversation.grammar]
        asked: dict[str, Any]
        if self.chat:
            asked = {"messages": [_chat_message(message, grammar) for message in conversation.messages]}
        elif self.encoder is not None:
            asked = {"prompt": self.encoder.encode(conversation).ids}
        else:
            texts = [_chat_message(message, grammar)["content"] for message in conversation.messages]
            asked = {"prompt": ("" if grammar.one_message else "\n").join(texts)}
        return {
            **asked,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stop": list(grammar.stop_strings),
            "seed": request_seed(conversation),
            **self.extra,
        }

    def _action(self, conversation: Conversation, choice: Choice | ServerFailed) -> Action | None:
        if isinstance(choice, ServerFailed):
            logger.warning("an episode ends after %d turns: %s", conversation.turn, choice)
            return None
        written = _chat_text(choice.get("message") or {}) if self.chat else str(choice.get("text") or "")
        stops = GRAMMARS[conversation.grammar].stop_strings
        text = _ended(written, choice, stops, self.cuts_stops)
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        certain = self.encoder is not None and self.temperature == 1.0 and text.startswith(written)
        if certain and ids and logprobs and len(ids) == len(logprobs) and None not in logprobs:
            return Action(text, tuple(map(int, ids)), tuple(map(float, logprobs)))
        return Action(text)


def request_seed(conversation: Conversation, attempt: int = 0) -> int:
    """A seed of 31 bits for the conversation's next turn; servers take no more."""
    drawn = np.random.SeedSequence((conversation.seed, conversation.turn, attempt)).generate_state(1)[0]
    return int(drawn) & 0x7FFF_FFFF


def _chat_message(message: Message, grammar: Grammar) -> dict[str, str]:
    if message.role != "tool":
        return {"role": message.role, "content": message.text}
    framed = message.text if grammar.one_message else f"<tool_response>\n{message.text}\n</tool_response>"
    return {"role": "user", "content": framed}


def _chat_text(message: Mapping[str, Any]) -> str:
    """All that the model wrote, as one text, whatever the server has made of it."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    text = f"<think>{thought}</think>\n" if isinstance(thought, str) else ""
    text += message.get("content") or ""
    calls = [_call(entry.get("function") or {}) for entry in message.get("tool_calls") or ()]
    return "\n".join([part for part in (text.rstrip("\n") if calls else text, *calls) if part])


def _call(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")  # JSON in a string; a few servers send the object itself
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(function.get("name"))}, "arguments": {written}}}\n</tool_call>'


def _ended(text: str, choice: Choice, stops: Sequence[str], cuts_stops: bool) -> str:
    """The action up to and with its first stop string, put back where the server has cut it off."""
    if (choice.get("message") or {}).get("tool_calls"):
        return text  # the server has seen to where they end
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:  # kept by the server, or never looked for
        return text[: min(ends)]
    if not cuts_stops or choice["finish_reason"] != "stop":
        return text
    for name in ("stop_reason", "matched_stop"):  # vLLM's and SGLang's: the stop string, or a token, or nothing
        if name in choice:
            return text + choice[name] if choice[name] in stops else text
    open_tags = [(text.rfind(stop.replace("/", "")), stop) for stop in stops]
    place, stop = max(open_tags)
    return text + stop if place >= 0 else text
