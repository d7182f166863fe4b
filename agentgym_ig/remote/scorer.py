"""Beliefs (IGPO, arXiv 2510.14967, §3) read from a server's log-probabilities of its prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentgym_ig.errors import ServerFailed
from agentgym_ig.prompts import Prompt
from agentgym_ig.remote.server import Choice, OpenAIServer
from agentgym_ig.types import Conversation

if TYPE_CHECKING:
    from agentgym_ig.lm.encode import Branch, ConversationEncoder

logger = logging.getLogger(__name__)

_WANTED = (
    "beliefs need a server that takes token ids as prompt and gives logprobs of an echoed prompt: serve the model with"
    " vLLM, or read the beliefs with agentgym_ig.trainers.Scorer"
)


class ServerScorer:
    """The belief in gold answers under a model that lives elsewhere; agrees with `agentgym_ig.trainers.Scorer`.

    One request per conversation and answer: conversation and forced answer go as token ids with `echo`, and the
    answer's log-probabilities are read at their places in the prompt. Needs a server that takes token ids and gives
    `logprobs` of an echoed prompt, as vLLM does, and an encoder with the tokenizer of the server's model.
    """

    def __init__(self, server: OpenAIServer, encoder: ConversationEncoder, prompt: Prompt) -> None:
        self.server, self.encoder, self.prompt = server, encoder, prompt

    def beliefs(self, conversations: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """The mean log-probability (nats) of each answer's tokens at the end of its conversation.

        NaN where a request failed for good. Raises ServerFailed for a server that refuses all requests, or gives no
        log-probabilities of its prompt.
        """
        contexts = [self.encoder.encode(conversation).ids for conversation in conversations]
        branches = [[self.encoder.branch(answer, self.prompt) for answer in own] for own in answers]
        bodies = [_body(context, own) for context, some in zip(contexts, branches, strict=True) for own in some]
        outcomes = self.server.ask("completions", bodies)
        if outcomes and all(type(outcome) is ServerFailed for outcome in outcomes):  # neither busy nor too long: wrong
            raise ServerFailed(f"{outcomes[0]}; {_WANTED}")
        choices = iter(outcomes)
        return [
            [self._belief(next(choices), len(context) + len(own.ids), own.scored) for own in some]
            for context, some in zip(contexts, branches, strict=True)
        ]

    def _belief(self, choice: Choice | ServerFailed, length: int, scored: int) -> float:
        if isinstance(choice, ServerFailed):
            logger.warning("an answer could not be scored: %s", choice)
            return math.nan
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if len(logprobs) - length not in (0, 1):  # some servers write a token although it is the prompt that counts
            raise ServerFailed(
                f"{self.server!r} was sent {length} tokens and gave {len(logprobs)} log-probabilities; {_WANTED}"
            )
        gold = logprobs[length - scored : length]
        return math.nan if None in gold else math.fsum(gold) / scored


def _body(context: Sequence[int], branch: Branch) -> dict[str, Any]:
    return {
        "prompt": [*context, *branch.ids],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 1.0,
    }
