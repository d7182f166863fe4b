"""Recipes that the benchmark of methods compares beside the named ones: parts changed one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agentgym_ig.trainers.estimators import IGPO, BeliefGAE, GiGPO, GraphGPO
from agentgym_ig.trainers.recipes import Recipe
from agentgym_ig.trainers.tinywiki import tiny_recipe


def _igpo(estimator: IGPO) -> Callable[[], Recipe]:
    return lambda: replace(tiny_recipe("igpo"), estimator=estimator)


def _gae(estimator: BeliefGAE) -> Callable[[], Recipe]:
    return lambda: replace(tiny_recipe("igpo-gae"), estimator=estimator)


VARIANTS: dict[str, Callable[[], Recipe]] = {
    "igpo:prob": lambda: replace(tiny_recipe("igpo"), gain="prob"),
    "igpo:scaled": _igpo(IGPO(form="scaled")),
    "igpo:raw": _igpo(IGPO(form="raw")),
    "igpo:by-turn": _igpo(IGPO(form="by-turn")),
    "igpo:weight=0.3": _igpo(IGPO(gain_weight=0.3)),
    "igpo-gae:lam=0.8": _gae(BeliefGAE(lam=0.8)),
    "igpo-gae:lam=0.2": _gae(BeliefGAE(lam=0.2)),
    "gigpo:raw": lambda: replace(tiny_recipe("gigpo"), estimator=GiGPO(state="raw")),
    "graphgpo:omega=0.5": lambda: replace(tiny_recipe("graphgpo"), estimator=GraphGPO(omega=0.5)),
}


def chosen_recipe(name: str) -> Recipe:
    """A variant by its name, else the recipe of that name with TinyWiki's settings."""
    return VARIANTS[name]() if name in VARIANTS else tiny_recipe(name)
