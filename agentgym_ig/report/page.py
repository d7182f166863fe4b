"""The page itself: one HTML file with everything in it, that loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from agentgym_ig.answers import score
from agentgym_ig.records import EPISODES_FILE, write_whole
from agentgym_ig.report.curves import channel_panels, training_panels
from agentgym_ig.report.episodes import Packed, pack, to_script
from agentgym_ig.report.figures import DOMAINS, FIRST, Table, table
from agentgym_ig.report.runs import Evaluated, Found, Trained, find_runs
from agentgym_ig.text import clean
from agentgym_ig.types import Trajectory

SCRIPTS = ("state.js", "store.js", "filters.js", "list.js", "episode.js", "main.js")
_Values = dict[str, dict[str, list[tuple[int, bool, float]]]]


def write_report(folders: Sequence[Path], path: Path, *, title: str = "", reload: float | None = None) -> Found:
    """Write one page about the runs in `folders`; it appears only when it is whole. Returns what it shows.

    reload: seconds after which the page loads itself anew, for a run that goes on; it stays as it is if None.
    Errors are those of `find_runs`, and CorpusError for a damaged file of episodes.
    """
    found = find_runs(folders)
    write_whole(path, clean(render(found, title=title, reload=reload)).encode())
    return found


def render(found: Found, *, title: str = "", reload: float | None = None) -> str:
    """The page as a string."""
    values: _Values = {}
    runs = [(own.label, _noting(own, values)) for own in found.evaluations if (own.folder / EPISODES_FILE).is_file()]
    packed = pack(runs, list(found.domains))
    packed.table["domains"] = found.domains
    panels, more = training_panels(found.trainings) if any(own.rows for own in found.trainings) else ([], [])
    script, style = "\n".join(map(_own_file, SCRIPTS)), _own_file("page.css")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["value"] = _said
    return environment.from_string(_own_file("page.html")).render(
        title=title or _title(found),
        found=found,
        tables=_tables(found.evaluations),
        panels=panels,
        more=more,
        channels=channel_panels(values),
        alarms=list(_alarms(found.trainings)),
        data=to_script(packed.table),
        packed=packed,
        examples=_examples(packed, found.domains),
        style=style,
        script=script,
        policy=_policy(script, style),
        reload=reload,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
    )


def _own_file(name: str) -> str:
    return (files("agentgym_ig.report") / name).read_text("utf-8")


def _policy(script: str, style: str) -> str:
    """What the browser may do with the page: run this script, use this style, and nothing else."""
    allowed = [base64.b64encode(hashlib.sha256(own.encode()).digest()).decode() for own in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{allowed[0]}'; style-src 'sha256-{allowed[1]}'; connect-src 'none';"
        " base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _title(found: Found) -> str:
    runs = " and ".join(found.names)
    return f"{runs} on {found.suite}" if found.suite else runs


def _noting(run: Evaluated, values: _Values) -> Iterator[Trajectory]:
    """The run's episodes; the values of their channels are noted down as they pass."""
    for episode in run.episodes():
        won = False
        for number, turn in enumerate(episode.turns, 1):
            if number == 1:
                won = _won(episode)
            for name, value in turn.rewards.items():
                if math.isfinite(value):
                    values.setdefault(name, {}).setdefault(run.label, []).append((number, won, float(value)))
        yield episode


def _won(episode: Trajectory) -> bool:
    return bool(score("em", episode.answer, episode.question.answers))


def _tables(evaluations: Sequence[Evaluated]) -> list[Table]:
    """One table with every figure of a single evaluation; of several the main figures beside each other, then each."""
    if len(evaluations) < 2:
        return [table([own]) for own in evaluations]
    return [table(evaluations, FIRST), *(table([own]) for own in evaluations)]


def _alarms(runs: Sequence[Trained]) -> Iterator[tuple[str, str, str]]:
    """(run, alarm, steps) of every alarm that was raised."""
    for run in runs:
        raised: dict[str, list[int]] = {}
        said: dict[str, str] = {}
        for number, row in enumerate(run.rows, 1):
            for alarm in row.get("alarms") or ():
                name = str(alarm).partition(":")[0]
                raised.setdefault(name, []).append(int(row.get("step", number)))
                said[name] = str(alarm)
        for name, steps in raised.items():
            yield run.label, said[name], str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _examples(packed: Packed, domains: Mapping[str, str]) -> list[dict[str, Any]]:
    """Episodes of the last run to begin with: won in and out of domain, and lost, each with as many turns as any."""
    if not packed.table["runs"]:
        return []
    number = len(packed.table["runs"]) - 1
    run, questions = packed.table["runs"][number], packed.table["questions"]
    found = []
    for said, domain, won in (("won, in-domain", 0, 1), ("won, out-of-domain", 1, 1), ("lost", None, 0)):
        fitting = [
            place
            for place, own in enumerate(run["won"])
            if own == won
            and (domain is None or domains.get(questions["dataset"][run["question"][place]]) == DOMAINS[domain])
        ]
        if fitting:
            place = max(fitting, key=lambda own: (run["turns"][own], -own))
            text = questions["text"][run["question"][place]]
            found.append({"said": said, "text": text, "run": number, "place": place})
    return found


def _said(value: object) -> str:
    """A setting as it is shown."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
