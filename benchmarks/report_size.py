"""How large the report of ten thousand episodes is, and how soon it opens in a browser.

    python -m benchmarks.report_size --out benchmarks/results/report_size.json

Episodes of four turns are played over 60,000 real Wikipedia passages, three to a search, by the multi-hop baseline;
before each action stands a thought of 60 words, taken from a passage of its own, since a script thinks nothing. The
report of one such run, and that of two side by side, is opened in headless Chromium, each time with a fresh profile.
Needs playwright, a Chromium, and the real data (see `benchmarks.corpora`).
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from agentgym_ig import Conversation
from agentgym_ig.baselines import multi_hop
from agentgym_ig.commands.console import console
from agentgym_ig.commands.parts import open_suite
from agentgym_ig.envs import Start, Suite, prompts_of, rollout
from agentgym_ig.envs.evaluate import Evaluation
from agentgym_ig.envs.results import save
from agentgym_ig.indexes import Bm25Index, read_corpus
from agentgym_ig.records import write_episodes, write_json
from agentgym_ig.report import write_report
from benchmarks.corpora import DATA, PASSAGES
from benchmarks.measure import fresh, where

OPENINGS = 5


class Thinking:
    """A policy that thinks 60 words before each action of another one."""

    def __init__(self, policy: Any, seed: int) -> None:
        self.policy = policy
        words = (passage.text.split()[:60] for passage in read_corpus(PASSAGES))
        self.thoughts = [" ".join(own).replace("<", "") for own in words]
        self.rng = random.Random(seed)

    def __call__(self, conversations: Sequence[Conversation], /) -> list[str]:
        """A thought and the action for each conversation."""
        return [f"<think>{self.rng.choice(self.thoughts)}</think>\n{act}" for act in self.policy(conversations)]


def play(suite: Suite, episodes: int, seed: int, out: Path) -> None:
    """Write an evaluation folder of so many episodes."""
    env = suite.env(256)
    names = islice(cycle(env.questions), episodes)
    starts = [Start(name, number, (seed << 32) + number) for number, name in enumerate(names)]
    played = rollout(env, Thinking(multi_hop(prompts_of(env), searches=3), seed), starts)
    out.mkdir()
    write_episodes(out / "episodes.jsonl", played)
    save(out, Evaluation(suite.name, suite.domains, played), {"policy": {"name": f"multi-hop, seed {seed}"}})


def written(folders: Sequence[Path], page: Path) -> dict[str, float]:
    """Write the page in a process of its own; its size, the seconds that took, and the process's memory."""
    started = time.perf_counter()
    _, peak = fresh(_write, list(folders), page)
    seconds = time.perf_counter() - started
    return {"page_mb": round(page.stat().st_size / 1e6, 1), "write_s": round(seconds, 1), "write_peak_mb": peak}


def _write(folders: Sequence[Path], page: Path) -> None:
    write_report(folders, page)


def opened(page: Path, chromium: str) -> dict[str, float]:
    """Seconds, median of several, until the figures stand there, the list, and an episode that is clicked; and of a
    search through all turns.
    """
    from playwright.sync_api import sync_playwright

    times: dict[str, list[float]] = {"open_s": [], "list_s": [], "episode_s": [], "filter_s": [], "search_turns_s": []}
    with sync_playwright() as driver:
        for _ in range(OPENINGS):
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page(viewport={"width": 1360, "height": 900})
            clock = time.perf_counter()

            def lap(name: str) -> None:
                nonlocal clock
                times[name].append(time.perf_counter() - clock)
                clock = time.perf_counter()

            tab.goto(page.as_uri(), wait_until="load")
            lap("open_s")
            tab.click("#to-episodes")
            tab.wait_for_selector("#reader h2")
            lap("list_s")
            tab.click("[data-index='5']")
            tab.wait_for_selector("#row-5[aria-selected=true]")
            tab.wait_for_selector("#reader .turn")
            lap("episode_s")
            tab.select_option("#outcome", "won")
            tab.wait_for_function("() => document.querySelector('#count').textContent.includes(' of ')")
            lap("filter_s")
            tab.select_option("#outcome", "")
            clock = time.perf_counter()
            tab.check("#everywhere")
            tab.fill("#text", "nobel prize in physics")
            tab.wait_for_function("() => /^[0-9,]+ of /.test(document.querySelector('#count').textContent)")
            lap("search_turns_s")
            browser.close()
    return {name: round(median(own), 2) for name, own in times.items()}


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    episodes: Annotated[int, typer.Option(help="Episodes of a run.")] = 10_000,
    keep: Annotated[Path | None, typer.Option(help="Keep the runs and pages in this folder.")] = None,
) -> None:
    """Measure and print."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise typer.BadParameter("no Chromium on this machine; install one first")
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        runs = [folder / "a", folder / "b"]
        if not all(own.is_dir() for own in runs):
            Bm25Index.build(read_corpus(PASSAGES), folder / "index")
            for seed, own in enumerate(runs):
                suite = open_suite("igpo", DATA / "questions", [str(folder / "index")], None, {"top_k": 3})
                play(suite, episodes, seed, own)
        figures: dict[str, Any] = {**where(), "episodes": episodes}
        for name, shown in (("one_run", runs[:1]), ("two_runs", runs)):
            page = folder / f"{name}.html"
            figures[name] = written(shown, page) | opened(page, chromium)
            console.print(name, figures[name])
    if out is not None:
        write_json(out, figures)


if __name__ == "__main__":
    typer.run(main)
