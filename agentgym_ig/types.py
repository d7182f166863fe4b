"""The words that every other module shares: passages, questions, conversations, turns and trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable text."""

    id: str
    title: str
    text: str


class Hit(NamedTuple):
    """One search result: a passage and its score (higher is better; the scale is the backend's own)."""

    passage: Passage
    score: float


@dataclass(frozen=True, slots=True)
class Question:
    """A question, every answer that counts as right, and, where known, the passages that support it."""

    id: str
    text: str
    answers: tuple[str, ...]
    dataset: str
    supporting: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"question {self.id!r} has no text")
        given: object = self.answers
        if isinstance(given, str):
            raise TypeError(f"the answers of question {self.id!r} are one string; give a tuple of them")
        if not self.answers or not all(answer.strip() for answer in self.answers):
            found = "an empty answer" if self.answers else "no answer"
            raise ValueError(f"question {self.id!r} has {found}; give at least one string, and no empty ones")


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a conversation.

    `token_ids` are set where a policy wrote the message itself: those very ids are shown to it again and
    trained on, and its text is never tokenised a second time.
    """

    role: Role
    text: str
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """All that a policy may see of one episode, the seed that all its random draws come from, and the name of the
    grammar that its actions follow.
    """

    messages: tuple[Message, ...]
    seed: int = 0
    grammar: str = "tags"

    @property
    def turn(self) -> int:
        """How many actions have been taken so far."""
        return sum(message.role == "assistant" for message in self.messages)

    def plus(self, *messages: Message) -> Conversation:
        """The same episode, longer."""
        return Conversation((*self.messages, *messages), self.seed, self.grammar)


@dataclass(frozen=True, slots=True)
class Action:
    """What a policy did in one turn: the text, and for a policy that can be trained its tokens.

    `token_ids` and `logprobs` (nats, under the distribution that was sampled from) have one entry per
    sampled token; both are empty for a policy that gives text alone.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class Stop(StrEnum):
    """Why an episode ended."""

    ANSWERED = "answered"
    MAX_TURNS = "max_turns"
    MAX_SEARCHES = "max_searches"
    MAX_OBSERVATION = "max_observation"
    """The next reply would not have fitted the budget of observation tokens."""
    CONTEXT_FULL = "context_full"
    """The conversation no longer fits the policy."""
    SEARCH_FAILED = "search_failed"
    SCORING_FAILED = "scoring_failed"
    """A reward channel gave no finite number."""

    @property
    def failed(self) -> bool:
        """Whether the episode ended through no fault of the agent, and is left out of updates."""
        return self in (Stop.SEARCH_FAILED, Stop.SCORING_FAILED)


@dataclass(frozen=True, slots=True)
class Turn:
    """One action and the environment's reply. `observation` is empty when the episode ended with the action.

    `rewards` holds this turn's channels by name. `queries` are what the turn searched for, `retrieved` the ids of
    the passages that the reply shows.
    """

    action: Action
    observation: str
    rewards: Mapping[str, float]
    queries: tuple[str, ...] = ()
    retrieved: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of one episode. `group` is shared by the episodes of one question in one batch.

    `opening` are the messages before the first turn. `belief` holds the value of the gold answer before the first
    turn and after every search (so one entry more than there are gains); it is empty until a scorer has filled it.
    `error` says what failed, if a channel did.
    """

    question: Question
    opening: tuple[Message, ...]
    turns: tuple[Turn, ...]
    stop: Stop
    group: int
    seed: int
    grammar: str = "tags"
    answer: str | None = None
    belief: tuple[float, ...] = ()
    error: str | None = None

    @property
    def conversation(self) -> Conversation:
        """The whole episode as the policy saw it, its own words included."""
        messages = list(self.opening)
        for number, turn in enumerate(self.turns, 1):
            messages.append(Message("assistant", turn.action.text, turn.action.token_ids or None))
            if turn.observation or number < len(self.turns):
                messages.append(Message("tool", turn.observation))
        return Conversation(tuple(messages), self.seed, self.grammar)

    def channel(self, name: str) -> list[float | None]:
        """The channel's value for every turn, None where the turn has none."""
        return [turn.rewards.get(name) for turn in self.turns]

    def total(self, name: str) -> float:
        """The sum of a channel over the turns that have it."""
        return sum(value for value in self.channel(name) if value is not None)


def texts(passages: Sequence[Passage]) -> list[str]:
    """Title and text of each passage, as they are indexed."""
    return [f"{passage.title}\n{passage.text}" for passage in passages]
