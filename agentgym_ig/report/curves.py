"""Curves of training runs and of reward channels as SVG that takes its ink from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from agentgym_ig.report.runs import Trained
from agentgym_ig.text import clean

COLOURS = ("#3b82c4", "#d9692e", "#4a9d4a", "#a067c7", "#b08a1c", "#d0518f")
"""Of runs, in order; all can be read on white and on black."""
STYLES = {"-": "", "--": "5 2.5", ":": "1.5 2", "-.": "5 2 1.5 2"}
"""Of lines, and their dashes in SVG."""
MOST_POINTS = 600
"""Drawn of a curve; a longer one is drawn as means of equally many steps each."""

_INK = "#123457"  # stands for the text colour of the page
_PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Exact match",
        "Share of episodes whose answer is right: in the training batch, and in the evaluations during training.",
        ("evaluation.in_domain.em", "evaluation.out_of_domain.em", "em"),
    ),
    (
        "F1 in evaluations",
        "Overlap of words with the gold answer.",
        tuple(f"evaluation.{d}.f1" for d in ("in_domain", "out_of_domain")),
    ),
    ("Reward", "Per episode; outcome is the answer's part of it.", ("reward", "outcome")),
    ("Information gain", "Per episode, summed over its turns.", ("info_gain",)),
    ("Entropy", "Mean of -log p over the sampled tokens, in nats.", ("entropy",)),
    (
        "KL",
        "To the policy that sampled, nats per token; kl_loss: to the first model, times its weight.",
        ("kl", "kl_loss"),
    ),
    (
        "Clipped tokens",
        "Share without any gradient (cut), and of those pulled at less than a tenth (damped).",
        ("cut", "damped"),
    ),
    (
        "Ratios",
        "Mean ratio to the policy that sampled, trust in it, and effective share of samples.",
        ("ratio", "trust", "effective"),
    ),
    ("Turns and searches", "Per episode.", ("turns", "searches")),
    ("Tokens", "Sampled per episode.", ("tokens_per_episode",)),
    (
        "Episodes",
        "Answered, without any advantage, and malformed turns, per episode.",
        ("answered", "no_signal", "malformed"),
    ),
    ("Losses", "Each term with its weight.", ("policy_loss", "value_loss", "entropy_loss")),
    ("Gradient norm", "Before clipping.", ("grad_norm", "critic_grad_norm")),
    ("Learning rate", "", ("learning_rate", "critic_learning_rate")),
)
_NOT_DRAWN = {"step", "episodes", "episodes_played", "updates"}


@dataclass(frozen=True)
class Line:
    """One line of a panel; points without a finite value are left out."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    style: str = "-"
    sparse: bool = False
    """Whether the points are few, and are marked."""


@dataclass(frozen=True)
class Key:
    """What a line of a plot is, how it looks, and its last value."""

    label: str
    value: str
    colour: str
    dashes: str
    faint: bool


@dataclass(frozen=True)
class Panel:
    """A plot, what it shows, and its lines."""

    title: str
    about: str
    svg: str
    keys: list[Key]


def training_panels(runs: Sequence[Trained]) -> tuple[list[Panel], list[Panel]]:
    """The panels of what every run has, and others: of all further numbers, and of what never changes."""
    rows = {run.label: [dict(_flat(row)) for row in run.rows] for run in runs}
    names = list(dict.fromkeys(name for own in rows.values() for row in own for name in row))
    known = {name for _, _, own in _PANELS for name in own}
    seconds = tuple(name for name in names if name.endswith("_s"))
    others = [name for name in names if name not in known and name not in seconds and name not in _NOT_DRAWN]
    wanted = [*_PANELS, ("Seconds", "Per step, by phase.", seconds)]
    still = [own for own in wanted if not any(_changes(each, own[2]) for each in rows.values())]
    panels = [_metric_panel(rows, *own) for own in wanted if own not in still]
    more = [_metric_panel(rows, *own) for own in (*still, *((name, "", (name,)) for name in others))]
    return [own for own in panels if own], [own for own in more if own]


