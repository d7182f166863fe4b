"""Recipes: names and their combinations, what a run notes of them, parts of one's own, and settings out of range."""

import json
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers import (
    GRPO,
    IGPO,
    PARTS,
    PPO,
    Batch,
    BeliefGAE,
    GiGPO,
    GraphGPO,
    Recipe,
    ReinforcePP,
    ReinforcePPBaseline,
    SelfGuide,
    Sum,
    TrainConfig,
    recipe,
    train,
)
from agentgym_ig.trainers.checkpoint import checkpoints, read_state
from agentgym_ig.trainers.loop import train_step
from agentgym_ig.trainers.losses import clipped_loss, gipo_loss, gspo_token_loss
from agentgym_ig.trainers.recipes import READABLE, described
from tests.runs import begun, fresh, paid_env, same, weights


@pytest.mark.parametrize("name", PARTS)
def test_every_method_has_a_recipe_with_its_own_parts(name: str) -> None:
    made = recipe(name)
    assert all(getattr(made, part) == own for part, own in PARTS[name].items())
    TrainConfig(**made.preset)
    assert json.loads(json.dumps(made.settings)) == made.settings


@pytest.mark.parametrize(
    ("name", "estimator", "loss", "rounds"),
    [
        ("igpo+gipo", IGPO(), gipo_loss, 1),
        ("reinforce++-baseline+gipo", ReinforcePPBaseline(), gipo_loss, 1),
        ("reinforce+++gipo", ReinforcePP(kl=0.001), gipo_loss, 1),
        ("gipo+reinforce++", ReinforcePP(kl=0.001), gipo_loss, 1),
        ("igpo+dapo", IGPO(), PARTS["dapo"]["loss"], 10),
        ("self-guide+dapo", SelfGuide(), PARTS["dapo"]["loss"], 10),
        ("gspo+graphgpo", GraphGPO(), gspo_token_loss, 1),
    ],
)
def test_methods_are_put_together(name: str, estimator: Any, loss: Any, rounds: int) -> None:
    made = recipe(name)
    assert (made.estimator, made.loss, made.sampling_rounds) == (estimator, loss, rounds)
    assert json.loads(json.dumps(made.settings)) == made.settings


def test_all_parts_of_both_methods_are_kept_and_the_first_preset_wins() -> None:
    made = recipe("self-guide+dapo")
    assert made.needs == {"self_guide", "reference"}
    assert made.overlong == 0.2
    assert (made.kl, made.aggregation) == (0.001, "token-mean")
    assert made.preset == {"learning_rate": 1e-6, "warmup_steps": 20, "updates_per_step": 16, "steps": 80} | {
        "group_size": 8,
        "questions_per_step": 16,
    }
    assert recipe("dapo+self-guide").preset["group_size"] == 16
    assert recipe("reinforce+++gipo").needs == {"reference"}
    assert recipe("reinforce++") == recipe("reinforce+++reinforce++")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("igpo+grpo", "estimator, kl"), ("dapo+gipo", "loss"), ("cispo+dapo", "loss"), ("igpo+gigpo", "estimator, kl")],
)
def test_methods_about_the_same_part_are_refused(name: str, parts: str) -> None:
    first, _, second = name.partition("+")
    both = sorted(key for key in PARTS[first].keys() & PARTS[second].keys() - {"preset"})
    wanted = [key for key in both if PARTS[first][key] != PARTS[second][key]]
    with pytest.raises(ValueError, match="cannot be put together") as refused:
        recipe(name)
    assert name in str(refused.value)
    assert ", ".join(wanted) in str(refused.value)
    assert parts.split(", ")[0] in wanted


@pytest.mark.parametrize("name", ["ppo2", "", "+", "igpo+", "+igpo", "igpo++gipo", "IGPO", "igpo+nope", "reinforce+"])
def test_an_unknown_name_is_told_all_names(name: str) -> None:
    with pytest.raises(ValueError, match="unknown recipe") as refused:
        recipe(name)
    assert ", ".join(sorted(PARTS)) in str(refused.value)


def other(value: Any) -> Any:
    """Another value of a setting's type."""
    words = {"log": "prob", "separate": "joint", "code": "paper", "docset": "raw", "k1": "k2", "k3": "k2"}
    words |= {"seq-mean-token-mean": "token-mean"}
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return words[value]
    return value / 2 if isinstance(value, float) and value else value + 1 if isinstance(value, int) else 0.5


ESTIMATORS = (GRPO(), SelfGuide(), IGPO(), BeliefGAE(), GiGPO(), GraphGPO(), ReinforcePP(), PPO())


def test_settings_differ_whenever_any_setting_of_a_part_does() -> None:
    made: list[Any] = [Recipe(), *(Recipe(estimator=own) for own in ESTIMATORS[1:])]
    for own in ESTIMATORS:
        made += [Recipe(estimator=replace(own, **{each.name: other(getattr(own, each.name))})) for each in fields(own)]
    made += [Recipe(estimator=Sum(parts=parts)) for parts in ((IGPO(),), (IGPO(), GiGPO()), (IGPO(gamma=0.5), GiGPO()))]
    plain = {"aggregation", "gain", "kl", "kl_estimator", "entropy", "overlong", "sampling_rounds"}
    made += [Recipe(**{name: other(getattr(Recipe(), name))}) for name in sorted(plain)]
    made += [Recipe(reads=frozenset({name})) for name in sorted(READABLE)]
    losses = (gipo_loss, partial(gipo_loss, sigma=0.5), partial(gipo_loss, sigma=0.25), partial(clipped_loss))
    made += [Recipe(loss=loss) for loss in losses]
    assert {own.name for own in fields(Recipe)} == plain | {"estimator", "loss", "reads", "preset"}
    seen = [json.dumps(own.settings, sort_keys=True) for own in made]
    assert len(set(seen)) == len(seen)
    assert Recipe(preset={"steps": 3}).settings == Recipe().settings


