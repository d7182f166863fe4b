"""One training run on TinyWiki as a benchmark's unit: what it is made of, how it went, and a file that keeps them all.

A `Trial` says all that decides a run. `play` trains it and returns its curve: exact match and F1, in-domain (questions
like those of training, about entities never seen) and out-of-domain (relations chained in pairs never seen), sampled,
every few steps. `Trials` keeps the results, a line of JSON each, and plays what is missing in two processes, so that a
stopped benchmark goes on where it was.

Names of training, validation and test worlds never meet. RL seed s trains in training world s + 1; rates are chosen
with seeds of their own in validation worlds, and figures are reported from test worlds that nothing was ever chosen on.

KL and entropy terms are off for all recipes, PPO's critic begins at 0 and has a rate of 1e-3 that nobody tuned, and a
budget counts training episodes: IGPO's scoring, PPO's critic and evaluation cost time beside it (`seconds`).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.measure import commit

if TYPE_CHECKING:
    from agentgym_ig.trainers.loop import Run

WARM_STARTS = Path("runs/warm_starts")
"""Where `python -m benchmarks.warm_starts` puts them."""
EVALUATIONS = 12
"""Points of a curve, beside the one before training."""
ASKED = {"validation": 50, "test": 75}
"""Questions of each set at a point of the curve."""
ASKED_AT_END = {"validation": 100, "test": 250}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """All that decides one run."""

    recipe: str
    """A recipe's name, or one of `benchmarks.variants.VARIANTS`."""
    rate: float
    seed: int
    role: str = "test"
    """`validation` or `test`: the world that it is evaluated in."""
    start: str = "tinywiki"
    """The policy to begin with: the shipped one, or a name of `benchmarks.warm_starts`."""
    hops: tuple[int, ...] = (2, 3)
    questions: int = 8
    group: int = 12
    steps: int = 60
    """Steps of so many episodes; a recipe that draws some again takes fewer steps for the same number."""
    updates: int = 4
    epochs: int = 1
    replay: int = 0

    @property
    def key(self) -> str:
        """The trial as text, equal for equal ones."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def places(self) -> int:
        """Episodes per step."""
        return self.questions * self.group


class _Spent(Exception):
    """The episodes of a trial are used up."""


def play(trial: Trial) -> dict[str, Any]:
    """Train as the trial says; returns its curve and figures."""
    import torch
    from transformers.utils import logging

    from agentgym_ig.trainers.loop import train

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    begun = time.perf_counter()
    budget = trial.steps * trial.places
    evaluate = _evaluation(trial)
    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        run = _run(trial, Path(scratch))
        curve = [{"rollouts": 0, **evaluate(run.policy, ASKED[trial.role])}]

        def note(done: int, metrics: dict[str, Any]) -> None:
            steps.append(metrics)
            played = sum(row["episodes_played"] for row in steps)
            if played >= len(curve) * budget / EVALUATIONS:
                curve.append({"rollouts": played, **evaluate(run.policy, ASKED[trial.role])})
            if played >= budget:
                raise _Spent

        with contextlib.suppress(_Spent):
            train(run, progress=note)
    return {
        "trial": asdict(trial),
        "curve": curve,
        "final": evaluate(run.policy, ASKED_AT_END[trial.role]),
        "no_signal": _mean(row.get("no_signal", 1.0) for row in steps),
        "turns": _mean(row.get("turns", 0.0) for row in steps),
        "cut": _mean(row.get("cut", 0.0) for row in steps),
        "trust": _mean(row.get("trust", 1.0) for row in steps),
        "skipped_updates": sum(row.get("skipped_updates", 0) for row in steps),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _mean(values: Iterable[float]) -> float:
    return round(statistics.fmean(values), 4)


def _run(trial: Trial, out: Path) -> Run:
    from agentgym_ig.envs import SearchVectorEnv, SelfGuide, add_channel
    from agentgym_ig.envs.tinywiki import TINYWIKI_RULES, tinywiki_index, tinywiki_questions
    from agentgym_ig.trainers.config import TrainConfig
    from agentgym_ig.trainers.loop import Run
    from agentgym_ig.trainers.tinywiki import WARM_START, load_policy_model, tiny_policy, training_world
    from benchmarks.variants import chosen_recipe

    recipe, world = chosen_recipe(trial.recipe), training_world(trial.seed)
    asked = [question for hops in trial.hops for question in tinywiki_questions(world, f"hop{hops}", 600)]
    search = SearchVectorEnv(tinywiki_index(world), asked, trial.places, TINYWIKI_RULES)
    start = trial.start if trial.start == WARM_START else str(WARM_STARTS / trial.start)
    policy = tiny_policy(*load_policy_model(start))
    config = TrainConfig(
        steps=trial.steps,
        questions_per_step=trial.questions,
        group_size=trial.group,
        learning_rate=trial.rate,
        critic_learning_rate=1e-3,
        updates_per_step=trial.updates,
        epochs=trial.epochs,
        replay=trial.replay,
        micro_batch=96,
        evaluate_every=0,
        save_every=trial.steps,
        seed=trial.seed,
    )
    env = add_channel(search, SelfGuide()) if "self_guide" in recipe.needs else search
    return Run(policy, env, recipe, config, out)


def _evaluation(trial: Trial) -> Callable[[Any, int], dict[str, Any]]:
    """A function from a policy and a number of questions per set to figures, in the trial's world."""
    from agentgym_ig.envs import SearchVectorEnv, Start, rollout
    from agentgym_ig.envs.tinywiki import TINYWIKI_RULES, tinywiki_index, tinywiki_questions
    from agentgym_ig.tinywiki import World

    worlds = {"validation": World(trial.seed + 500, "validation"), "test": World(trial.seed + 1000, "test")}
    world = worlds[trial.role]
    sets = {f"hop{hops}": "id" for hops in trial.hops} | {f"compose{min(hops, 3)}": "ood" for hops in trial.hops}

    def evaluate(policy: Any, count: int) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        asked = {name: list(tinywiki_questions(world, name, count)) for name in sets}
        env = SearchVectorEnv(
            tinywiki_index(world), [own for each in asked.values() for own in each], 256, TINYWIKI_RULES
        )
        for domain in ("id", "ood"):
            names = [name for name, own in sets.items() if own == domain]
            starts = [
                Start(own.id, place, (count << 32) + place)
                for place, own in enumerate(question for name in names for question in asked[name])
            ]
            figures |= {f"{domain}_{name}": value for name, value in _figures(rollout(env, policy, starts)).items()}
        return figures

    return evaluate


