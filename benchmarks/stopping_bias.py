"""Does a form of IGPO change how long an agent searches when further searches are neither good nor bad?

    python -m benchmarks.stopping_bias --out benchmarks/results/stopping_bias.json

The agent has up to six searches before it must answer. Before each it goes on or answers, by a logit of its own for
each search, which is all that is trained: plain policy gradient, on policy, through our clipped loss, over 32 questions
of 8 episodes a step. All searches but the first are neutral: they do not change the chance of success, and their
gain is noise, with mean 0 unless the world says otherwise. Worlds:

- neutral      the first search is neutral too; success has chance 0.4, and the belief starts there
- informs      the first search raises belief and chance of success from 0.1 to 0.4
- flatters     as `informs`, but each later search raises the belief by another 0.01, for nothing
- discourages  as `informs`, but each later search lowers it by 0.01
- doubts       as `neutral`, but the belief starts 0.2 too low (only the belief as a critic reads its level)

What a form does follows from its *gap*: the expected advantage of going on less that of answering, at the same turn.
With loss weights that are the same for all turns (`seq-mean-token-sum`, as IGPO's code has it) the expected gradient of
a logit is the gap times the chance to get there times pi (1 - pi): no gap, no drift. `measured_gap` samples it;
`limit_gap` is its closed form for large groups. With gamma 1:

- grpo      Lengths do not enter, and outcomes are exchangeable: no gap for neutral searches.
- separate  Going on adds the z of this gain and of all later ones. All z of a question sum to 0, and gains of one mean
            are exchangeable given the lengths: no gap while *all* searches are alike. As soon as the first one informs,
            the pool's mean is above 0, every later search has a negative z, and length collapses to one search. As the
            z sum to 0, gains on the whole do not pay for the first search either: its gap is the outcome's.
- scaled    `separate` times a positive number: the same.
- joint     The pool's mean is that of gains and outcomes. If outcomes are above 0 on average, every neutral gain has a
            negative z, and going on costs: length collapses even with neutral searches alone.
- by-turn   Each turn has its own mean, so every turn's expected z is 0: no gap whatever the gains' means, neither
            against later searches nor for an informative one; only differences between searches of one turn count.
- raw       Gain over spread, no mean taken off, no sum over turns: the gap is the turn's own mean gain. Neutral turns
            keep their number and the first is paid for. So is flattery, and discouragement is punished.
- none      The plain return: the gap is the sum of the mean gains to come. As `raw`, with all later turns' credit.
            Its advantages are not centred: if the loss divides by length (`seq-mean-token-mean`), a positive mean
            return is dearer on short episodes, and length collapses.
- gae       Errors decay with lambda towards the last turn's, outcome less belief. If the belief is right on average
            there is no gap in large groups. In small ones there is some, for the spread that errors are divided by
            depends on the same outcomes, most on those of long episodes: its sign is that of the outcome's skew, it
            is opposite for lambda 0.5 and 1, and 0 at even odds (or without the division). A belief that is too low
            makes answering now better than later, one that is too high makes it worse; with lambda 1 the error
            telescopes to the outcome less the belief at hand, and this is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from agentgym_ig.commands.console import console
from agentgym_ig.records import write_json
from agentgym_ig.trainers.advantages import (
    grpo_advantages,
    igpo_advantages,
    igpo_by_turn_advantages,
    igpo_gae_advantages,
    igpo_raw_advantages,
    igpo_returns,
    igpo_scaled_advantages,
)
from agentgym_ig.trainers.aggregation import token_weights
from agentgym_ig.trainers.losses import clipped_loss
from benchmarks.measure import timed, where

SEARCHES = 6
ROWS, GROUP = 256, 8
"""Episodes of one policy in one step, and of one question."""

START = 1.0
"""The logits before training: on with chance 0.73, 3.3 turns on average."""

NOISE = 0.03
"""Gains are uniform within ± this around their mean."""

RUNS, UPDATES, RATE = 12, 200, 0.2
EARLY = 50
"""Updates over which the slope is taken."""

MARGIN = 0.1
"""Neutral searches: a change is none if its interval lies within ± this, and one if it lies without."""

AS_RELEASED, BY_LENGTH = "seq-mean-token-sum", "seq-mean-token-mean"


@dataclass(frozen=True)
class Episodes:
    """gains, has_gain and beliefs (B, K), K = SEARCHES + 1; outcome, last and group (B,). ROWS for each policy."""

    gains: Tensor
    has_gain: Tensor
    beliefs: Tensor
    outcome: Tensor
    last: Tensor
    group: Tensor

    @property
    def turns(self) -> Tensor:
        return torch.arange(SEARCHES + 1) <= self.last[:, None]

    @property
    def rewards(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.gains, self.has_gain, self.outcome, self.last, self.group

    def by_policy(self) -> list[Episodes]:
        parts = zip(*(own.split(ROWS) for own in vars(self).values()), strict=True)
        return [Episodes(*part) for part in parts]


@dataclass(frozen=True)
class World:
    """Mean gain of the first search and of each later one; chance of success after the first; error of the belief."""

    first: float = 0.0
    later: float = 0.0
    success: float = 0.4
    error: float = 0.0

    @property
    def means(self) -> Tensor:
        return torch.tensor([self.first] + [self.later] * (SEARCHES - 1), dtype=torch.float64)

    def play(self, logits: Tensor, rng: torch.Generator, group: int = GROUP) -> Episodes:
        """ROWS episodes of each policy; logits (policies, SEARCHES)."""
        chances = logits.detach().sigmoid().repeat_interleave(ROWS, 0)
        luck, noise, coin = torch.rand(3, *chances.shape, generator=rng, dtype=torch.float64)
        searched = (luck < chances).cumprod(1).bool()
        gains = (self.means + NOISE * (2 * noise - 1)) * searched
        success = self.success - self.first * ~searched[:, 0]
        start = self.success - self.first + self.error
        return Episodes(
            gains=pad(gains, (0, 1)),
            has_gain=pad(searched, (0, 1)),
            beliefs=start + pad(gains.cumsum(1), (1, 0)),
            outcome=(coin[:, 0] < success).double(),
            last=searched.sum(1),
            group=torch.arange(len(chances)) // group,
        )


def _grpo(own: Episodes) -> Tensor:
    return grpo_advantages(own.outcome, own.group)[:, None] * own.turns


def _gae(own: Episodes, lam: float) -> Tensor:
    return igpo_gae_advantages(own.beliefs, own.outcome, own.last, own.group, lam=lam)


def _scaled(own: Episodes) -> Tensor:
    """One policy at a time: the factor of this form is a mean over the batch."""
    return torch.cat([igpo_scaled_advantages(*each.rewards) for each in own.by_policy()])


Form = Callable[[Episodes], Tensor]

GAE: dict[str, Form] = {"gae 0.5": partial(_gae, lam=0.5), "gae 1": partial(_gae, lam=1.0)}

FORMS: dict[str, Form] = {
    "grpo": _grpo,
    "separate": lambda own: igpo_advantages(*own.rewards),
    "joint": lambda own: igpo_advantages(*own.rewards, joint=True),
    "by-turn": lambda own: igpo_by_turn_advantages(*own.rewards),
    "scaled": _scaled,
    "raw": lambda own: igpo_raw_advantages(*own.rewards),
    "none": lambda own: igpo_returns(*own.rewards[:-1]),
    **GAE,
}

WORLDS = {
    "neutral": World(),
    "informs": World(first=0.3),
    "flatters": World(first=0.3, later=0.01),
    "discourages": World(first=0.3, later=-0.01),
    "doubts": World(error=-0.2),
}

ODDS = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Interval:
    """Mean over independent runs, and half the width of its 95 % confidence interval (Student's t)."""

    mean: Tensor
    half: Tensor

    def as_dict(self) -> dict[str, Any]:
        return {"mean": rounded(self.mean), "half": rounded(self.half)}


def interval(values: Tensor) -> Interval:
    """values (runs, ...)."""
    runs = len(values)
    return Interval(values.mean(0), values.std(0) / runs**0.5 * float(stats.t.ppf(0.975, runs - 1)))


def rounded(values: Tensor) -> Any:
    return values.round(decimals=4).tolist()


def start(policies: int) -> Tensor:
    return torch.full((policies, SEARCHES), START, dtype=torch.float64)


def measured_gap(form: Form, world: World, *, group: int = GROUP, policies: int = 20, rounds: int = 30) -> Interval:
    """Of the policy before training: for each search, the mean advantage of going on less that of answering."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(rounds):
        own = world.play(start(policies), rng, group)
        advantages = form(own)
        ways = [(advantages[own.last > turn, turn], advantages[own.last == turn, turn]) for turn in range(SEARCHES)]
        found.append(torch.stack([on.mean() - off.mean() for on, off in ways]))
    return interval(torch.stack(found))


def limit_gap(form: str, world: World) -> Tensor | None:
    """What `measured_gap` tends to in large groups, (SEARCHES); None for a form without a closed form here."""
    chance = start(1)[0].sigmoid()
    reached, means = chance.cumprod(0), world.means
    # Sums over an episode: how many there are, of the values, of their squares.
    gain = torch.stack([reached.sum(), reached @ means, reached @ (means.square() + NOISE**2 / 3)])
    solved = world.success - world.first * (1 - chance[0])
    outcome = torch.stack([torch.ones_like(solved), solved, solved])
    certainty = _moments(outcome)[1]
    centre, spread = _moments(gain + outcome if form == "joint" else gain)
    # (from, to): the chance that search `to` is made, once `from` is
    made = (reached / reached[:, None]).triu()
    paid = {
        "grpo": torch.zeros_like(means),
        "separate": made @ ((means - centre) / spread),
        "joint": made @ ((means - centre) / spread),
        "by-turn": torch.zeros_like(means),
        "raw": means / spread,
        "none": made @ means,
    }
    if form not in paid:
        return None
    solves = torch.zeros_like(means)
    solves[0] = world.first  # the first search alone changes the chance of success
    units = {"joint": spread, "none": torch.ones_like(spread)}
    return paid[form] + solves / units.get(form, certainty)


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation."""
    count, total, squares = sums
    mean = total / count
    return mean, (squares / count - mean.square()).sqrt()


def train(form: Form, world: World, mode: str = AS_RELEASED, runs: int = RUNS, updates: int = UPDATES) -> Tensor:
    """(runs, updates + 1, SEARCHES): the logits of independent runs."""
    rng = torch.Generator().manual_seed(1)
    logits = start(runs)
    path = [logits]
    for _ in range(updates):
        own = world.play(logits, rng)
        advantages = form(own)
        logits = logits.detach().requires_grad_()
        rows = logits.repeat_interleave(ROWS, 0)
        chosen = torch.where(own.has_gain[:, :SEARCHES], logsigmoid(rows), logsigmoid(-rows))
        logprobs = pad(chosen, (0, 1))  # after the last search it must answer: chance 1
        losses = clipped_loss(logprobs, logprobs.detach(), advantages, mask=own.turns)
        # Weights are over all runs together, but each run is a step of its own.
        (losses * token_weights(own.turns, mode)).sum().mul(runs).backward()
        assert logits.grad is not None
        logits = logits.detach() - RATE * logits.grad
        path.append(logits)
    return torch.stack(path, 1)


def mean_turns(logits: Tensor) -> Tensor:
    """(..., SEARCHES) to (...): the expected number of turns, the answer included."""
    return 1 + logits.sigmoid().cumprod(-1).sum(-1)


def neutral_searches(logits: Tensor) -> Tensor:
    """The expected number of searches after the first, once there is a first."""
    return logits[..., 1:].sigmoid().cumprod(-1).sum(-1)


def drift(path: Tensor) -> dict[str, Any]:
    """What training did to the length, over independent runs."""
    turns, extra = mean_turns(path), neutral_searches(path)
    steps = torch.arange(EARLY + 1, dtype=torch.float64)
    steps -= steps.mean()
    slopes = 100 * (turns[:, : EARLY + 1] * steps).sum(1) / steps.square().sum()
    change = interval(extra[:, -1] - extra[:, 0])
    mean, half = float(change.mean), float(change.half)
    if abs(mean) + half < MARGIN:
        verdict = "kept"
    else:
        verdict = "unclear" if abs(mean) - half < MARGIN else "longer" if mean > 0 else "shorter"
    return {
        "turns_start": rounded(turns[0, 0]),
        "turns_end": interval(turns[:, -1]).as_dict(),
        "turns_per_100_updates_early": interval(slopes).as_dict(),
        "neutral_searches_start": rounded(extra[0, 0]),
        "neutral_searches_change": change.as_dict(),
        "verdict": verdict,
    }


Curves = Mapping[str, Mapping[str, Tensor]]


def measure() -> tuple[dict[str, Any], Curves]:
    """The figures, and for each world and form the mean turns (runs, updates + 1)."""
    table: dict[str, dict[str, Any]] = {}
    curves: dict[str, dict[str, Tensor]] = {}
    for name, world in WORLDS.items():
        table[name], curves[name] = {}, {}
        for form, advantages in (GAE if world.error else FORMS).items():
            path = train(advantages, world)
            curves[name][form] = mean_turns(path)
            limit = limit_gap(form, world)
            gaps = {"gap": measured_gap(advantages, world).as_dict()}
            gaps |= {} if limit is None else {"gap_in_large_groups": rounded(limit)}
            table[name][form] = drift(path) | gaps
        console.print(name, {form: (own["turns_end"]["mean"], own["verdict"]) for form, own in table[name].items()})
    divided = {form: drift(train(own, WORLDS["neutral"], BY_LENGTH)) for form, own in FORMS.items()}
    odds = {
        form: {str(chance): measured_gap(own, World(success=chance)).as_dict() for chance in ODDS}
        for form, own in GAE.items()
    }
    return {"worlds": table, f"neutral_with_{BY_LENGTH}": divided, "gap_by_chance_of_success": odds}, curves


COLOURS = ("#222222", "#2171b5", "#c4572b", "#4f7a28", "#6baed6", "#d99a00", "#8a5fb0", "#d6619c", "#f0a8cb")
STYLES = ("-", "-", "-", "--", "--", "-", ":", "-", "--")


def draw(path: Path, curves: Curves) -> None:
    """Mean turns over the updates, a panel for each world."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    panels: Sequence[Any] = list(figure.subplots(2, 3, sharey=True).flat)
    for axes, (name, own) in zip(panels, curves.items(), strict=False):
        logits = start(1)[0]
        unmoved = 2 + neutral_searches(logits) if WORLDS[name].first else mean_turns(logits)
        axes.axhline(float(unmoved), color="0.8", linewidth=6, zorder=0)
        for number, form in enumerate(FORMS):
            if form in own:
                band = interval(own[form])
                steps = range(len(band.mean))
                axes.plot(steps, band.mean, STYLES[number], color=COLOURS[number], linewidth=1.8, label=form)
                low, high = band.mean - band.half, band.mean + band.half
                axes.fill_between(steps, low, high, color=COLOURS[number], alpha=0.15, linewidth=0)
        axes.set(title=name, xlabel="updates", ylabel="mean turns", ylim=(0.9, 6.1))
        axes.grid(alpha=0.3)
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="upper left", frameon=False)
    grey = "grey: neutral searches as at the start,\nand the first, if it informs, always made"
    panels[-1].text(0.03, 0.1, grey, transform=panels[-1].transAxes, color="0.4")
    figure.savefig(path, dpi=110)


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures here, and the picture next to them.")] = None,
) -> None:
    """Train all forms in all worlds and print what became of the length. A minute and a half of one core."""
    torch.set_num_threads(1)
    (table, curves), seconds = timed(measure)
    figures = where() | {
        "benchmark_seconds": round(seconds, 1),
        "settings": {"runs": RUNS, "updates": UPDATES, "episodes": ROWS, "group": GROUP, "rate": RATE, "noise": NOISE},
    }
    figures |= {"aggregation": AS_RELEASED, "notes": __doc__.split("\n\n", 2)[2].splitlines()} | table
    if out is None:
        console.print_json(data=figures)
    else:
        write_json(out, figures)
        draw(out.with_suffix(".png"), curves)


if __name__ == "__main__":
    typer.run(main)