def _changes(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> bool:
    """Whether any of these metrics has more than one value, or has been measured but once."""
    values = [[row[name] for row in rows if name in row] for name in names]
    return any(len(set(own)) > 1 or len(own) == 1 for own in values)


def channel_panels(channels: Mapping[str, Mapping[str, Sequence[tuple[int, bool, float]]]]) -> list[Panel]:
    """A panel for each channel, of its mean by turn, for won and lost episodes: channel → run → (turn, won, value)."""
    panels = []
    for name, runs in sorted(channels.items()):
        lines = []
        for colour, (label, values) in zip(_cycle(COLOURS, len(runs)), runs.items(), strict=True):
            before = f"{label}, " if len(runs) > 1 else ""
            lines += [
                Line(f"{before}won", _means(values, True), colour, "-", True),
                Line(f"{before}lost", _means(values, False), colour, "--", True),
            ]
        drawn = [line for line in lines if line.points]
        if any(value for line in drawn for _, value in line.points):
            panels.append(
                _panel(name.replace("_", " "), "Mean by turn, over the episodes that have it there.", drawn, "turn")
            )
    return panels


def _means(values: Iterable[tuple[int, bool, float]], won: bool) -> list[tuple[float, float]]:
    by_turn: dict[int, list[float]] = {}
    for turn, own, value in values:
        if own == won:
            by_turn.setdefault(turn, []).append(value)
    return [(turn, math.fsum(own) / len(own)) for turn, own in sorted(by_turn.items())]


def _cycle(values: Sequence[str], count: int) -> list[str]:
    return [values[number % len(values)] for number in range(count)]


def _flat(row: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, float]]:
    """All numbers of a row, those of objects in it under joined names."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{before}{name}", float(value)


def _metric_panel(
    rows: Mapping[str, Sequence[Mapping[str, float]]], title: str, about: str, names: Sequence[str]
) -> Panel | None:
    by_episodes = all("episodes_played" in row for own in rows.values() for row in own)
    lines = []
    for colour, (label, own) in zip(_cycle(COLOURS, len(rows)), rows.items(), strict=True):
        steps = [row.get("step", number) for number, row in enumerate(own, 1)]
        xs = list(accumulate(row["episodes_played"] for row in own)) if by_episodes else steps
        for number, name in enumerate(names):
            points = [(x, row[name]) for x, row in zip(xs, own, strict=True) if math.isfinite(row.get(name, math.nan))]
            shade = colour if len(rows) > 1 else COLOURS[number % len(COLOURS)]
            style = list(STYLES)[number % len(STYLES)] if len(rows) > 1 else "-"
            heading = f"{label}, {_said(name)}" if len(rows) > 1 else _said(name)
            lines.append(Line(heading, _thinned(points), shade, style, 0 < len(points) <= len(own) // 2))
    drawn = [line for line in lines if line.points]
    return _panel(title, about, drawn, "episodes played" if by_episodes else "step") if drawn else None


def _said(name: str) -> str:
    """How a metric is called on the page."""
    if not name.startswith("evaluation."):
        return "training batch" if name == "em" else name.removesuffix("_s").replace("_", " ")
    return name.removeprefix("evaluation.").rsplit(".", 1)[0].replace("_", "-")


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[first : first + size] for first in range(0, len(points), size)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


def _panel(title: str, about: str, lines: Sequence[Line], x: str) -> Panel:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": clean(title),
        "lines.dash_capstyle": "butt",
        "font.size": 9,
    }
    settings |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    with rc_context(settings):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        for line in lines:
            xs, ys = zip(*line.points, strict=True)
            mark = "o" if line.sparse or len(line.points) < 3 else ""
            faint = _is_faint(line, lines)
            look: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.5} if faint else {"linewidth": 1.4}
            style = "-" if faint else line.style
            axes.plot(xs, ys, style, color=line.colour, marker=mark, markersize=3.5, **look)
        axes.set_xlabel(x)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_INK, alpha=0.15)
        if x == "turn":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
    keys = [
        Key(own.label, f"{own.points[-1][1]:.3g}", own.colour, "" if faint else STYLES[own.style], faint)
        for own, faint in ((line, _is_faint(line, lines)) for line in lines)
    ]
    return Panel(title, about, _for_the_page(drawn.getvalue(), title), keys)


def _is_faint(line: Line, lines: Sequence[Line]) -> bool:
    """Whether it is a noisy line beside others of few good points."""
    return not line.sparse and any(own.sparse for own in lines)


def _for_the_page(svg: str, title: str) -> str:
    """Matplotlib's SVG without style attributes, which the page's policy forbids, and with the page's own ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>|<style\b[^>]*/>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' id="[A-Za-z.\d]+_[\d_]+"', "", svg)  # those that nothing refers to
    svg = re.sub(r' style="([^"]*)"', _attributes, svg).replace(_INK, "currentColor")
    svg = re.sub(r'^<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, flags=re.S)
    name = re.sub(r"[^\w .,-]", "", title)
    return re.sub(r"\n\s*", "\n", svg).replace(">", f"><title>{name}</title>", 1)


def _attributes(style: re.Match[str]) -> str:
    """The same drawing as attributes."""
    attributes = ""
    for part in style[1].split(";"):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name == "font":
            size = re.search(r"[\d.]+px", value)
            attributes += f' font-size="{size.group() if size else "9px"}"'
        elif name and name != "font-family":
            attributes += f' {name}="{value}"'
    return attributes
