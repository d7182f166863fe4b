"""What all commands share: the terminal, progress bars, tables, and what happens on Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console()

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Turns Ctrl-C into the advice on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"\n[yellow]Interrupted.[/] {advice}")
        raise typer.Exit(INTERRUPTED) from None


def progress_bar() -> Progress:
    """A bar with counts, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Any]:
    """One bar; yields a function that takes the number done and a note to show."""
    with progress_bar() as shown:
        task = shown.add_task(description, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            shown.update(task, completed=done, note=note)

        yield advance


def evaluation_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """EM and F1 per dataset and domain. columns: heading → an evaluation as `Evaluation.as_dict` gives it."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("dataset", no_wrap=True)
    table.add_column("domain", no_wrap=True)
    for heading in columns:
        table.add_column(f"{heading}\nEM".strip(), justify="right")
        table.add_column(f"{heading}\nF1".strip(), justify="right")
    first = next(iter(columns.values()))
    for name, row in first["datasets"].items():
        cells = [_percent(column["datasets"][name][metric]) for column in columns.values() for metric in ("em", "f1")]
        table.add_row(name, row["domain"].replace("_", "-"), *cells)
    table.add_section()
    for domain in ("in_domain", "out_of_domain"):
        if domain in first:
            cells = [_percent(column[domain][metric]) for column in columns.values() for metric in ("em", "f1")]
            table.add_row("mean", domain.replace("_", "-"), *cells, style="bold")
    return table


TERMINAL = ("em", "f1", "cover_em", "judge", "recall", "searches", "info_gain", "truncated", "failed")
"""Figures that fit a terminal; the tables in files have all."""


def figures_table(figures: Mapping[str, Any]) -> Table:
    """The main figures of an evaluation, as `agentgym_ig.envs.results.save` returns them."""
    from agentgym_ig.envs.results import cell, columns, rows
    from agentgym_ig.headings import HEADINGS

    lines = rows(figures)
    shown = [name for name in columns(lines) if name in TERMINAL]
    shown = [name for name in shown if name not in ("truncated", "failed") or any(line.get(name) for line in lines)]
    title = f"{figures['card']['policy']['name']} on {figures['suite']}: shares in percent, 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("dataset", "domain"):
        table.add_column(heading, no_wrap=True)
    for heading in ("n", *(HEADINGS[name] for name in shown)):
        table.add_column(heading, justify="right", no_wrap=heading in ("n", HEADINGS["em"]))
    for line in lines:
        cells = [cell(line, name) if name == "em" else cell(line, name).split(" ")[0] for name in shown]
        domain = {"in_domain": "ID", "out_of_domain": "OOD"}.get(line["domain"], line["domain"])
        style = "bold" if line["dataset"] == "mean" else None
        table.add_row(line["dataset"], domain, str(line.get("n", "")), *cells, style=style)
    return table


def comparison_table(title: str, parts: Mapping[str, Any], *, scale: float = 100.0) -> Table:
    """Differences of two runs. parts: dataset, domain or `all` → an `agentgym_ig.statistics.Comparison`."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "difference", "95 % interval", "A better", "B better", "exact p"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, own in parts.items():
        low, high = (scale * end for end in own.interval)
        counts = f"{own.a_only:,}", f"{own.b_only:,}", f"{own.p:.2g}"
        table.add_row(name.replace("_", "-"), f"{scale * own.difference:+.2f}", f"[{low:+.2f}, {high:+.2f}]", *counts)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