def test_what_a_function_is_bound_to_is_noted() -> None:
    def mine(weight: float, batch: Batch, power: float = 1.0) -> Tensor:
        return batch.rewards * (weight * power)

    bound = [partial(mine, 1.0), partial(mine, 2.0), partial(mine, 2.0, power=2.0), partial(partial(mine, 2.0))]
    noted = [json.dumps(described(own)) for own in bound]
    assert len(set(noted)) == 3
    assert noted[1] == noted[3]  # functools makes one of the two
    assert all("mine" in own for own in noted)


def reinforce(logprobs: Tensor, old: Tensor, advantages: Tensor, /, *, mask: Tensor | None = None) -> Tensor:
    """A loss of one's own, whose gradient on policy is that of all others."""
    loss = -advantages * logprobs
    return loss if mask is None else loss.masked_fill(~mask, 0.0)


def scaled(
    logprobs: Tensor, old: Tensor, advantages: Tensor, /, *, mask: Tensor | None = None, by: float = 1.0
) -> Tensor:
    return by * reinforce(logprobs, old, advantages, mask=mask)


@pytest.mark.parametrize("loss", [reinforce, partial(scaled, by=1.0)])
def test_a_loss_of_ones_own_trains(loss: Any, tmp_path: Path) -> None:
    after = []
    for chosen in (clipped_loss, loss):
        run = fresh(tmp_path, replace(recipe("grpo"), loss=chosen), env=paid_env())
        before = weights(run.policy.model)
        metrics = train_step(run, begun(run, rate=0.1), 0)
        after.append(weights(run.policy.model))
        assert not same(before, after[-1])
        assert metrics["trust"] == pytest.approx(1.0, abs=1e-4)
    for key, tensor in after[0].items():
        assert_close(after[1][key], tensor, atol=2e-6, rtol=0)


def gains_and_outcome(batch: Batch) -> Tensor:
    """An estimator of one's own."""
    return IGPO()(batch)


@dataclass(frozen=True)
class Doubled:
    """Another, with a setting."""

    by: float = 2.0

    def __call__(self, batch: Batch, /) -> Tensor:
        return self.by * gains_and_outcome(batch)


def test_an_estimator_of_ones_own_trains_and_is_noted(tmp_path: Path) -> None:
    runs = {}
    mine: dict[str, Any] = {"theirs": IGPO(), "mine": gains_and_outcome, "doubled": Doubled()}
    for name, own in mine.items():
        runs[name] = run = fresh(
            tmp_path / name, replace(recipe("igpo"), estimator=own, reads=frozenset({"info_gain"})), steps=1
        )
        train(run)
    end = {name: weights(run.policy.model) for name, run in runs.items()}
    assert same(end["theirs"], end["mine"])
    assert not same(end["theirs"], end["doubled"])
    noted = [
        read_state(checkpoints(tmp_path / name / "checkpoints")[-1])["settings"]["recipe"]["estimator"] for name in runs
    ]
    assert noted[1:] == ["gains_and_outcome", {"config": "Doubled", "by": 2.0}]
    assert is_dataclass(Doubled())
    assert not torch.equal(end["mine"]["model.norm.weight"], end["doubled"]["model.norm.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aggregation": "mean"}, "token-mean, seq-mean-token-mean"),
        ({"gain": "logit"}, "one of log, prob"),
        ({"kl_estimator": "k4"}, "k1, abs, k2, k3"),
        ({"kl": -0.1}, "kl=-0.1"),
        ({"kl": float("nan")}, "kl=nan"),
        ({"entropy": float("inf")}, "entropy=inf"),
        ({"sampling_rounds": 0}, "sampling_rounds=0"),
        ({"reads": frozenset({"beliefs"})}, "beliefs"),
        ({"overlong": 1.5}, "overlong=1.5"),
    ],
)
def test_parts_are_checked_at_birth(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IGPO(form="best"), "separate, joint"),
        (lambda: IGPO(gamma=1.5), "gamma=1.5"),
        (lambda: IGPO(form="raw", gamma=0.9), "form raw"),
        (lambda: BeliefGAE(lam=-0.1), "lam=-0.1"),
        (lambda: GiGPO(state="soup"), "raw, docset"),
        (lambda: GraphGPO(state="soup"), "raw, docset"),
        (lambda: GraphGPO(omega=1.0), "omega=1.0"),
        (lambda: GraphGPO(form="best"), "paper, code"),
        (lambda: PPO(lam=1.5), "lam=1.5"),
        (lambda: PPO(kl=-1.0), "kl=-1.0"),
        (lambda: ReinforcePP(kl_estimator="k9"), "k1, abs"),
    ],
)
def test_estimators_are_checked_at_birth(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 1}, "group_size=1"),
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"epochs": 0, "keep": 0}, "epochs=0, keep=0 must be 1 or more"),
        ({"replay": -1}, "replay=-1 must be 0 or more"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"critic_learning_rate": float("nan")}, "critic_learning_rate=nan"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm=inf"),
        ({"schedule": "step"}, "constant_with_warmup, linear, cosine"),
        ({"aliases": "best"}, "first, max, mean"),
        ({"updates_per_step": 999}, "cannot be cut"),
    ],
)
def test_settings_are_checked_at_birth(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)
