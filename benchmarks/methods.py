"""Methods on the tiny world: which learns how fast, and how far. See `benchmarks/learning.py` for what a run is.

    python -m benchmarks.methods table       each recipe at its own best rate, five seeds
    python -m benchmarks.methods staleness   PPO's clip and GIPO with 1, 4 and 16 updates per batch
    python -m benchmarks.warm_starts         the policies that the next two begin with
    python -m benchmarks.methods sparse      GRPO and IGPO where success is rare and evidence far
    python -m benchmarks.methods map         the same with 2 hops and with 8 % success, one seed a cell
    python -m benchmarks.methods guide       Self-Guide, and GRPO beside it
    python -m benchmarks.methods report      methods.json and the plots, from what has been played

All that is played goes to one file, and what is in it is not played again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.learning import Trial, Trials, seeds
from benchmarks.measure import where
from benchmarks.methods_plots import plot_curves, plot_map, plot_sparse, plot_staleness
from benchmarks.sparse import cell, corner
from benchmarks.statistics import mean_and_interval, rollouts_to

RATES = (1.5e-4, 3e-4, 6e-4)
"""Of these, each recipe's best; a quarter of them where a step goes through its batch four times."""
RECIPES = (
    "grpo", "drgrpo", "dapo", "gspo", "rloo", "reinforce++", "ppo", "gigpo", "graphgpo", "igpo", "igpo:prob",
    "igpo-gae", "gipo", "igpo+gipo",
)  # fmt: skip
LEVELS = (0.2, 0.3, 0.5, 0.7)
VALIDATION_SEED, TEST_SEED, SEEDS = 100, 200, 5
STALENESS = {1: {"updates": 1, "epochs": 1}, 4: {"updates": 4, "epochs": 1}, 16: {"updates": 4, "epochs": 4}}
"""Updates per batch → how they are made: the batch cut into so many parts, gone through so many times."""
MAP = tuple(
    {"start": f"h{hops}-s{success}", "hops": (hops,), "group": group, "questions": 96 // group}
    for hops in (2, 3, 4)
    for success in ("0.5", "2", "8")
    for group in (4, 8, 16)
)
SPARSE = tuple(own for own in MAP if own["hops"] != (2,) and not str(own["start"]).endswith("-s8"))
"""The sparse corner, fixed beforehand: at most 2 % success at the start and at least 3 hops."""
SPARSE_RECIPES, SPARSE_SEEDS = ("grpo", "igpo"), 2
GUIDED = {**SPARSE[4], "start": "h3-guided"}
"""Self-Guide needs a policy that assesses itself. GRPO is played from it too, and from one that was never shown how."""

app = typer.Typer(no_args_is_help=True, help=__doc__)
RESULTS = Path("benchmarks/results")
Store = Annotated[Path, typer.Option(help="The file that keeps all trials.")]
STORE = RESULTS / "methods.jsonl"
Processes = Annotated[int, typer.Option(help="Trials side by side.")]


def learnt(trials: Trials, trial: Trial) -> float:
    """How good a rate is: the mean of in-domain exact match over a run's curve, which rewards both pace and end."""
    return _pace(trials.of(trial))


def choose_rates(trials: Trials, bases: Sequence[Trial], processes: int) -> dict[Trial, float]:
    """The best rate for each trial of a validation world: three with one seed, then the better two with another."""
    trials.run((replace(own, rate=rate) for own in bases for rate in rates_of(own)), processes=processes)
    trials.run(
        (each for own in bases for rate in _better(trials, own) for each in _pair(own, rate)), processes=processes
    )
    return {own: chosen_rate(trials, own) for own in bases}


def chosen_rate(trials: Trials, base: Trial) -> float:
    """The rate that `choose_rates` has found."""
    return max(_better(trials, base), key=lambda rate: fmean(learnt(trials, own) for own in _pair(base, rate)))


def rates_of(base: Trial) -> tuple[float, ...]:
    """The rates to choose from."""
    return tuple(rate / base.epochs for rate in RATES)


def _better(trials: Trials, base: Trial) -> list[float]:
    return sorted(rates_of(base), key=lambda rate: -learnt(trials, replace(base, rate=rate)))[:2]


def _pair(base: Trial, rate: float) -> list[Trial]:
    return seeds(replace(base, rate=rate), 2)


def _validated(recipe: str, **settings: Any) -> Trial:
    return Trial(recipe=recipe, rate=RATES[0], seed=VALIDATION_SEED, role="validation", **settings)


def _tested(base: Trial, rate: float, count: int = SEEDS) -> list[Trial]:
    return seeds(replace(base, role="test", seed=TEST_SEED, rate=rate), count)


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
    _play_cells(Trials(store), SPARSE, SPARSE_SEEDS, processes)


@app.command("map")
def rest_of_map(store: Store = STORE, processes: Processes = 2) -> None:
    """The rest of the map around the sparse corner, at the rates of its middle."""
    _play_cells(Trials(store), [own for own in MAP if own not in SPARSE], 1, processes)


def _play_cells(trials: Trials, cells: Sequence[dict[str, Any]], count: int, processes: int) -> None:
    bases = [_validated(name, **SPARSE[4]) for name in SPARSE_RECIPES]
    rates = choose_rates(trials, bases, processes)
    chosen = [(replace(base, **own), rates[base]) for own in cells for base in bases]
    trials.run((each for base, rate in chosen for each in _tested(base, rate, count)), processes=processes)


@app.command()
def guide(store: Store = STORE, processes: Processes = 2) -> None:
    """Self-Guide and GRPO from a policy that opens its actions with a verdict, and GRPO from one that does not."""
    _play(Trials(store), _guided_bases(), processes)


def _guided_bases() -> list[Trial]:
    return [_validated("grpo", **SPARSE[4]), _validated("grpo", **GUIDED), _validated("self-guide", **GUIDED)]


@app.command()
def report(store: Store = STORE, out: Path = RESULTS) -> None:
    """Make methods.json and the plots from what has been played; what is not complete is listed by name."""
    trials = Trials(store)
    asked = {"table": [_validated(name) for name in RECIPES], "staleness": _stale_bases(), "guide": _guided_bases()}
    done = {section: {own: rows for own in bases if (rows := _rows(trials, own))} for section, bases in asked.items()}
    cells, everywhere = _cells(trials, SPARSE, SPARSE_SEEDS), _cells(trials, MAP, 1)
    result = where() | {
        "trials": str(store),
        "commits": sorted({row["commit"] for rows in done.values() for each in rows.values() for row in each}),
        "seeds": SEEDS,
        "rates": RATES,
        "incomplete": {name: [_label(own) for own in bases if own not in done[name]] for name, bases in asked.items()},
    }
    for section, found in done.items():
        result[section] = {_label(own): summary(own, rows, _beside(found, own)) for own, rows in found.items()}
    if cells:
        result["sparse"] = {"seeds": SPARSE_SEEDS, "cells": cells, **corner(cells)}
        result["igpo_rollouts_ratio_sparse"] = result["sparse"]["igpo_rollouts_ratio_sparse"][0]
        plot_sparse(cells, out)
    if len(everywhere) == len(MAP):
        result["map"] = {"seeds": 1, "cells": everywhere}
        plot_map(everywhere, out)
    (out / "methods.json").write_text(json.dumps(result, indent=1) + "\n")
    if done["table"]:
        plot_curves({own.recipe: [row["curve"] for row in rows] for own, rows in done["table"].items()}, out)
    if stale := {(own.recipe, own.updates * own.epochs): rows for own, rows in done["staleness"].items()}:
        plot_staleness(stale, out)
    for section in asked:
        for name, own in result[section].items():
            reached = own["rollouts_to"]["0.5"]
            print(f"{name:28} rate {own['rate']:g}  ID {own['id_em']}  OOD {own['ood_em']}  to .5 {reached}")
    for name, each in cells.items():
        print(f"{name:28} ratio {each['ratio']}  ID over GRPO {each['id_em_over_grpo']}")


def _cells(trials: Trials, chosen: Sequence[dict[str, Any]], count: int) -> dict[str, dict[str, Any]]:
    """Those of the chosen cells that have been played by both recipes with so many seeds."""
    found = {}
    for own in chosen:
        bases = [replace(_validated(name, **SPARSE[4]), **own) for name in SPARSE_RECIPES]
        rows = [_rows(trials, base, count) for base in bases]
        if rows[0] and rows[1]:
            found[f"{own['start']}, groups of {own['group']}"] = cell(rows[0], rows[1])
    return found


def _label(base: Trial) -> str:
    stale = f", {base.updates} x {base.epochs} updates" if (base.updates, base.epochs) != (4, 1) else ""
    return base.recipe + stale + (f", {base.start}, groups of {base.group}" if base.start != "tinywiki" else "")


def _beside(found: Mapping[Trial, Any], base: Trial) -> list[dict[str, Any]] | None:
    """GRPO's rows under the same conditions."""
    return found.get(replace(base, recipe="grpo")) if base.recipe != "grpo" else None


def _rows(trials: Trials, base: Trial, count: int = SEEDS) -> list[dict[str, Any]] | None:
    """The tested runs at the rate that was chosen; None where any of it is still to be played."""
    rated = replace(base, **SPARSE[4]) if base.start not in ("tinywiki", GUIDED["start"]) else base  # type: ignore[arg-type]
    try:
        return [trials.of(own) for own in _tested(base, chosen_rate(trials, rated), count)]
    except KeyError:
        return None


def summary(base: Trial, rows: Sequence[dict[str, Any]], grpo: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Mean and half-width of the 95 % confidence interval over the seeds, and of differences to GRPO's, seed by seed.

    rollouts_to: None unless all seeds reached the level; never_reached: how many did not.
    """
    names = ("id_em", "ood_em", "id_f1", "ood_f1", "id_found", "id_turns", "ood_turns")
    reached = {level: [rollouts_to(row["curve"], level) for row in rows] for level in LEVELS}
    figures: dict[str, Any] = {
        "rate": rows[0]["trial"]["rate"],
        "rate_at_edge": rows[0]["trial"]["rate"] in (min(rates_of(base)), max(rates_of(base))),
        **{name: mean_and_interval([row["final"][name] for row in rows]) for name in names},
        "mean_id_em_of_curve": mean_and_interval([_pace(row) for row in rows]),
        "rollouts_to": {str(level): mean_and_interval(found) for level, found in reached.items()},
        "never_reached": {str(level): found.count(None) for level, found in reached.items()},
        "rollouts": mean_and_interval([row["curve"][-1]["rollouts"] for row in rows]),
        "no_signal": mean_and_interval([row["no_signal"] for row in rows]),
        "cut": mean_and_interval([row["cut"] for row in rows]),
        "seconds": mean_and_interval([row["seconds"] for row in rows]),
    }
    if grpo is not None:
        for name in ("id_em", "ood_em"):
            pairs = zip(rows, grpo, strict=True)
            figures[f"{name}_over_grpo"] = mean_and_interval([a["final"][name] - b["final"][name] for a, b in pairs])
    return figures


def _pace(row: dict[str, Any]) -> float:
    return fmean(point["id_em"] for point in row["curve"][1:])


if __name__ == "__main__":
    app()
