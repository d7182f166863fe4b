"""The policy contract, and policies that need no model. Those with one are in `agentgym_ig.lm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from agentgym_ig.types import Action, Conversation, Question


class Policy(Protocol):
    """Anything that can act: any callable from a batch of conversations to a batch of texts will do.

    A policy that is to be trained returns `Action`s with token ids and log-probabilities instead of strings.
    """

    def __call__(self, conversations: Sequence[Conversation], /) -> Sequence[str] | Sequence[Action]:
        """One action for each conversation, in order."""
        ...


class ScriptedPolicy:
    """Plays the same list of actions in every episode; its last action is repeated where the list is too short."""

    def __init__(self, actions: Sequence[str]) -> None:
        if not actions:
            raise ValueError("a scripted policy needs at least one action")
        self.actions = tuple(actions)

    def __call__(self, conversations: Sequence[Conversation], /) -> list[str]:
        """The script's next action for each conversation."""
        return [self.actions[min(conversation.turn, len(self.actions) - 1)] for conversation in conversations]


class QuestionPolicy:
    """Acts by looking at which question it is being asked; the base of the oracle and of simple baselines.

    Questions are told apart by the prompt that the environment makes of them, so `prompts` (prompt → question)
    comes from the environment: see `agentgym_ig.envs.prompts_of`.
    """

    def __init__(
        self,
        prompts: Mapping[str, Question],
        act: Callable[[Question, Conversation], str],
        fallback: str = "<answer>?</answer>",
    ) -> None:
        self.prompts, self.act, self.fallback = prompts, act, fallback

    def __call__(self, conversations: Sequence[Conversation], /) -> list[str]:
        """The chosen action for each conversation; the fallback where the prompt is not known."""
        actions: list[str] = []
        for conversation in conversations:
            question = self.prompts.get(conversation.messages[0].text)
            actions.append(self.fallback if question is None else self.act(question, conversation))
        return actions


def oracle(prompts: Mapping[str, Question], titles: Mapping[str, str]) -> QuestionPolicy:
    """Searches the title of every supporting passage, one a turn, then gives the gold answer.

    For testing environments and indexes. titles: passage id → title.
    """

    def act(question: Question, conversation: Conversation) -> str:
        wanted = list(dict.fromkeys(titles[passage] for passage in question.supporting if passage in titles))
        if conversation.turn < len(wanted):
            return f"<search>{wanted[conversation.turn]}</search>"
        return f"<answer>{question.answers[0]}</answer>"

    return QuestionPolicy(prompts, act)


def search_once(prompts: Mapping[str, Question]) -> QuestionPolicy:
    """Searches the question's own words, then answers with nothing: shows what retrieval alone finds."""

    def act(question: Question, conversation: Conversation) -> str:
        return f"<search>{question.text}</search>" if conversation.turn == 0 else "<answer>unknown</answer>"

    return QuestionPolicy(prompts, act)


class RandomPolicy:
    """Searches or answers with words drawn from the conversation: a floor, and a stress test for environments."""

    def __call__(self, conversations: Sequence[Conversation], /) -> list[str]:
        """A random action for each conversation, drawn from its own seed."""
        return [self._act(conversation) for conversation in conversations]

    def _act(self, conversation: Conversation) -> str:
        rng = np.random.default_rng((conversation.seed, conversation.turn))
        words = conversation.messages[-1].text.replace("<", " ").replace(">", " ").split() or ["?"]
        first = int(rng.integers(len(words)))
        tag = "search" if rng.random() < 0.5 else "answer"
        return f"<{tag}>{' '.join(words[first : first + 2])}</{tag}>"
