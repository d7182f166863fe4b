"""`agentgym-ig report` and `agentgym-ig show`: runs as one HTML page, and episodes in the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.rule import Rule
from rich.text import Text

from agentgym_ig.commands.console import console
from agentgym_ig.errors import AgentGymError

if TYPE_CHECKING:
    from agentgym_ig.types import Trajectory


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders that eval, train or quickstart wrote; of two, the page compares them.")
    ],
    out: Annotated[Path, typer.Option(help="The page, one HTML file.")] = Path("report.html"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again whenever a run has gone on, until Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two looks of --watch.")] = 30.0,
) -> None:
    """One HTML page of runs: figures in- and out-of-domain, curves, channels, and every episode to read and search."""
    from agentgym_ig.report import write_report

    if out.is_dir():
        raise FileExistsError(f"{out} is a folder; name a file, such as --out {out / 'report.html'}")
    if out.exists() and not force:
        raise FileExistsError(f"{out} is there already; write over it with --force, or give another --out")
    found = write_report(runs, out, reload=every if watch else None)
    _say(out)
    if not watch:
        return
    console.print(f"watching; Ctrl-C ends it, and {out} stays", highlight=False)
    try:
        _watch(runs, out, every, found.stamp)
        return
    except KeyboardInterrupt:
        out.with_name(f".{out.name}.partial").unlink(missing_ok=True)
        console.print(f"\n{out} stays as it is", highlight=False)


def _watch(runs: list[Path], out: Path, every: float, seen: object) -> None:
    """Look again and again; what cannot be read just now is read at the next look."""
    from agentgym_ig.report import find_runs, write_report

    while True:
        time.sleep(every)
        try:
            if find_runs(runs).stamp != seen:
                seen = write_report(runs, out, reload=every).stamp
                _say(out)
        except (AgentGymError, ValueError, FileNotFoundError) as error:
            console.print(Text(f"not written this time: {error}", style="yellow"), soft_wrap=True)


def _say(out: Path) -> None:
    console.print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)", highlight=False, soft_wrap=True)


def show(
    run: Annotated[Path, typer.Argument(help="A folder that eval or quickstart wrote, or a file of episodes.")],
    name: Annotated[str | None, typer.Option("--id", help="Of the question, with or without its dataset.")] = None,
    won: Annotated[bool, typer.Option("--won", help="Only those answered right.")] = False,
    lost: Annotated[bool, typer.Option("--lost", help="Only those that were not.")] = False,
    dataset: Annotated[str | None, typer.Option(help="Only those of this dataset.")] = None,
    n: Annotated[int, typer.Option(min=1, help="How many at most.")] = 1,
) -> None:
    """Print episodes: every turn, what it found, its channels, and how it ended."""
    from agentgym_ig.answers import score
    from agentgym_ig.envs.terminal import recorded

    if won and lost:
        raise ValueError("--won and --lost exclude each other; leave out both to see all")
    shown = 0
    for label, episode in _episodes(run):
        question = episode.question
        right = bool(score("em", episode.answer, question.answers))
        if name is not None and name not in (question.id, f"{question.dataset}/{question.id}"):
            continue
        if (won and not right) or (lost and right) or (dataset is not None and question.dataset != dataset):
            continue
        console.print(Rule(Text(label)), recorded(episode), highlight=False)
        shown += 1
        if shown == n:
            return
    if not shown:
        raise ValueError(f"no episode in {run} is as asked for; leave out some of --id, --won, --lost and --dataset")


def _episodes(run: Path) -> Iterator[tuple[str, Trajectory]]:
    """(what it belongs to, episode) of all episodes of a folder or a file."""
    from agentgym_ig.records import EPISODES_FILE
    from agentgym_ig.report import find_runs
    from agentgym_ig.report.runs import read_lines

    if run.is_file():
        yield from ((run.name, episode) for episode in read_lines(run))
        return
    evaluations = [own for own in find_runs([run]).evaluations if (own.folder / EPISODES_FILE).is_file()]
    if not evaluations:
        raise FileNotFoundError(f"{run} holds no {EPISODES_FILE}; play some: agentgym-ig eval --out FOLDER")
    for evaluation in evaluations:
        yield from ((evaluation.label, episode) for episode in evaluation.episodes())
