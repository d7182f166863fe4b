"""Runs for the tests of the report: small evaluation and training folders of every kind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentgym_ig.envs.evaluate import Evaluation
from agentgym_ig.envs.results import save
from agentgym_ig.envs.suites import Domains
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.records import write_episodes
from agentgym_ig.types import Action, Passage, Question, Stop, Trajectory, Turn

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></script></textarea>"
    "<!-- {{ 7 * 7 }} ${document.title='owned'} \u2028 \u2029 \ud800 javascript:alert(1) <svg onload=alert(1)> ]]>"
    "<style>*{display:none}</style> & &lt;b&gt; ]]> '\"` \x00 \x1b[31m [red]markup[/red]"
)
DOMAINS: Domains = {"nq": "in_domain", "musique": "out_of_domain"}
PASSAGES = [
    Passage("p1", "Warsaw", "Warsaw is the capital of Poland. The chemist Marie  Curie was born there."),
    Passage("p2", "Radium", "Radium was found in 1898. " + "It glows in the dark, and much was said of that. " * 12),
]


def episode(number: int, *, dataset: str = "nq", answer: str | None = "Marie Curie", **own: Any) -> Trajectory:
    """Two turns: a search with a thought, and an answer. own: question, think, gains, seed, passages, tokens, stop."""
    prompt = PROMPTS["search-r1"]
    passages: Sequence[Passage] = own.get("passages", PASSAGES)
    gains = own.get("gains", (0.5,))
    question = Question(
        f"{dataset}-{number}", own.get("question", f"Who was born in Warsaw, number {number}?"),
        ("Marie Curie", "Maria Skłodowska"), dataset, ("p1",),
    )  # fmt: skip
    searched = f"<think>{own.get('think', 'I must look it up.')}</think>\n<search>born in Warsaw</search>"
    last = f"<answer>{answer}</answer>" if answer is not None else "I do not know."
    tokens = own.get("tokens", True)
    reply = prompt.render_shown(prompt.shown(passages))
    turns = [
        Turn(
            Action(searched, tuple(range(9)) if tokens else (), (-0.1,) * 9 if tokens else ()), reply,
            {"format": 0.0, "info_gain": gain}, ("born in Warsaw",), tuple(passage.id for passage in passages),
        )
        for gain in gains
    ]  # fmt: skip
    won = float(answer == "Marie Curie")
    turns.append(Turn(Action(last, (1, 2, 3), (-0.5,) * 3), "", {"format": 0.0, "outcome": won}))
    stop = own.get("stop", Stop.ANSWERED if answer is not None else Stop.MAX_TURNS)
    seed = own.get("seed", number)
    return Trajectory(
        question, prompt.opening(question.text, 5), tuple(turns), stop, number, seed, answer=answer,
        error=own.get("error"),
    )  # fmt: skip


def several(won: Sequence[int], count: int = 12) -> list[Trajectory]:
    """Episodes of two datasets, of which those in `won` are."""
    return [
        episode(
            number, dataset="nq" if number % 2 else "musique", gains=(0.25 * number, -0.5)[: 1 + number % 2],
            answer="Marie Curie" if number in won else "Pierre Curie",
        )
        for number in range(count)
    ]  # fmt: skip


def evaluation(folder: Path, episodes: Sequence[Trajectory], *, suite: str = "igpo", **card: Any) -> Path:
    """An evaluation folder, as the command writes it."""
    folder.mkdir(parents=True)
    write_episodes(folder / "episodes.jsonl", episodes)
    save(folder, Evaluation(suite, DOMAINS, episodes), {"policy": {"name": "curie"}, **card})
    return folder


def row(step: int, **more: Any) -> dict[str, Any]:
    """A step's metrics."""
    return {
        "step": step, "episodes": 8, "episodes_failed": 0, "episodes_played": 8, "em": 0.1 * step,
        "entropy": 1 / step, "cut": 0.0, "rollout_s": 0.5, "alarms": [], **more,
    }  # fmt: skip


def training(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A training run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
    return folder


def rows_of_all_kinds() -> list[dict[str, Any]]:
    """Metrics with evaluations, an alarm, a channel of the user's own, and a number that is none."""
    rows = [row(step, **{"my_$channel_{": step / 2}) for step in range(1, 7)]
    rows[2]["evaluation"] = {"in_domain": {"em": 0.5, "f1": 0.6}, "out_of_domain": {"em": 0.25, "f1": 0.3}}
    rows[3]["entropy"] = math.nan
    rows[4]["alarms"] = rows[5]["alarms"] = ["entropy_collapse: it is <b>gone</b>"]
    return rows
