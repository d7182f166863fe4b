"""The table of an evaluation's figures, or of several evaluations' beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentgym_ig.headings import HEADINGS, PLAIN
from agentgym_ig.report.runs import Evaluated

DOMAINS = ("in_domain", "out_of_domain")
FIRST = ("em", "f1", "judge", "recall")
"""The figures that several evaluations are compared by; of one, those that come first."""
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A figure as it is shown, the interval around it, and whether it is a difference that counts as better."""

    text: str
    interval: str = ""
    better: bool | None = None


@dataclass(frozen=True)
class Line:
    """A dataset's cells, or those of the mean over a domain's datasets."""

    name: str
    domain: str
    questions: str
    cells: list[Cell]
    mean: bool = False


@dataclass(frozen=True)
class Table:
    """`groups` are (heading, columns below it)."""

    labels: list[str]
    groups: list[tuple[str, list[str]]]
    lines: list[Line]


def table(evaluations: Sequence[Evaluated], only: Sequence[str] = ()) -> Table:
    """A line for each dataset and domain. Of two evaluations the difference is shown too, second less first."""
    every: list[tuple[str, str, list[_Row]]] = []
    names = list(dict.fromkeys(name for own in evaluations for name in own.figures["datasets"]))
    rows = {name: [own.figures["datasets"].get(name, {}) for own in evaluations] for name in names}
    domain_of = {name: next((str(row["domain"]) for row in own if "domain" in row), "") for name, own in rows.items()}
    for domain in dict.fromkeys((*DOMAINS, *domain_of.values())):
        every += [(name, domain, rows[name]) for name in names if domain_of[name] == domain]
        every.append(("mean", domain, [own.figures.get(domain, {}) for own in evaluations]))
    every.append(("mean", "all", [own.figures.get("all", {}) for own in evaluations]))
    every = [line for line in every if any(line[2])]
    figures = dict.fromkeys((*FIRST, *HEADINGS))
    figures |= dict.fromkeys(name for _, _, own in every for row in own for name in row)
    shown = [name for name in figures if any(_is_figure(row, name) for _, _, own in every for row in own)]
    shown = [name for name in shown if not only or name in only]
    labels = [own.label for own in evaluations]
    columns = labels + (["difference"] if len(labels) == 2 else [])
    groups = [(HEADINGS.get(name, name.replace("_", " ")), columns if len(labels) > 1 else []) for name in shown]
    return Table(labels, groups, [_line(*line, shown) for line in every])


def _line(name: str, domain: str, rows: Sequence[_Row], shown: Sequence[str]) -> Line:
    counts = dict.fromkeys(int(row["n"]) for row in rows if "n" in row)
    cells = []
    for figure in shown:
        cells += [_cell(row, figure) for row in rows]
        if len(rows) == 2:
            cells.append(_difference(rows[0], rows[1], figure))
    return Line(name, domain.replace("_", "-"), " / ".join(map(str, counts)), cells, mean=name == "mean")


def _is_figure(row: _Row, name: str) -> bool:
    return name != "n" and isinstance(row.get(name), int | float) and not isinstance(row[name], bool)


def _cell(row: _Row, name: str) -> Cell:
    if not _is_figure(row, name):
        return Cell("")
    interval = (row.get("intervals") or {}).get(name)
    return Cell(_said(row[name], name), f"{_said(interval[0], name)}–{_said(interval[1], name)}" if interval else "")


def _said(value: float, name: str) -> str:
    return f"{value:.2f}" if name in PLAIN else f"{100 * value:.1f}"


def _difference(one: _Row, other: _Row, name: str) -> Cell:
    if not (_is_figure(one, name) and _is_figure(other, name)):
        return Cell("")
    difference = 100 * (other[name] - one[name])
    return Cell(f"{difference:+.1f}", better=None if round(difference, 1) == 0 else difference > 0)
