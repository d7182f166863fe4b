"""The grid world against its golden table and a plain loop; the signs of the stopping bias, and its closed form."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import gridworld, sparse, stopping_bias
from benchmarks.stopping_bias import BY_LENGTH, FORMS, WORLDS, drift, interval, limit_gap, measured_gap, train
from tests.groups import f64

# (bias, variance) at staleness 0.5, 1 and 2
GRID: dict[str, list[tuple[float, float]]] = {
    "importance sampling": [(0, 0.011911), (0, 0.007114), (0, 0.001895)],
    "PPO clip 0.2": [(0.027404, 0.004598), (0.035867, 0), (0.020508, 0)],
    "SAPO 1, 2": [(0.001439, 0.011113), (0.004778, 0.005385), (0.007475, 0.000855)],
    "GIPO 0.2": [(0.024505, 0.002965), (0.032238, 0.000156), (0.020506, 0.000000)],
    "GIPO 0.5": [(0.006390, 0.008675), (0.014315, 0.002848), (0.017515, 0.000053)],
    "GIPO 1": [(0.001733, 0.010962), (0.004526, 0.005490), (0.007958, 0.000734)],
    "GIPO 2": [(0.000442, 0.011663), (0.001206, 0.006654), (0.002391, 0.001489)],
}
LENGTHS = (0.042226, 0.035867, 0.020508)


@pytest.mark.parametrize(("place", "beta"), list(enumerate(gridworld.STALENESS)))
def test_grid_golden(place: int, beta: float) -> None:
    found = gridworld.study(beta)
    assert found["gradient"] == pytest.approx(LENGTHS[place], abs=2e-6)
    for name, golden in GRID.items():
        own = found["losses"][name]
        assert (own["bias"], own["variance"]) == pytest.approx(golden[place], abs=2e-6), name
    clipped, plain = found["losses"]["PPO clip 0.2"], found["losses"]["importance sampling"]
    assert clipped["cut"] == (0.5 if beta == 0.5 else 1.0)
    assert (clipped["cosine"] is None) == (beta > 0.5)
    assert plain["cosine"] == pytest.approx(1)
    assert plain["break_even"] is None
    others = {name: own for name, own in found["losses"].items() if name not in ("PPO clip 0.2", "GIPO 0.2")}
    assert len(others) == 7
    assert all(own["cosine"] > 0.99 and own["cut"] == 0 for own in others.values())


KERNELS: dict[str, Callable[[float], float]] = {
    "GIPO 1": lambda x: math.exp(-x * x / 2),
    "GIPO 1 laplace": lambda x: math.exp(-abs(x)),
    "GIPO 1 cauchy": lambda x: 1 / (1 + x * x),
}


@pytest.mark.parametrize("name", KERNELS)
def test_grid_kernels_against_a_plain_loop(name: str) -> None:
    beta = 1.5
    own = gridworld.learner(beta)
    chances, advantages = own.logprobs.exp().tolist(), own.advantages.tolist()
    mean, truth, squares = [[[0.0] * 4 for _ in range(3)] for _ in range(3)]
    for state, action, logit in product(range(3), range(4), range(4)):
        score = (action == logit) - chances[state][logit]
        ratio = chances[state][action] / 0.25
        estimate = KERNELS[name](math.log(ratio)) * ratio * advantages[state][action] * score
        mean[state][logit] += estimate / 12
        squares[state][logit] += estimate**2 / 12
        truth[state][logit] += chances[state][action] * advantages[state][action] * score / 3
    bias, variance = (f64(mean) - f64(truth)).norm(), f64(squares).sum() - f64(mean).square().sum()
    found = gridworld.study(beta)["losses"]
    assert (found[name]["bias"], found[name]["variance"]) == pytest.approx((float(bias), float(variance)), rel=1e-9)
    count = found[name]["break_even"]
    assert found[name]["bias"] ** 2 + found[name]["variance"] / count == pytest.approx(
        found["importance sampling"]["variance"] / count, rel=1e-9
    )


def test_on_policy_all_losses_give_the_true_gradient() -> None:
    for own in gridworld.study(0.0)["losses"].values():
        assert own["bias"] < 1e-12
        assert own["cosine"] == pytest.approx(1)
        assert own["cut"] == 0


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    gridworld.draw(tmp_path / "grid.png", [0.0, 1.0, 2.0])
    curves = {name: {"raw": torch.ones(3, 4)} for name in WORLDS}
    stopping_bias.draw(tmp_path / "turns.png", curves)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_episodes_are_what_the_world_says() -> None:
    world = WORLDS["informs"]
    own = world.play(stopping_bias.start(40), torch.Generator().manual_seed(0))
    searches = own.has_gain.sum(1)
    assert torch.equal(searches, own.last)
    assert own.has_gain.int().diff(dim=1).max() == 0, "searches come first, without a hole"
    torch.testing.assert_close(own.beliefs.diff(dim=1), own.gains[:, :-1])
    assert (own.gains[:, 0][own.last > 0] - 0.3).abs().max() <= stopping_bias.NOISE
    # 10,240 episodes: standard errors below .01
    assert float(own.outcome[own.last == 0].mean()) == pytest.approx(0.1, abs=0.03)
    for least in (1, 3, 6):
        assert float(own.outcome[own.last >= least].mean()) == pytest.approx(0.4, abs=0.05)
    assert float(1 + searches.double().mean()) == pytest.approx(
        float(stopping_bias.mean_turns(stopping_bias.start(1)[0])), abs=0.1
    )


def test_intervals_and_verdicts() -> None:
    # 1, 2, 3, 6: mean 3, standard deviation sqrt(14 / 3), t with 3 degrees of freedom 3.182446
    found = interval(f64([1, 2, 3, 6]))
    assert (float(found.mean), float(found.half)) == pytest.approx((3, 3.182446 * math.sqrt(14 / 3) / 2), rel=1e-6)
    for logit, spread, verdict in (
        (1.0, 0.0, "kept"),
        (0.0, 0.1, "shorter"),
        (2.0, 0.1, "longer"),
        (1.1, 2, "unclear"),
    ):
        ends = logit + spread * f64([-1, 0, 1])
        path = torch.ones(3, stopping_bias.EARLY + 1, stopping_bias.SEARCHES, dtype=torch.float64)
        path[:, -1] = ends[:, None]
        assert drift(path)["verdict"] == verdict


CLOSED = ("grpo", "separate", "joint", "by-turn", "raw", "none")


@pytest.mark.parametrize("world", ["neutral", "informs", "flatters"])
@pytest.mark.parametrize("form", CLOSED)
def test_the_closed_form_is_what_large_groups_tend_to(form: str, world: str) -> None:
    limit = limit_gap(form, WORLDS[world])
    found = measured_gap(FORMS[form], WORLDS[world], group=256, policies=6, rounds=8)
    assert limit is not None
    # Twice the half width of a 95 % interval, and what a group of 256 still lacks.
    assert ((found.mean - limit).abs() <= 2 * found.half + 0.02).all()


# The sign of the change of the neutral searches, of which there are 2.15; 0 where there is none.
SIGNS = {
    "neutral": {"separate": 0, "joint": -1, "by-turn": 0, "raw": 0, "none": 0},
    "informs": {"separate": -1, "scaled": -1, "by-turn": 0, "raw": 0},
    "flatters": {"by-turn": 0, "raw": 1},
    "discourages": {"raw": -1},
    "doubts": {"gae 0.5": -1},
}


@pytest.mark.parametrize(("world", "form"), [(world, form) for world, forms in SIGNS.items() for form in forms])
def test_what_becomes_of_the_neutral_searches(world: str, form: str) -> None:
    extra = stopping_bias.neutral_searches(train(FORMS[form], WORLDS[world], runs=5, updates=30))
    change = interval(extra[:, -1] - extra[:, 0])
    sign = SIGNS[world][form]
    if sign:
        # Half a 95 % interval of five runs is 2.8 standard errors.
        assert sign * float(change.mean) > 1.5 * float(change.half)
    else:
        assert abs(float(change.mean)) < 0.05


def test_uncentred_returns_over_lengths_shorten_episodes() -> None:
    turns = stopping_bias.mean_turns(train(FORMS["none"], WORLDS["neutral"], BY_LENGTH, runs=5, updates=30))
    change = interval(turns[:, -1] - turns[:, 0])
    assert float(change.mean) < -0.1 - 2 * float(change.half)


def test_odds_turn_the_small_gap_of_the_belief_as_a_critic() -> None:
    worlds = [stopping_bias.World(success=chance) for chance in (0.2, 0.8)]
    rare, often = (measured_gap(FORMS["gae 0.5"], world, policies=8, rounds=10) for world in worlds)
    assert float(rare.mean[0]) > 2 * float(rare.half[0])
    assert float(often.mean[0]) < -2 * float(often.half[0])


def run_of(*levels: float, final: float) -> dict[str, object]:
    """A run evaluated every 100 episodes."""
    curve = [{"rollouts": 100 * number, "id_em": em, "id_found": 0.5} for number, em in enumerate(levels)]
    return {"curve": curve, "final": {"id_em": final, "ood_em": final / 2, "id_found": 0.9}, "no_signal": 0.25}


def test_the_ratio_of_a_sparse_cell() -> None:
    grpo = [run_of(0.0, 0.1, 0.2, 0.3, 0.4, final=0.4), run_of(0.0, 0.0, 0.0, 0.1, 0.1, final=0.1)]
    igpo = [run_of(0.0, 0.3, 0.8, 0.8, 0.8, final=0.8), run_of(0.0, 0.0, 0.4, 0.4, 0.4, final=0.4)]
    found = sparse.cell(grpo, igpo)
    assert found["level"] == 0.3  # half of IGPO's mean, the larger one
    # episodes to it: GRPO 300 and never (400), IGPO 100 and 175
    assert found["log_ratios"] == pytest.approx([math.log(100 / 300), math.log(175 / 400)], abs=1e-4)
    assert found["never_reached"] == {"grpo": 1, "igpo": 0}
    assert found["ratio"][0] == pytest.approx(math.sqrt(100 / 300 * 175 / 400), abs=1e-3)
    assert found["id_em_over_grpo"][0] == pytest.approx(0.35)
    alone = sparse.cell(grpo[:1], igpo[:1])
    assert alone["ratio"][1:] == [None, None]
    together = sparse.corner({"a": found, "b": alone})
    # alone the level is 0.4, which GRPO has after 400 episodes and IGPO after 120; each cell counts once
    mean = (sum(found["log_ratios"]) / 2 + math.log(120 / 400)) / 2
    assert together["igpo_rollouts_ratio_sparse"][0] == pytest.approx(math.exp(mean), abs=1e-3)
    assert together["never_reached"] == {"grpo": 1, "igpo": 0}
