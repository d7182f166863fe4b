"""Reward channels: named streams of one value a turn, added to any search environment by a wrapper.

A channel looks at episodes after every turn. `add_channel(env, channel, weight=...)` gives a Gymnasium wrapper for a
`SearchEnv` and a vector wrapper for a `SearchVectorEnv`; both forward everything, put the value into
`info["rewards"]` and its weighted value into the reward. The channels themselves are in this module, and
`InfoGain` in `agentgym_ig.envs.info_gain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal

from agentgym_ig.answers import METRICS, normalise_squad, score
from agentgym_ig.envs.episode import Episode
from agentgym_ig.envs.gold import gold_passages
from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv
from agentgym_ig.grammar import Malformed
from agentgym_ig.guide import VERDICTS, verdict
from agentgym_ig.indexes.base import StoredIndex


class Channel:
    """One named reward stream. A subclass sets `name` and gives `value`, or `values` if it can do many at once.

    What it wants to remember of an episode it keeps in `episode.memory[self.name]`.
    """

    name: str
    about: Literal["action", "reply", "end"] = "action"
    """What a value is about. If the last reply never reaches the policy (`Stop.CONTEXT_FULL`), values about the reply
    are taken back, and those about the end are read then."""

    def attach(self, env: SearchEnv | SearchVectorEnv) -> None:
        """Called once with the environment, before anything else; raise here if the channel cannot work with it."""

    def begin(self, episodes: Sequence[Episode]) -> None:
        """Called with episodes that have just begun."""

    def value(self, episode: Episode) -> float | None:
        """What the last turn of the episode is worth; None if it has no value. Not finite: the episode has failed."""
        raise NotImplementedError(f"{type(self).__name__} gives no value")

    def values(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """`value` for several episodes that have each just taken a turn, whose search did not fail."""
        return [self.value(episode) for episode in episodes]


class Outcome(Channel):
    """An answer metric over all accepted answers, on the last turn; 0 without an answer.

    `SearchEnv` brings one of these itself (`Rules.metric`); this adds others beside it, or takes its place under the
    name `outcome` when `Rules.weights` does not name that.
    """

    about = "end"

    def __init__(self, metric: str, *, name: str | None = None) -> None:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
        self.metric, self.name = metric, name or metric

    def value(self, episode: Episode) -> float | None:
        """See `Channel.value`."""
        return None if episode.stop is None else score(self.metric, episode.answer, episode.question.answers)


Judge = Callable[[Sequence[tuple[str, Sequence[str], str | None]]], Sequence[float | None]]
"""(question, accepted answers, prediction) of several episodes → 1 or 0 each, None for no verdict.

`agentgym_ig.remote.Judge` is one.
"""


class Judged(Channel):
    """A judge's verdict on the answer, on the last turn; an episode without a verdict has failed."""

    about = "end"

    def __init__(self, judge: Judge, *, name: str = "judge") -> None:
        self.judge, self.name = judge, name

    def values(self, episodes: Sequence[Episode]) -> list[float | None]:
        """See `Channel.values`."""
        over = [episode for episode in episodes if episode.stop is not None]
        cases = [(own.question.text, own.question.answers, own.answer) for own in over]
        verdicts = zip(over, self.judge(cases) if cases else [], strict=True)
        given = {own: math.nan if verdict is None else verdict for own, verdict in verdicts}
        return [given.get(own) for own in episodes]


class Format(Channel):
    """0 for a well-formed action and `penalty` for any other (IGPO's release: -2)."""

    def __init__(self, penalty: float = -1.0, *, name: str = "format") -> None:
        self.penalty, self.name = penalty, name

    def value(self, episode: Episode) -> float | None:
        """See `Channel.value`."""
        return self.penalty if isinstance(episode.action, Malformed) else 0.0


class SearchCost(Channel):
    """-1 for each query that was searched."""

    name = "search_cost"

    def value(self, episode: Episode) -> float | None:
        """See `Channel.value`."""
        return 0.0 - len(episode.queries[-1])


class RepeatQuery(Channel):
    """-1 for each query that this episode has asked before, but for case, punctuation, articles and spaces."""

    name = "repeat_query"

    def value(self, episode: Episode) -> float | None:
        """See `Channel.value`."""
        before = {normalise_squad(query) for query in chain.from_iterable(episode.queries[:-1])}
        repeats = 0
        for query in map(normalise_squad, episode.queries[-1]):
            repeats += query in before
            before.add(query)
        return 0.0 - repeats


class Evidence(Channel):
    """The share of the question's supporting passages that this turn is the first to show; the sum is the recall.

    For training only: it knows the gold passages. A question without any has no value. Raises ValueError where the
    index can list its passages and some of the gold ones are not among them.
    """

    name = "evidence"
    about = "reply"

    def attach(self, env: SearchEnv | SearchVectorEnv) -> None:
        """See `Channel.attach`."""
        if isinstance(env.index, StoredIndex):
            gold_passages(env.index, env.questions.values())

    def value(self, episode: Episode) -> float | None:
        """See `Channel.value`."""
        gold = set(episode.question.supporting)
        if not gold:
            return None
        before = set(chain.from_iterable(episode.retrieved[:-1]))
        return len(gold & set(episode.retrieved[-1]) - before) / len(gold)


class SelfGuide(Channel):
    """The verdict of the policy on its own episode: +0.1, 0 or -0.1 (Self-Guide, arXiv 2604.03098).

    Ask for verdicts with `prompts.with_guide`; whether they are asked for and whether they are paid are two choices.
    An action without a readable verdict gets 0 and is counted in `failures`. The paper's trust schedule is a weight
    that changes: `add_channel(env, SelfGuide(), weight=lambda: guide.trust(progress))`.
    """

    name = "self_guide"

    def __init__(self) -> None:
        self.failures = 0

    def value(self, episode: Episode) -> float | None:
        """See `Channel.value`."""
        found = verdict(episode.said)
        self.failures += found is None
        return VERDICTS[found or "neutral"]


def failed_reading(channel: Channel, episode: Episode, value: Any) -> str:
    """What to tell of a value that is no finite number."""
    return (
        f"channel {channel.name!r} gave {value} for turn {episode.turn} of question {episode.question.id!r}, wanted a"
        " finite number; the episode is ended and left out: mend the scorer, or leave the channel out"
    )