def _figures(episodes: Sequence[Any]) -> dict[str, float]:
    """Shares of right answers and of found evidence, and lengths. Evidence is the passage with the answer."""
    from agentgym_ig.answers import score

    n = len(episodes)
    found = [own.question.supporting[-1] in {hit for turn in own.turns for hit in turn.retrieved} for own in episodes]
    return {
        "em": round(sum(score("em", own.answer, own.question.answers) for own in episodes) / n, 4),
        "f1": round(sum(score("f1", own.answer, own.question.answers) for own in episodes) / n, 4),
        "found": round(sum(found) / n, 4),
        "turns": round(sum(len(own.turns) for own in episodes) / n, 3),
    }


class Trials:
    """The results of all trials played so far, in one file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if not line.endswith("\n"):
                    break  # a crash cut it off: the trial is played again
                row = json.loads(line)
                self.rows[json.dumps(row["trial"], sort_keys=True)] = row

    def of(self, trial: Trial) -> dict[str, Any]:
        """A trial's result. Raises KeyError for one that was not played."""
        return self.rows[trial.key]

    def run(self, trials: Iterable[Trial], *, processes: int = 2) -> None:
        """Play the trials that are missing, in their order."""
        missing = [own for own in dict.fromkeys(trials) if own.key not in self.rows]
        if not missing:
            return
        columns = (TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        context = multiprocessing.get_context("spawn")
        with Progress(*columns) as shown, ProcessPoolExecutor(processes, mp_context=context) as pool:
            bar = shown.add_task("", total=len(missing))
            waiting = {pool.submit(play, own) for own in missing}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    if error := future.exception():
                        pool.shutdown(cancel_futures=True)
                        raise error
                    self._add(future.result())
                    shown.advance(bar)

    def _add(self, row: dict[str, Any]) -> None:
        row = {"commit": commit(), **row}
        self.rows[json.dumps(row["trial"], sort_keys=True)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as out:
            out.write(json.dumps(row) + "\n")


def seeds(trial: Trial, count: int) -> list[Trial]:
    """The trial with so many seeds, from its own on."""
    return [replace(trial, seed=trial.seed + number) for number in range(count)]
