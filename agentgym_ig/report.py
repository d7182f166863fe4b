"""A training run as one self-contained HTML page."""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the page for a quickstart's `report.json`. It loads nothing from anywhere, and all text is escaped."""
    template = Environment(autoescape=True).from_string((files("agentgym_ig") / "report.html").read_text("utf-8"))
    runs = {report["recipe"]: {"after": report["after"], "curve": report["curve"]}, **report["compare"]}
    page = template.render(
        report=report,
        runs=runs,
        curve=_learning_curve(runs),
        largest=max((abs(g) for episode in report["episodes"] for g in _gains(episode)), default=1.0) or 1.0,
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _gains(episode: dict[str, Any]) -> list[float]:
    return [turn["rewards"]["info_gain"] for turn in episode["turns"] if "info_gain" in turn["rewards"]]


def _learning_curve(runs: dict[str, dict[str, Any]]) -> str:
    """EM against rollouts as SVG: the training batches, and the validation world in- and out-of-domain."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    colours = ["#0b6e99", "#c4572b", "#4f7a28"]
    for colour, (name, run) in zip(colours, runs.items(), strict=False):
        rollouts, seen = [], 0
        for row in run["curve"]:
            seen += row["episodes"] + row["episodes_failed"]
            rollouts.append(seen)
        axes.plot(
            rollouts, [row.get("em") for row in run["curve"]], color=colour, alpha=0.35, label=f"{name}, training batch"
        )
        measured = [
            (x, row["evaluation"]) for x, row in zip(rollouts, run["curve"], strict=True) if "evaluation" in row
        ]
        for domain, style in (("in_domain", "-o"), ("out_of_domain", "--s")):
            points = [(x, means[domain]["em"]) for x, means in measured if domain in means]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=colour,
                    markersize=4,
                    label=f"{name}, validation, {domain.replace('_', '-')}",
                )
    axes.set(xlabel="rollouts", ylabel="exact match", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
