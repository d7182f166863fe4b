"""The policy contract, and policies that need no model. Those with one are in `agentgym_ig.lm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np

from agentgym_ig.grammar import GRAMMARS, Answer, Search
from agentgym_ig.text import neutralise
from agentgym_ig.types import Action, Conversation, Passage, Question


class Policy(Protocol):
    """Anything that can act: any callable from a batch of conversations to a batch of texts will do.

    A policy that is to be trained returns `Action`s with token ids and log-probabilities instead of strings. None
    in place of an action says that the conversation no longer fits the policy; its episode ends there.
    """

    def __call__(self, conversations: Sequence[Conversation], /) -> Sequence[str] | Sequence[Action | None]:
        """One action, or None, for each conversation, in order."""
        ...


def session_of(policy: Policy) -> AbstractContextManager[None]:
    """A block to play one rollout in: a policy that keeps something from turn to turn has `session()` for it."""
    session: Callable[[], AbstractContextManager[None]] = getattr(policy, "session", nullcontext)
    return session()


def _written(act: str | Search | Answer, grammar: str) -> str:
    if isinstance(act, Search):
        return GRAMMARS[grammar].search(*act.queries)
    return GRAMMARS[grammar].answer(act.text) if isinstance(act, Answer) else act


class ScriptedPolicy:
    """Plays the same list of actions in every episode; its last action is repeated where the list is too short.

    A `Search` or an `Answer` is written in the episode's grammar, a string is said as it is.
    """

    def __init__(self, actions: Sequence[str | Search | Answer]) -> None:
        if not actions:
            raise ValueError("a scripted policy needs at least one action")
        self.actions = tuple(actions)

    def __call__(self, conversations: Sequence[Conversation], /) -> list[str]:
        """The script's next action for each conversation."""
        last = len(self.actions) - 1
        return [_written(self.actions[min(own.turn, last)], own.grammar) for own in conversations]


class QuestionPolicy:
    """Acts by looking at which question it is being asked; the base of the oracle and of simple baselines.

    Questions are told apart by what the environment makes of them, so `prompts` (text of the first user message →
    question) comes from the environment: see `agentgym_ig.envs.prompts_of`. An unknown question is answered with "?".
    What `act` chooses is written as in a `ScriptedPolicy`.
    """

    def __init__(
        self,
        prompts: Mapping[str, Question],
        act: Callable[[Question, Conversation], str | Search | Answer],
    ) -> None:
        self.prompts, self.act = prompts, act

    def __call__(self, conversations: Sequence[Conversation], /) -> list[str]:
        """The chosen action for each conversation."""
        return [_written(self._chosen(conversation), conversation.grammar) for conversation in conversations]

    def _chosen(self, conversation: Conversation) -> str | Search | Answer:
        asked = next((message.text for message in conversation.messages if message.role == "user"), "")
        question = self.prompts.get(asked)
        return Answer("?") if question is None else self.act(question, conversation)


QUERY_WORDS = 100
"""Different words of a passage that the oracle searches for. In 60,000 Wikipedia passages BM25 finds all gold ones
among the first three by so many words, and one in nine not by its title.
"""


def oracle(prompts: Mapping[str, Question], passages: Mapping[str, Passage]) -> QuestionPolicy:
    """Searches title and text of every supporting passage, one a turn, then gives the gold answer.

    For testing environments and indexes. passages: passage id → passage.
    """

    def act(question: Question, conversation: Conversation) -> Search | Answer:
        wanted = [passages[own] for own in dict.fromkeys(question.supporting) if own in passages]
        if conversation.turn >= len(wanted):
            return Answer(question.answers[0])
        passage = wanted[conversation.turn]
        words = dict.fromkeys(neutralise(f"{passage.title} {passage.text}").split())
        return Search((" ".join(list(words)[:QUERY_WORDS]),))

    return QuestionPolicy(prompts, act)


class RandomPolicy:
    """Searches or answers with words drawn from the conversation: a floor, and a stress test for environments."""

    def __call__(self, conversations: Sequence[Conversation], /) -> list[str]:
        """A random action for each conversation, drawn from its own seed."""
        return [_written(self._act(conversation), conversation.grammar) for conversation in conversations]

    def _act(self, conversation: Conversation) -> Search | Answer:
        rng = np.random.default_rng((conversation.seed, conversation.turn))
        words = conversation.messages[-1].text.replace("<", " ").replace(">", " ").split() or ["?"]
        first = int(rng.integers(len(words)))
        chosen = " ".join(words[first : first + 2])
        return Search((chosen,)) if rng.random() < 0.5 else Answer(chosen)
