"""Suites, and how well a policy does on them: exact match and F1 per dataset, in-domain and out-of-domain.

The figures come from the answers alone; no shaped channel enters them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentgym_ig.answers import score
from agentgym_ig.envs.episode import Rules
from agentgym_ig.envs.rollout import Start, rollout
from agentgym_ig.envs.search import SearchVectorEnv
from agentgym_ig.indexes.base import Index
from agentgym_ig.policies import Policy
from agentgym_ig.types import Question, Stop, Trajectory

Domain = Literal["in_domain", "out_of_domain"]
DOMAINS: tuple[Domain, ...] = ("in_domain", "out_of_domain")

SUITES: dict[str, dict[str, Domain]] = {
    "tinywiki": {
        "hop2": "in_domain",
        "hop3": "in_domain",
        "compose2": "out_of_domain",
        "compose3": "out_of_domain",
    },
    "igpo": {
        "nq": "in_domain",
        "triviaqa": "in_domain",
        "hotpotqa": "in_domain",
        "2wikimultihopqa": "in_domain",
        "musique": "out_of_domain",
        "bamboogle": "out_of_domain",
        "popqa": "out_of_domain",
    },
    "search-r1": {
        "nq": "in_domain",
        "hotpotqa": "in_domain",
        "triviaqa": "out_of_domain",
        "popqa": "out_of_domain",
        "2wikimultihopqa": "out_of_domain",
        "musique": "out_of_domain",
        "bamboogle": "out_of_domain",
    },
}
"""Suite → dataset → domain, as the papers group them."""


def suite_datasets(name: str) -> dict[str, Domain]:
    """The datasets of a suite. Raises ValueError, listing all names, where there is no such suite."""
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; choose one of {', '.join(sorted(SUITES))}")
    return SUITES[name]


@dataclass(frozen=True)
class Suite:
    """A named set of datasets, ready to be asked: the questions of each, what is searched, and by which rules."""

    name: str
    questions: Mapping[str, Sequence[Question]]
    index: Index
    rules: Rules

    def __post_init__(self) -> None:
        strange = sorted(set(self.questions) - set(suite_datasets(self.name)))
        if strange or not self.questions:
            wanted = ", ".join(suite_datasets(self.name))
            raise ValueError(f"suite {self.name!r} is made of {wanted}; found {', '.join(strange) or 'no questions'}")

    def env(self, num_envs: int) -> SearchVectorEnv:
        """A vector environment over all of the suite's questions."""
        everything = [question for own in self.questions.values() for question in own]
        return SearchVectorEnv(self.index, everything, num_envs, self.rules)


@dataclass(frozen=True)
class Evaluation:
    """The episodes of one evaluation and the figures made of them."""

    suite: str
    episodes: list[Trajectory]

    def table(self) -> dict[str, dict[str, Any]]:
        """Dataset → its figures; shares and means over its episodes."""
        domains = suite_datasets(self.suite)
        by_dataset: dict[str, list[Trajectory]] = {}
        for episode in self.episodes:
            by_dataset.setdefault(episode.question.dataset, []).append(episode)
        return {name: {"domain": domains[name], **_figures(by_dataset[name])} for name in domains if name in by_dataset}

    def domains(self) -> dict[str, dict[str, float]]:
        """Domain → EM and F1, the plain mean over its datasets as in the papers; domains without data are left out."""
        table = self.table()
        means: dict[str, dict[str, float]] = {}
        for domain in DOMAINS:
            rows = [row for row in table.values() if row["domain"] == domain]
            if rows:
                means[domain] = {metric: sum(row[metric] for row in rows) / len(rows) for metric in ("em", "f1")}
        return means

    def as_dict(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        return {"suite": self.suite, **self.domains(), "datasets": self.table()}


def _figures(episodes: Sequence[Trajectory]) -> dict[str, float]:
    n = len(episodes)
    figures: dict[str, float] = {
        metric: sum(score(metric, e.answer, e.question.answers) for e in episodes) / n for metric in ("em", "f1")
    }
    figures |= {
        "n": n,
        "turns": sum(len(episode.turns) for episode in episodes) / n,
        "answered": sum(episode.stop is Stop.ANSWERED for episode in episodes) / n,
        "malformed": abs(sum(episode.total("format") for episode in episodes)) / n,
        "failed": sum(episode.stop.failed for episode in episodes) / n,
    }
    supported = [episode for episode in episodes if episode.question.supporting]
    if supported:
        figures["recall"] = sum(_recall(episode) for episode in supported) / len(supported)
    return figures


def _recall(episode: Trajectory) -> float:
    """Share of the supporting passages that the episode has retrieved."""
    seen = {passage for turn in episode.turns for passage in turn.retrieved}
    wanted = set(episode.question.supporting)
    return len(wanted & seen) / len(wanted)


def evaluate(
    policy: Policy,
    suite: Suite,
    *,
    seed: int = 0,
    num_envs: int = 256,
    out: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """One episode for every question of the suite. `seed` moves all random draws; `out` and `progress` as `rollout`."""
    env = suite.env(num_envs)
    starts = [Start(question, number, (seed << 32) + number) for number, question in enumerate(env.questions)]
    return Evaluation(suite.name, rollout(env, policy, starts, out=out, progress=progress))
