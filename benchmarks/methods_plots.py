"""The plots of the benchmark of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.statistics import mean_and_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"id_em": "#1f6feb", "ood_em": "#d9730d"}
NAMES = {"id_em": "in-domain", "ood_em": "out-of-domain"}


def plot_curves(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], out: Path) -> None:
    """A small plot for each recipe: exact match over rollouts, mean and 95 % interval, with GRPO's mean behind it."""
    columns = 3 if len(curves) <= 6 else 5
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.3 * rows), sharex=True, sharey=True)
    flat = list(np.atleast_1d(axes).flat)
    for axis, (name, runs) in zip(flat, curves.items(), strict=False):
        for metric, colour in COLOURS.items():
            if "grpo" in curves and name != "grpo":
                grid, mean, _ = _band(curves["grpo"], metric)
                axis.plot(grid, 100 * mean, color="#999999", lw=1, ls="-" if metric == "id_em" else ":")
            grid, mean, half = _band(runs, metric)
            axis.plot(grid, 100 * mean, color=colour, lw=1.8, label=NAMES[metric])
            axis.fill_between(grid, 100 * (mean - half), 100 * (mean + half), color=colour, alpha=0.18, lw=0)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
        axis.set_ylim(0, 100)
        axis.tick_params(labelbottom=True)
    for axis in flat[len(curves) :]:
        axis.axis("off")
    flat[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.supxlabel("training episodes", fontsize=10)
    figure.supylabel("exact match on unseen entities, %", fontsize=10)
    figure.suptitle("TinyWiki: mean of five seeds and 95 % interval; GRPO in grey", fontsize=11)
    figure.tight_layout()
    figure.savefig(out / "methods.png", dpi=130)
    plt.close(figure)


def _band(
    runs: Sequence[Sequence[Mapping[str, Any]]], metric: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean and half-width of the interval on one grid of rollouts, as far as all runs go."""
    end = min(run[-1]["rollouts"] for run in runs)
    grid = np.linspace(0, end, 25)
    values = [np.interp(grid, [p["rollouts"] for p in run], [p[metric] for p in run]) for run in runs]
    means, halves = zip(
        *(mean_and_interval(list(point)) or (0.0, 0.0) for point in zip(*values, strict=True)), strict=True
    )
    return grid, np.array(means), np.array(halves)


def plot_staleness(found: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]], out: Path) -> None:
    """Final in-domain exact match over updates per batch, for PPO's clip and GIPO."""
    finals = {key: [row["final"]["id_em"] for row in rows] for key, rows in found.items()}
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    for name, colour, label in (("grpo", "#666666", "PPO's clip"), ("gipo", "#1f6feb", "GIPO")):
        points = sorted(
            (updates, mean_and_interval(list(own))) for (who, updates), own in finals.items() if who == name
        )
        axis.errorbar(
            [updates for updates, _ in points],
            [100 * (own[0] or 0.0) for _, own in points if own],
            yerr=[100 * (own[1] or 0.0) for _, own in points if own],
            marker="o",
            capsize=3,
            color=colour,
            label=label,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 4, 16], ["1", "4", "16"])
    axis.set_xlabel("updates per batch")
    axis.set_ylabel("final in-domain EM, %")
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(out / "methods_staleness.png", dpi=130)
    plt.close(figure)


def plot_sparse(cells: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """One line per cell: IGPO's episodes over GRPO's to half of the final exact match, of each seed and their geometric
    mean, and the final exact matches of both.
    """
    names = list(cells)[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 0.34 * len(names) + 1.4), sharey=True)
    for place, name in enumerate(names):
        own = cells[name]
        seeds = [math.exp(value) for value in own["log_ratios"]]
        left.plot(seeds, [place] * len(seeds), "-o", color="#1f6feb", ms=3, lw=1, alpha=0.6)
        left.plot(own["ratio"][0], place, "o", color="#1f6feb", ms=6)
        for who, colour in (("grpo", "#666666"), ("igpo", "#1f6feb")):
            right.plot(100 * own[f"{who}_id_em"][0], place, "o", color=colour, ms=5, label=who if not place else None)
            right.plot(100 * own[f"{who}_ood_em"][0], place, "o", color=colour, ms=5, mfc="white")
    left.axvline(1, color="#999999", lw=1)
    left.axvline(0.67, color="#999999", lw=1, ls=":")
    left.set_xscale("log", base=2)
    left.set_xticks([0.125, 0.25, 0.5, 1, 2], ["1/8", "1/4", "1/2", "1", "2"])
    left.set_xlabel("IGPO's episodes over GRPO's,\nto half of the final EM")
    left.set_yticks(range(len(names)), names)
    right.set_xlabel("final EM, %\nfilled: in-domain, hollow: out-of-domain")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(out / "methods_sparse.png", dpi=130)
    plt.close(figure)


def plot_map(cells: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """A table for each success at the start, hops by group size: the ratio, and the final exact match of both."""
    starts, hops, groups = ("0.5", "2", "8"), (2, 3, 4), (4, 8, 16)
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 3.6), sharey=True, layout="constrained")
    for axis, success in zip(axes, starts, strict=True):
        table = [[cells[f"h{h}-s{success}, groups of {g}"] for g in groups] for h in hops]
        logs = [[math.log2(own["ratio"][0]) for own in row] for row in table]
        image = axis.imshow(logs, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
        for y, row in enumerate(table):
            for x, own in enumerate(row):
                ends = [round(100 * own[f"{who}_id_em"][0]) for who in ("grpo", "igpo")]
                text = f"{own['ratio'][0]:.2f}\n{ends[0]} → {ends[1]} %"
                dark = abs(math.log2(own["ratio"][0])) > 1.8
                axis.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if dark else "#111111")
        axis.set_xticks(range(3), groups)
        axis.set_xlabel("group size")
        axis.set_title(f"{success} % success at the start", fontsize=10)
    axes[0].set_yticks(range(3), [f"{own} hops" for own in hops])
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], shrink=0.8)
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("IGPO's episodes over GRPO's")
    figure.savefig(out / "methods_map.png", dpi=130)
    plt.close(figure)
