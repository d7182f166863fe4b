"""Every method on the tiny world: which learns how fast, and how far. See `benchmarks/learning.py` for what a run is.

    python -m benchmarks.methods table       every recipe at its own best rate, five seeds
    python -m benchmarks.methods staleness   PPO's clip and GIPO with 1, 4 and 16 updates per batch
    python -m benchmarks.methods sparse      GRPO and IGPO's forms where success is rare and evidence far
    python -m benchmarks.methods report      methods.json and the plots, from what has been played

All that is played goes to one file, and what is in it is not played again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.learning import Trial, Trials, seeds
from benchmarks.measure import where
from benchmarks.methods_plots import plot_curves, plot_staleness
from benchmarks.statistics import mean_and_interval, rollouts_to

RATES = (1.5e-4, 3e-4, 6e-4)
RECIPES = (
    "grpo", "drgrpo", "dapo", "gspo", "rloo", "reinforce++", "ppo", "gigpo", "graphgpo", "igpo", "igpo:prob",
    "igpo-gae", "gipo", "igpo+gipo",
)  # fmt: skip
LEVELS = (0.2, 0.3, 0.5, 0.7)
VALIDATION_SEED, TEST_SEED, SEEDS = 100, 0, 5
STALENESS = {1: {"updates": 1, "epochs": 1}, 4: {"updates": 4, "epochs": 1}, 16: {"updates": 4, "epochs": 4}}
"""Updates per batch → how they are made: the batch cut into so many parts, gone through so many times."""
SPARSE = tuple(
    {"start": f"h{hops}-s{success}", "hops": (hops,), "group": group, "questions": 96 // group}
    for hops in (3, 4)
    for success in ("0.5", "2")
    for group in (4, 8, 16)
)
"""The sparse corner, fixed beforehand: at most 2 % success at the start and at least 3 hops."""
SPARSE_RECIPES = ("grpo", "igpo", "igpo-gae")

app = typer.Typer(no_args_is_help=True, help=__doc__)
RESULTS = Path("benchmarks/results")
Store = Annotated[Path, typer.Option(help="The file that keeps all trials.")]
STORE = RESULTS / "methods.jsonl"
Processes = Annotated[int, typer.Option(help="Trials side by side.")]


def learnt(trials: Trials, trial: Trial) -> float:
    """How good a rate is: the mean of in-domain exact match over a run's curve, which rewards both pace and end."""
    return fmean(point["id_em"] for point in trials.of(trial)["curve"][1:])


def choose_rates(trials: Trials, bases: Sequence[Trial], processes: int) -> dict[Trial, float]:
    """The best rate for each trial of a validation world: three with one seed, then the better two with another."""
    trials.run((replace(own, rate=rate) for own in bases for rate in RATES), processes=processes)
    trials.run(
        (each for own in bases for rate in _better(trials, own) for each in _pair(own, rate)), processes=processes
    )
    return {own: chosen_rate(trials, own) for own in bases}


def chosen_rate(trials: Trials, base: Trial) -> float:
    """The rate that `choose_rates` has found."""
    return max(_better(trials, base), key=lambda rate: fmean(learnt(trials, own) for own in _pair(base, rate)))


def _better(trials: Trials, base: Trial) -> list[float]:
    return sorted(RATES, key=lambda rate: -learnt(trials, replace(base, rate=rate)))[:2]


def _pair(base: Trial, rate: float) -> list[Trial]:
    return seeds(replace(base, rate=rate), 2)


def _validated(recipe: str, **settings: Any) -> Trial:
    return Trial(recipe=recipe, rate=RATES[0], seed=VALIDATION_SEED, role="validation", **settings)


def _tested(base: Trial, rate: float) -> list[Trial]:
    return seeds(replace(base, role="test", seed=TEST_SEED, rate=rate), SEEDS)


def _play(trials: Trials, bases: Sequence[Trial], processes: int) -> None:
    rates = choose_rates(trials, bases, processes)
    trials.run((each for base, rate in rates.items() for each in _tested(base, rate)), processes=processes)


