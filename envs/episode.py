"""One episode's rules, free of any index or batching: what an action means and what its turn is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentgym_ig.answers import METRICS, score
from agentgym_ig.text import PROMPTS, Answer, Malformed, Prompt, Search, parse_action
from agentgym_ig.types import Conversation, Hit, Message, Question, Stop


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for every episode of an environment."""

    prompt: str = "search-r1"
    """Name of the prompt in `agentgym_ig.text.PROMPTS`."""
    max_turns: int = 5
    """Actions per episode; the last one must answer."""
    top_k: int = 3
    """Passages per search."""
    metric: str = "f1"
    """The answer metric that becomes the `outcome` channel."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"outcome": 1.0, "format": 0.1})
    """Weight of each channel in the scalar reward. `outcome` is the metric on the last turn; `format` is 0 for a
    well-formed action and -1 for any other."""

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise ValueError(f"unknown prompt {self.prompt!r}; choose one of {', '.join(sorted(PROMPTS))}")
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; choose one of {', '.join(METRICS)}")
        if self.max_turns < 1 or self.top_k < 1:
            raise ValueError(f"max_turns={self.max_turns} and top_k={self.top_k} must both be 1 or more")
        if set(self.weights) != {"outcome", "format"}:
            raise ValueError(f"weights are for {sorted(self.weights)}, wanted exactly ['format', 'outcome']")

    @property
    def texts(self) -> Prompt:
        """The prompt itself."""
        return PROMPTS[self.prompt]


@dataclass(frozen=True, slots=True)
class Reply:
    """What the environment answers to one action."""

    observation: str
    rewards: Mapping[str, float]
    stop: Stop | None = None
    retrieved: tuple[str, ...] = ()


class Episode:
    """One try at one question: `ask` reads an action, `reply` closes the turn with what the search found."""

    def __init__(self, question: Question, rules: Rules) -> None:
        self.question, self.rules = question, rules
        self.prompt = rules.texts.render_question(question.text, rules.max_turns)
        self.conversation = Conversation((Message("user", self.prompt),))
        self.stop: Stop | None = None
        self.answer: str | None = None
        self._action: Search | Answer | Malformed = Malformed("no action yet")

    def ask(self, action: str) -> tuple[str, ...]:
        """Read an action; return the queries that its turn needs (none, when it does not search or may not)."""
        self._action = parse_action(action)
        self.conversation = self.conversation.plus(Message("assistant", action))
        searches = isinstance(self._action, Search) and self.conversation.turn < self.rules.max_turns
        return self._action.queries if searches and isinstance(self._action, Search) else ()

    def reply(self, found: Sequence[Sequence[Hit]] | None) -> Reply:
        """Close the turn. `found` holds the hits of each query of `ask`, or None when the search failed."""
        if isinstance(self._action, Answer):
            self.answer = self._action.text
            return self._end(Stop.ANSWERED)
        if found is None:
            return self._end(Stop.SEARCH_FAILED)
        if self.conversation.turn >= self.rules.max_turns:
            return self._end(Stop.MAX_TURNS)
        if isinstance(self._action, Malformed):
            return self._go_on(self.rules.texts.render_malformed(self._action.fault), (), -1.0)
        passages = list({hit.passage.id: hit.passage for hits in found for hit in hits}.values())
        return self._go_on(self.rules.texts.render_passages(passages), tuple(p.id for p in passages), 0.0)

    def _go_on(self, observation: str, retrieved: tuple[str, ...], well_formed: float) -> Reply:
        self.conversation = self.conversation.plus(Message("tool", observation))
        return Reply(observation, {"format": well_formed}, None, retrieved)

    def _end(self, stop: Stop) -> Reply:
        self.stop = stop
        rewards = {"format": -1.0 if isinstance(self._action, Malformed) else 0.0}
        if stop is not Stop.SEARCH_FAILED:  # a failed search says nothing about the agent
            rewards["outcome"] = score(self.rules.metric, self.answer, self.question.answers)
        return Reply("", rewards, stop)


def weighted(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The scalar reward: the weighted sum of a turn's channels."""
    return sum(weights[name] * value for name, value in rewards.items())
