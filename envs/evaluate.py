"""How well a policy does on a suite: figures per dataset, in-domain and out-of-domain, with confidence intervals.

The metrics come from the answers alone; no shaped channel enters them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agentgym_ig.answers import METRICS, score
from agentgym_ig.envs.rollout import Start, rollout
from agentgym_ig.envs.suites import DOMAINS, Domains, Suite
from agentgym_ig.policies import Policy
from agentgym_ig.records import forget_failed
from agentgym_ig.statistics import Comparison, bootstrap_interval, compare, pass_at
from agentgym_ig.types import Stop, Trajectory

TRUNCATED = (Stop.MAX_TURNS, Stop.MAX_SEARCHES, Stop.MAX_OBSERVATION, Stop.CONTEXT_FULL)
WITH_INTERVAL = (*METRICS, "recall", "judge")
"""Figures that a report gives a confidence interval."""

Values = dict[str, float | None]


def episode_figures(episode: Trajectory) -> Values:
    """The figures of one episode; None where it has no such figure.

    The answer metrics; `recall`: share of the supporting passages that were retrieved; `answered`, `truncated` (a
    budget or the context ended it), `failed` (search or scoring did); `turns`; `searches`: queries; `tokens`: those
    that the policy wrote; `format_valid`: share of well-formed actions; `info_gain`: mean over the turns that have it.
    """
    gains = [value for value in episode.channel("info_gain") if value is not None]
    formats = [value for value in episode.channel("format") if value is not None]
    return {
        **{metric: score(metric, episode.answer, episode.question.answers) for metric in METRICS},
        "recall": _recall(episode),
        "answered": float(episode.stop is Stop.ANSWERED),
        "truncated": float(episode.stop in TRUNCATED),
        "failed": float(episode.stop.failed),
        "turns": float(len(episode.turns)),
        "searches": float(sum(len(turn.queries) for turn in episode.turns)),
        "tokens": float(sum(len(turn.action.token_ids) for turn in episode.turns)) or None,
        "format_valid": sum(value == 0 for value in formats) / len(formats) if formats else None,
        "info_gain": sum(gains) / len(gains) if gains else None,
    }


def _recall(episode: Trajectory) -> float | None:
    wanted = set(episode.question.supporting)
    seen = {passage for turn in episode.turns for passage in turn.retrieved}
    return len(wanted & seen) / len(wanted) if wanted else None


@dataclass(frozen=True)
class Evaluation:
    """The episodes of one evaluation, and the figures made of them.

    Questions are told apart by dataset and id; several episodes of one are its tries. `verdicts` are a judge's (1 or
    0, None for none), one for each episode, if there was one.
    """

    suite: str
    domains_of: Domains
    episodes: Sequence[Trajectory]
    verdicts: Sequence[float | None] | None = None

    def questions(self) -> dict[tuple[str, str], tuple[str, tuple[str, ...]]]:
        """(dataset, id) → text and answers of every question."""
        every = (episode.question for episode in self.episodes)
        return {(own.dataset, own.id): (own.text, own.answers) for own in every}

    @cached_property
    def values(self) -> dict[str, dict[str, Values]]:
        """Dataset → question id → its figures, means over its tries; datasets in the suite's order."""
        tried: dict[str, dict[str, list[Values]]] = {name: {} for name in self.domains_of}
        for place, episode in enumerate(self.episodes):
            own = episode_figures(episode)
            if self.verdicts is not None:
                own["judge"] = self.verdicts[place]
            tried[episode.question.dataset].setdefault(episode.question.id, []).append(own)
        return {
            dataset: {question: _means(tries) for question, tries in questions.items()}
            for dataset, questions in tried.items()
            if questions
        }

    def table(self, *, intervals: bool = False) -> dict[str, dict[str, Any]]:
        """Dataset → its domain, number of questions `n`, and the mean of every figure over its questions."""
        return {
            name: {
                "domain": self.domains_of[name],
                "n": len(rows),
                **{figure: value for figure, value in _means(rows).items() if value is not None},
                **({"intervals": _intervals([rows])} if intervals else {}),
            }
            for name, rows in self._rows().items()
        }

    def _rows(self) -> dict[str, list[Values]]:
        return {name: list(questions.values()) for name, questions in self.values.items()}

    def domains(self, metrics: Sequence[str] = ("em", "f1"), *, intervals: bool = False) -> dict[str, dict[str, Any]]:
        """Domain → its figures, the plain mean over its datasets as in the papers.

        Domains without data are left out, as are figures that not all of a domain's datasets have.
        """
        rows = self._rows()
        means: dict[str, dict[str, Any]] = {}
        for domain in DOMAINS:
            means |= _over_datasets(
                domain, [own for name, own in rows.items() if self.domains_of[name] == domain], metrics, intervals
            )
        return means

    def as_dict(self) -> dict[str, Any]:
        """Everything as one JSON object: each domain, `all` datasets, and every dataset, with 95 % intervals."""
        names = (*METRICS, "judge", "recall", "turns", "searches", "tokens")
        every = _over_datasets("all", list(self._rows().values()), names, True)
        return {
            "suite": self.suite,
            **self.domains(names, intervals=True),
            **every,
            "datasets": self.table(intervals=True),
            **self.tries(),
        }

    def tries(self) -> dict[str, Any]:
        """Where each question was tried n > 1 times: dataset → pass@k for k = 1, 2, 4, ... n, and the best of n.

        pass@k is the chance that one of k tries is an exact match; `best_of` the mean of the best metric over all
        tries, chosen by that metric alone.
        """
        groups: dict[str, dict[str, list[Trajectory]]] = {}
        for episode in self.episodes:
            groups.setdefault(episode.question.dataset, {}).setdefault(episode.question.id, []).append(episode)
        counts = {len(own) for questions in groups.values() for own in questions.values()}
        if len(counts) != 1 or counts == {1}:
            return {}
        (n,) = counts
        return {"tries": n, "pass": {name: _best(list(questions.values()), n) for name, questions in groups.items()}}


