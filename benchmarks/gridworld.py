"""Bias and variance of what each policy loss makes of stale samples, by exact expectation in a world of 2 x 2 cells.

    python -m benchmarks.gridworld --out benchmarks/results/gridworld.json

The GIPO paper (arXiv 2603.03955) argues with such a world, whose constants we could not read; this one is ours. States
are (0,0), (0,1) and (1,0), the goal (1,1) pays 1 and ends the episode; up, down, left and right move or, at a wall,
stay; the discount is 0.9. Samples come from the uniform policy. The learner's logits are `beta` on the actions that
lead to the goal and 0 on the others, so beta is how stale the samples are: 0 is on policy.

One sample is a state, each as likely, and an action of the uniform policy. Its estimate of the gradient by the logits
is factor x advantage x grad log pi, with the learner's exact advantages and the factor that the loss itself has
(`gradient_factors`, so the code that trains is what is measured). With 12 samples that can be drawn, all expectations
are sums. For each loss and beta:

- bias        norm of the mean estimate less the true gradient (that with actions of the learner)
- variance    of one sample's estimate, summed over the logits
- cosine      between the mean estimate and the true gradient; null if the estimate is 0
- cut         share of the samples without any gradient
- break_even  number of samples up to which bias^2 + variance / samples is below that of plain importance sampling

A picture of the same over many beta goes next to the figures, as .png.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from agentgym_ig.commands.console import console
from agentgym_ig.records import write_json
from agentgym_ig.trainers.loss_statistics import gradient_factors
from agentgym_ig.trainers.losses import PolicyLoss, clipped_loss, gipo_loss, sapo_loss
from benchmarks.measure import where

GOAL = 3
"""States are numbered by rows; the goal is the last one."""

AHEAD = torch.tensor([[0, 2, 0, 1], [1, GOAL, 0, 1], [0, 2, 2, GOAL]])
"""The state that up, down, left and right lead to from each state."""

GOALWARD = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)

DISCOUNT = 0.9

STALENESS = (0.5, 1.0, 2.0)

PLAIN = "importance sampling"

LOSSES: dict[str, PolicyLoss] = {
    PLAIN: partial(gipo_loss, sigma=math.inf),
    "PPO clip 0.2": clipped_loss,
    "SAPO 1, 2": partial(sapo_loss, tau_negative=2.0),
    **{f"GIPO {sigma:g}": partial(gipo_loss, sigma=sigma) for sigma in (0.2, 0.5, 1.0, 2.0)},
    "GIPO 1 laplace": partial(gipo_loss, sigma=1.0, kernel="laplace"),
    "GIPO 1 cauchy": partial(gipo_loss, sigma=1.0, kernel="cauchy"),
}


@dataclass(frozen=True)
class Learner:
    """Of its own policy, exactly: (states, actions) log-probabilities and advantages, (states) values."""

    logprobs: Tensor
    advantages: Tensor
    values: Tensor

    @property
    def scores(self) -> Tensor:
        """(states, actions, logits of that state): the gradient of log pi; other states' logits have none."""
        return torch.eye(4, dtype=torch.float64) - self.logprobs.exp()[:, None, :]

    def mean(self, estimates: Tensor, chances: Tensor) -> Tensor:
        """(states, logits): the expected gradient. chances (states, actions) of each action in its state."""
        return (chances[..., None] * estimates).sum(1) / len(estimates)


def learner(beta: float) -> Learner:
    logprobs = (beta * GOALWARD).log_softmax(1)
    reward = (AHEAD == GOAL).double()
    moves = torch.nn.functional.one_hot(AHEAD, 4).double()[..., :GOAL]  # the goal is worth nothing once reached
    own = (logprobs.exp()[..., None] * moves).sum(1)
    values = torch.linalg.solve(torch.eye(GOAL, dtype=torch.float64) - DISCOUNT * own, (logprobs.exp() * reward).sum(1))
    return Learner(logprobs, reward + DISCOUNT * moves @ values - values[:, None], values)


def study(beta: float, losses: dict[str, PolicyLoss] | None = None) -> dict[str, Any]:
    """The figures of each loss at one staleness."""
    own = learner(beta)
    uniform = torch.full_like(own.logprobs, 0.25)
    truth = own.mean(own.advantages[..., None] * own.scores, own.logprobs.exp())
    found: dict[str, dict[str, float | None]] = {}
    for name, loss in (losses or LOSSES).items():
        factors = gradient_factors(loss, own.logprobs, uniform.log(), own.advantages)
        estimates = (factors * own.advantages)[..., None] * own.scores
        mean = own.mean(estimates, uniform)
        length = float(mean.norm())
        found[name] = {
            "bias": float((mean - truth).norm()),
            "variance": float(estimates.square().sum(2).mean() - mean.square().sum()),
            "cosine": float((mean * truth).sum() / (length * truth.norm())) if length else None,
            "cut": float((factors == 0).double().mean()),
        }
    plain = found.get(PLAIN)
    for figures in found.values():
        figures["break_even"] = _break_even(figures, plain)
    return {"beta": beta, "gradient": float(truth.norm()), "losses": found}


def _break_even(figures: dict[str, Any], plain: dict[str, Any] | None) -> float | None:
    if plain is None or figures["bias"] < 1e-12:
        return None
    return float((plain["variance"] - figures["variance"]) / figures["bias"] ** 2)


PANELS = {
    "bias": "norm of the bias",
    "variance": "variance of one sample's estimate",
    "cosine": "cosine to the true gradient",
    "cut": "share of samples without gradient",
}


def draw(path: Path, betas: Sequence[float]) -> None:
    """The four figures over the staleness."""
    studies = [study(beta) for beta in betas]
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for number, name in enumerate(LOSSES):
            curve = [own["losses"][name][key] for own in studies]
            values = [math.nan if value is None else value for value in curve]
            style = "--" if number < 3 else ":" if name.endswith(("laplace", "cauchy")) else "-"
            axes.plot(betas, values, style, color=COLOURS[number], linewidth=2, label=name)
        if key == "bias":
            axes.plot(
                betas, [own["gradient"] for own in studies], color="0.7", linewidth=5, zorder=0, label="no gradient"
            )
        axes.set(title=title, xlabel="staleness beta", xlim=(betas[0], betas[-1]))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)


COLOURS = ("#222222", "#c4572b", "#8a5fb0", "#9ecae1", "#6baed6", "#2171b5", "#08306b", "#4f7a28", "#a0b62f")


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures here, and the picture next to them.")] = None,
) -> None:
    """Print the figures of all losses."""
    torch.set_num_threads(1)
    figures = where() | {"cases": [study(beta) for beta in STALENESS]}
    console.print_json(data=figures)
    if out is not None:
        write_json(out, figures)
        draw(out.with_suffix(".png"), [step / 100 for step in range(301)])


if __name__ == "__main__":
    typer.run(main)