@app.command()
def table(
    recipes: Annotated[list[str] | None, typer.Argument(help="All of them by default.")] = None,
    store: Store = STORE,
    processes: Processes = 2,
) -> None:
    """Choose each recipe's rate in validation worlds, then train it with five seeds."""
    _play(Trials(store), [_validated(name) for name in recipes or RECIPES], processes)


@app.command()
def staleness(store: Store = STORE, processes: Processes = 2) -> None:
    """The same for PPO's clip and for GIPO, with more and more updates on each batch."""
    _play(Trials(store), _stale_bases(), processes)


def _stale_bases() -> list[Trial]:
    return [_validated(name, **own) for own in STALENESS.values() for name in ("grpo", "gipo")]


@app.command()
def sparse(store: Store = STORE, processes: Processes = 2) -> None:
    """The sparse corner; each recipe's rate is chosen in its middle, 3 hops with 2 % success in groups of 8."""
    trials = Trials(store)
    bases = [_validated(name, **SPARSE[4]) for name in SPARSE_RECIPES]
    rates = choose_rates(trials, bases, processes)
    cells = [(base, cell) for cell in SPARSE for base in bases]
    trials.run(
        (each for base, cell in cells for each in _tested(replace(base, **cell), rates[base])),  # type: ignore[arg-type]
        processes=processes,
    )


@app.command()
def report(store: Store = STORE, out: Path = RESULTS) -> None:
    """Make methods.json and the plots from what has been played."""
    trials = Trials(store)
    result: dict[str, Any] = where() | {"trials": str(store), "seeds": SEEDS, "rates": RATES}
    result["table"] = {
        base.recipe: summary(trials, base) for base in map(_validated, RECIPES) if _complete(trials, base)
    }
    result["staleness"] = {
        f"{base.recipe}, {base.updates * base.epochs} updates": summary(trials, base)
        for base in _stale_bases()
        if _complete(trials, base)
    }
    (out / "methods.json").write_text(json.dumps(result, indent=1) + "\n")
    curves = {name: [row["curve"] for row in _rows(trials, _validated(name))] for name in result["table"]}
    plot_curves(curves, out / "methods.png")
    if result["staleness"]:
        stale = {(own.recipe, own.updates * own.epochs): _rows(trials, own) for own in _stale_bases()}
        plot_staleness({key: [row["final"]["id_em"] for row in rows] for key, rows in stale.items()}, out)
    for name, own in result["table"].items():
        reached = own["rollouts_to"]["0.5"]
        print(f"{name:12} rate {own['rate']:g}  ID {own['id_em']}  OOD {own['ood_em']}  to .5: {reached}")


def _complete(trials: Trials, base: Trial) -> bool:
    try:
        return len(_rows(trials, base)) == SEEDS
    except KeyError:
        return False


def _rows(trials: Trials, base: Trial) -> list[dict[str, Any]]:
    return [trials.of(own) for own in _tested(base, chosen_rate(trials, base))]


def summary(trials: Trials, base: Trial) -> dict[str, Any]:
    """Figures of a recipe at its rate: mean and half-width of the 95 % confidence interval over the seeds."""
    rows = _rows(trials, base)
    names = ("id_em", "ood_em", "id_f1", "ood_f1", "id_found", "id_turns", "ood_turns")
    reached = {level: [rollouts_to(row["curve"], level) for row in rows] for level in LEVELS}
    return {
        "rate": chosen_rate(trials, base),
        **{name: mean_and_interval([row["final"][name] for row in rows]) for name in names},
        "rollouts_to": {
            str(level): mean_and_interval([own for own in found if own is not None]) for level, found in reached.items()
        },
        "never_reached": {str(level): found.count(None) for level, found in reached.items()},
        "no_signal": mean_and_interval([row["no_signal"] for row in rows]),
        "curve_id_em": [round(fmean(points), 4) for points in zip(*_em(rows), strict=False)],
    }


def _em(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    return [[point["id_em"] for point in row["curve"]] for row in rows]


if __name__ == "__main__":
    app()