def _best(groups: Sequence[Sequence[Trajectory]], n: int) -> dict[str, Any]:
    """pass@k and best-of-n of one dataset, from the tries at each of its questions."""
    scores = {
        metric: [[score(metric, own.answer, own.question.answers) for own in tries] for tries in groups]
        for metric in ("em", "f1")
    }
    sizes = sorted({k for power in range(n.bit_length()) if (k := 2**power) <= n} | {n})
    wins = [int(sum(own)) for own in scores["em"]]
    return {
        "pass_at": {str(k): _mean([pass_at(k, won, n) for won in wins]) for k in sizes},
        "best_of": {metric: _mean([max(own) for own in each]) for metric, each in scores.items()},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _means(rows: Sequence[Values]) -> Values:
    """The mean of every figure over the rows that have it."""
    found = {name: [value for row in rows if (value := row.get(name)) is not None] for name in rows[0]}
    return {name: _mean(values) if values else None for name, values in found.items()}


def _having(rows: Iterable[Values], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _intervals(strata: Sequence[Sequence[Values]]) -> dict[str, list[float]]:
    """The intervals of all figures that have one and that every stratum has."""
    found = {name: [_having(rows, name) for rows in strata] for name in WITH_INTERVAL}
    return {name: list(bootstrap_interval(values)) for name, values in found.items() if all(values)}


def _over_datasets(
    name: str, strata: Sequence[Sequence[Values]], metrics: Sequence[str], intervals: bool
) -> dict[str, dict[str, Any]]:
    """{name: figures} over some datasets; empty where there are none."""
    if not strata:
        return {}
    means = [_means(rows) for rows in strata]
    shared = [metric for metric in metrics if all(own.get(metric) is not None for own in means)]
    figures: dict[str, Any] = {metric: _mean([own[metric] or 0.0 for own in means]) for metric in shared}
    return {name: figures | ({"intervals": _intervals(strata)} if intervals else {})}


def evaluate(
    policy: Policy,
    suite: Suite,
    *,
    seed: int = 0,
    tries: int = 1,
    num_envs: int = 256,
    out: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """`tries` episodes for every question of the suite.

    `seed` moves all random draws; `out` and `progress` are as for `rollout`, and with `out` what is in that file is
    not played again, but for episodes that failed. Raises ValueError for fewer than one try.
    """
    if tries < 1:
        raise ValueError(f"tries={tries} must be 1 or more")
    if out is not None:
        forget_failed(out)
    env = suite.env(num_envs)
    places = ((question, number) for number, question in enumerate(env.questions))
    starts = [
        Start(question, number, (seed << 32) + number * tries + again)
        for question, number in places
        for again in range(tries)
    ]
    return Evaluation(suite.name, suite.domains, rollout(env, policy, starts, out=out, progress=progress))


def compare_evaluations(a: Evaluation, b: Evaluation, metric: str) -> dict[str, Comparison]:
    """Each dataset, domain and `all` → how A differs from B on a metric, over the questions that have it in both.

    Raises ValueError for other suites or questions, and for a metric that no question has.
    """
    if (a.suite, a.domains_of) != (b.suite, b.domains_of):
        raise ValueError(f"one run is of suite {a.suite!r}, the other of {b.suite!r}; compare runs of one suite")
    if a.questions() != b.questions():
        raise ValueError("the two runs were asked other questions; compare runs over the same ones")
    pairs = {name: own for name, own in _pairs(a.values, b.values, metric).items() if own}
    if not pairs:
        raise ValueError(f"no question has a figure called {metric!r} in both runs")
    parts = {name: [name] for name in pairs}
    parts |= {domain: [name for name in pairs if a.domains_of[name] == domain] for domain in DOMAINS}
    parts["all"] = list(pairs)
    return {
        part: compare(*({name: [pair[side] for pair in pairs[name]] for name in names} for side in (0, 1)))
        for part, names in parts.items()
        if names
    }


def _pairs(
    a: dict[str, dict[str, Values]], b: dict[str, dict[str, Values]], metric: str
) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [
            (x, y)
            for question, own in rows.items()
            if (x := own.get(metric)) is not None and (y := b[name][question].get(metric)) is not None
        ]
        for name, rows in a.items()
    }
