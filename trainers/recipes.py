"""Recipes: every method as an estimator, a policy loss and a few settings, each chosen on its own.

`recipe("igpo")` is a method with its paper's settings, `recipe("igpo+gipo")` puts the parts of two together, and
`replace(recipe("grpo"), loss=mine)` has a part of one's own: a loss is a `losses.PolicyLoss`, an estimator any function
from a `Batch` to advantages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal

from agentgym_ig.trainers.aggregation import AGGREGATIONS
from agentgym_ig.trainers.estimators import (
    GRPO,
    IGPO,
    PPO,
    RLOO,
    BeliefGAE,
    DrGRPO,
    Estimator,
    GiGPO,
    GraphGPO,
    ReinforcePP,
    ReinforcePPBaseline,
    SelfGuide,
    Sum,
)
from agentgym_ig.trainers.kl import KL_ESTIMATORS
from agentgym_ig.trainers.losses import (
    PolicyLoss,
    cispo_loss,
    clipped_loss,
    gipo_loss,
    gspo_token_loss,
    sapo_loss,
)

Gain = Literal["log", "prob"]


READABLE = frozenset({"info_gain", "self_guide", "values", "reference"})
"""What an estimator can ask for beside rewards and tokens."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method. The defaults are GRPO's, without a KL term."""

    estimator: Estimator = field(default_factory=GRPO)
    loss: PolicyLoss = clipped_loss
    aggregation: str = "seq-mean-token-mean"
    """How token losses are averaged; see `aggregation.token_weights`. The `-norm` form divides by as many tokens as the
    update's episodes could have had."""
    gain: Gain = "log"
    """What the channel `info_gain` holds, if the estimator reads it: differences of log-probabilities (`log`) or of
    probabilities (`prob`)."""
    kl: float = 0.0
    """Weight of the KL to the reference model as a loss term."""
    kl_estimator: str = "k3"
    entropy: float = 0.0
    """Weight of the bonus for entropy."""
    reads: frozenset[str] = frozenset()
    """What an estimator that is a plain function reads, some of `READABLE`; one of ours says so itself."""
    sampling_rounds: int = 1
    """Above 1: groups without signal are drawn again, so often at most (DAPO's dynamic sampling)."""
    overlong: float = 0.0
    """Above 0: DAPO's soft punishment, up to -1, of episodes that use up this last share of all tokens that they may
    write."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` as the paper has them."""

    def __post_init__(self) -> None:
        choices = {"aggregation": AGGREGATIONS, "gain": ("log", "prob"), "kl_estimator": tuple(KL_ESTIMATORS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                wanted = ", ".join(map(str, allowed))
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {wanted}")
        if self.reads - READABLE or not 0 <= self.overlong <= 1:
            raise ValueError(
                f"reads={sorted(self.reads)}: wanted some of {sorted(READABLE)}; overlong={self.overlong}: wanted a"
                " share from 0 to 1"
            )
        if not 0 <= self.kl < float("inf") or not 0 <= self.entropy < float("inf") or self.sampling_rounds < 1:
            raise ValueError(
                f"kl={self.kl} and entropy={self.entropy} must be finite and not below 0,"
                f" sampling_rounds={self.sampling_rounds} 1 or more"
            )

    @property
    def needs(self) -> frozenset[str]:
        """All that the estimator and the loss read beside rewards and tokens, some of `READABLE`."""
        own: frozenset[str] = getattr(self.estimator, "reads", frozenset())
        return self.reads | own | frozenset(["reference"] if self.kl else [])

    @property
    def own_channels(self) -> frozenset[str]:
        """The channels that the estimator reads turn by turn, so that they are no part of an episode's reward."""
        return self.needs & {"info_gain", "self_guide"}

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what a step computes, in JSON's types."""
        return {own.name: described(getattr(self, own.name)) for own in fields(self) if own.name != "preset"}


def described(part: Any) -> Any:
    """A setting, config or function in JSON's types: a function by its name, with what it is bound to."""
    if isinstance(part, partial):
        bound = {"bound": described(part.args)} if part.args else {}
        return {"function": described(part.func)} | bound | {key: described(own) for key, own in part.keywords.items()}
    if is_dataclass(part):
        own = {each.name: described(getattr(part, each.name)) for each in fields(part)}
        return {"config": type(part).__name__, **own}
    if isinstance(part, frozenset):
        return sorted(part)
    if isinstance(part, tuple | list):
        return [described(own) for own in part]
    if callable(part):
        return getattr(part, "__qualname__", type(part).__qualname__)
    return part


_GROUPS = {"group_size": 8, "questions_per_step": 16}
_IGPO = {
    "estimator": IGPO(),
    "kl": 0.001,
    "entropy": 0.001,
    "preset": {"learning_rate": 1e-6, "questions_per_step": 32, "group_size": 16},
}

PARTS: dict[str, dict[str, Any]] = {
    "grpo": {"estimator": GRPO(), "kl": 0.001, "preset": {"learning_rate": 1e-6}},
    "drgrpo": {
        "estimator": DrGRPO(),
        "aggregation": "seq-mean-token-sum-norm",
        "preset": {"learning_rate": 1e-6, "group_size": 8},
    },
    "dapo": {
        "loss": partial(clipped_loss, clip_low=0.2, clip_high=0.28),
        "aggregation": "token-mean",
        "sampling_rounds": 10,
        "overlong": 0.2,
        "preset": {"learning_rate": 1e-6, "warmup_steps": 20, "updates_per_step": 16, "group_size": 16},
    },
    "gspo": {"loss": gspo_token_loss, "aggregation": "seq-mean-token-mean", "preset": {"updates_per_step": 4}},
    "cispo": {"loss": cispo_loss, "aggregation": "token-mean", "preset": {"updates_per_step": 16}},
    "sapo": {"loss": sapo_loss, "aggregation": "seq-mean-token-mean", "preset": {"updates_per_step": 4}},
    "rloo": {"estimator": RLOO(), "aggregation": "seq-mean-token-sum", "preset": {"group_size": 4}},
    "reinforce++": {
        "estimator": ReinforcePP(kl=0.001),
        "aggregation": "token-mean",
        "preset": {"learning_rate": 5e-7},
    },
    "reinforce++-baseline": {
        "estimator": ReinforcePPBaseline(),
        "kl": 0.001,
        "kl_estimator": "k2",
        "aggregation": "token-mean",
        "preset": {"learning_rate": 5e-7},
    },
    "ppo": {
        "estimator": PPO(kl=0.001),
        "aggregation": "token-mean",
        "preset": {"learning_rate": 1e-6, "critic_learning_rate": 1e-5, "updates_per_step": 2},
    },
    "gigpo": {"estimator": GiGPO(), "kl": 0.01, "preset": {"learning_rate": 1e-6, **_GROUPS}},
    "graphgpo": {"estimator": GraphGPO(), "kl": 0.01, "preset": {"learning_rate": 1e-6, **_GROUPS}},
    "igpo": _IGPO,
    "igpo-v1": _IGPO | {"estimator": IGPO(form="joint"), "gain": "prob"},
    "self-guide": {"estimator": SelfGuide(), "kl": 0.001, "preset": {"steps": 80, **_GROUPS}},
    "gipo": {"loss": gipo_loss, "preset": {"replay": 1}},
    "igpo-gae": {"estimator": BeliefGAE(), "gain": "prob", "kl": 0.001, "preset": {"learning_rate": 1e-6}},
    "igpo-gigpo": {
        "estimator": Sum(parts=(IGPO(), GiGPO(episode_weight=0.0))),
        "kl": 0.001,
        "preset": {"learning_rate": 1e-6},
    },
}
"""Name → the parts of a `Recipe` that the method is about. `docs/training.md` says where each setting comes from."""


def recipe(name: str) -> Recipe:
    """The recipe of that name, or of several names joined by `+`, with the parts of all.

    Raises ValueError, listing all names, where there is none, and where two of the methods are about the same part and
    differ in it. Of presets the first name's win.
    """
    parts: dict[str, Any] = {}
    for own in _names(name):
        preset = {**PARTS[own].get("preset", {}), **parts.get("preset", {})}
        found = {key: value for key, value in PARTS[own].items() if key != "preset"}
        both = sorted(key for key in found.keys() & parts.keys() if found[key] != parts[key])
        if both:
            raise ValueError(f"{name!r}: its methods differ in {', '.join(both)}; they cannot be put together")
        parts |= found | {"preset": preset}
    return Recipe(**parts)


def with_kl(chosen: Recipe, weight: float) -> Recipe:
    """The recipe with that weight of the KL to the reference model, wherever it has it: as a loss term, or as a reward
    that its estimator gives (PPO, REINFORCE++).
    """
    if isinstance(chosen.estimator, PPO | ReinforcePP):
        return replace(chosen, estimator=replace(chosen.estimator, kl=weight))
    return replace(chosen, kl=weight)


_JOINT = re.compile(r"(?<=\w)\+(?=\w)|(?<=\+\+)\+")
"""A plus between two names, not one of those that REINFORCE++ ends in."""


def _names(name: str) -> list[str]:
    names = _JOINT.split(name)
    unknown = [own for own in names if own not in PARTS]
    if unknown:
        raise ValueError(
            f"unknown recipe {', '.join(map(repr, unknown))}; choose one of {', '.join(sorted(PARTS))}, or several"
            " joined by +"
        )
    return names
