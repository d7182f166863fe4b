"""One episode's rules, free of any index or batching: what an action means and what its turn is worth."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agentgym_ig.answers import METRICS, score
from agentgym_ig.errors import SearchFailed
from agentgym_ig.grammar import GRAMMARS, Answer, Malformed, Parsed, Search
from agentgym_ig.prompts import PROMPTS, Prompt
from agentgym_ig.types import Action, Conversation, Hit, Message, Question, Stop

CountTokens = Callable[[str], int]


def words(text: str) -> int:
    """Tokens of a text where no tokenizer is at hand: its words between white space."""
    return len(text.split())


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for every episode of an environment."""

    prompt: str | Prompt = "search-r1"
    """A prompt, or the name of one in `agentgym_ig.prompts.PROMPTS`; it brings the action grammar."""
    max_turns: int = 5
    """Actions per episode; the last one must answer."""
    max_searches: int | None = None
    """Queries per episode; an action that would go beyond ends it."""
    max_observation: int | None = None
    """Tokens of observation per episode; passages that no longer fit are left out, and a reply of which nothing
    fits ends it. How tokens are counted is the environment's `count_tokens`."""
    top_k: int = 3
    """Passages per query."""
    metric: str = "f1"
    """The answer metric that becomes the `outcome` channel."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"outcome": 1.0, "format": 0.1})
    """Weights of the two channels that need no wrapper; one that is not named does not exist. `outcome` is the metric
    on the last turn; `format` is 0 for a well-formed action and -1 for any other."""

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str) and self.prompt not in PROMPTS:
            raise ValueError(f"unknown prompt {self.prompt!r}; choose one of {', '.join(sorted(PROMPTS))}")
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; choose one of {', '.join(METRICS)}")
        budgets = ("max_turns", "top_k", "max_searches", "max_observation")
        given = {name: getattr(self, name) for name in budgets}
        for name, value in given.items():
            if not (isinstance(value, int) and value >= 1) and not (value is None and name in budgets[2:]):
                raise ValueError(f"{name}={value} must be a whole number, 1 or more")
        if not set(self.weights) <= {"outcome", "format"}:
            raise ValueError(f"weights are for {sorted(self.weights)}, wanted some of ['format', 'outcome']")

    @property
    def texts(self) -> Prompt:
        """The prompt itself."""
        return PROMPTS[self.prompt] if isinstance(self.prompt, str) else self.prompt


@dataclass(frozen=True, slots=True)
class Reply:
    """What the environment answers to one action."""

    observation: str
    rewards: dict[str, float]
    stop: Stop | None = None
    queries: tuple[str, ...] = ()
    retrieved: tuple[str, ...] = ()


class Episode:
    """One try at one question: `ask` reads an action, `reply` closes the turn with what the search found.

    Reward channels read it after every turn:

    opening: the messages before the first turn.
    conversation: all that the policy has seen and written.
    turn: how many actions there were; said, action: the text of the last one, and how it was understood.
    queries, retrieved: for every turn what was searched, and the ids of the passages shown.
    stop: why it ended, or None; answer: the final answer, or None; error: what failed, if a search or a channel did.
    memory: what channels note down, by their names.
    """

    def __init__(self, question: Question, rules: Rules, seed: int = 0, count_tokens: CountTokens = words) -> None:
        self.question, self.rules, self.count_tokens = question, rules, count_tokens
        self.opening = rules.texts.opening(question.text, rules.max_turns)
        self.conversation = Conversation(self.opening, seed, rules.texts.grammar)
        self.queries: list[tuple[str, ...]] = []
        self.retrieved: list[tuple[str, ...]] = []
        self.action: Parsed = Malformed("no action yet")
        self.said = ""
        self.stop: Stop | None = None
        self.answer: str | None = None
        self.error: str | None = None
        self.memory: dict[str, Any] = {}
        self._shown = 0

    @property
    def turn(self) -> int:
        """How many actions there were."""
        return len(self.queries)

    @property
    def prompt(self) -> str:
        """The opening as one text: the system message, if there is one, and the question."""
        return "\n\n".join(message.text for message in self.opening)

    def ask(self, action: str | Action) -> tuple[str, ...]:
        """Read an action; return the queries that its turn needs (none, when it does not search or may not)."""
        said = action if isinstance(action, Action) else Action(action)
        self.said, self.action = said.text, GRAMMARS[self.conversation.grammar].parse(said.text)
        self.conversation = self.conversation.plus(Message("assistant", said.text, said.token_ids or None))
        self.queries.append(())
        self.retrieved.append(())
        if isinstance(self.action, Search) and self._over_budget() is None:
            self.queries[-1] = self.action.queries
        return self.queries[-1]

    def unask(self) -> None:
        """Take an action back whose turn could not be closed."""
        self._forget_last_message()
        self.queries.pop()
        self.retrieved.pop()

    def _forget_last_message(self) -> None:
        self.conversation = replace(self.conversation, messages=self.conversation.messages[:-1])

    def _over_budget(self) -> Stop | None:
        if self.turn >= self.rules.max_turns:
            return Stop.MAX_TURNS
        if isinstance(self.action, Search) and self.rules.max_searches is not None:
            wanted = sum(map(len, self.queries[:-1])) + len(self.action.queries)
            return Stop.MAX_SEARCHES if wanted > self.rules.max_searches else None
        return None

    def reply(self, found: Sequence[Sequence[Hit]] | SearchFailed) -> Reply:
        """Close the turn. `found` holds the hits of each query of `ask`, or why the search failed."""
        if isinstance(self.action, Answer):
            self.answer = self.action.text
            return self._end(Stop.ANSWERED)
        if isinstance(found, SearchFailed):
            self.error = str(found)
            return self._end(Stop.SEARCH_FAILED)
        over = self._over_budget()
        if over is not None:
            return self._end(over)
        texts = self.rules.texts
        if isinstance(self.action, Malformed):
            return self._go_on(texts.render_malformed(self.action.fault), ())
        hits = [hit for own in found for hit in own[: self.rules.top_k]]
        passages = list({hit.passage.id: hit.passage for hit in hits}.values())
        shown = texts.shown(passages)
        if not self._fits(texts.render_shown(shown)):
            some = range(1, len(shown))
            shown = shown[: max(bisect(some, False, key=lambda n: not self._fits(texts.render_shown(shown[:n]))), 1)]
        return self._go_on(texts.render_shown(shown), tuple(passage.id for passage in passages[: len(shown)]))

    def _fits(self, observation: str) -> bool:
        budget = self.rules.max_observation
        return budget is None or self._shown + self.count_tokens(observation) <= budget

    def _go_on(self, observation: str, retrieved: tuple[str, ...]) -> Reply:
        budget = self.rules.max_observation
        if budget is not None:
            self._shown += self.count_tokens(observation)
            if self._shown > budget:
                return self._end(Stop.MAX_OBSERVATION)
        self.conversation = self.conversation.plus(Message("tool", observation))
        self.retrieved[-1] = retrieved
        return Reply(observation, self._rewards(), None, self.queries[-1], retrieved)

    def _end(self, stop: Stop) -> Reply:
        self.stop = stop
        return Reply("", self._rewards(), stop, self.queries[-1])

    def _rewards(self) -> dict[str, float]:
        rewards: dict[str, float] = {}
        if "format" in self.rules.weights:
            rewards["format"] = -1.0 if isinstance(self.action, Malformed) else 0.0
        if "outcome" in self.rules.weights and self.stop is not None and not self.stop.failed:
            rewards["outcome"] = score(self.rules.metric, self.answer, self.question.answers)
        return rewards

    def abandon(self) -> dict[str, float]:
        """End an episode whose policy cannot read the last reply: it is as if that had not come.

        Returns what now belongs to the rewards of the last turn.
        """
        self.stop = Stop.CONTEXT_FULL
        self._forget_last_message()
        self.retrieved[-1] = ()
        return {name: value for name, value in self._rewards().items() if name == "outcome"}

    def fail(self, error: str) -> None:
        """End an episode whose reward could not be read."""
        self.stop, self.error = Stop.SCORING_FAILED, error


def weighted(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The scalar reward: the weighted sum of a turn's channels."""
    return sum(weights[name] * value for name, value in rewards.items())
