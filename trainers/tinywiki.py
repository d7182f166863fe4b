"""The TinyWiki task as it is trained and tested: worlds, question counts, policy and settings that work on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agentgym_ig.envs.search import SearchVectorEnv
from agentgym_ig.envs.suites import Suite, suite_datasets
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES, tinywiki_index, tinywiki_questions
from agentgym_ig.indexes.base import Index
from agentgym_ig.lm.policy import TransformersPolicy, load_model
from agentgym_ig.tinywiki import World
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.recipes import Recipe, recipe, with_kl

WARM_START = "tinywiki"
"""Names the shipped policy where a model's name is asked for."""

TRAIN_QUESTIONS = 600
"""Questions of each hop count that the training world is asked."""


def warm_start_folder() -> Path:
    """The shipped warm start: a model folder of the hub's layout, named with a hyphen so that it is no package."""
    with as_file(files("agentgym_ig.tinywiki") / "warm-start") as folder:
        return folder


def load_policy_model(name_or_path: str, device: str = "cpu", attention: str | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer in float32: `tinywiki` is the shipped warm start, all else a folder or hub name.

    attention: its kernel by transformers' name.
    """
    source = str(warm_start_folder()) if name_or_path == WARM_START else name_or_path
    return load_model(source, device=device, dtype="float32", attention=attention)


def tiny_policy(model: Any, tokenizer: Any) -> TransformersPolicy:
    """A sampling policy with TinyWiki's short turns."""
    return TransformersPolicy(model, tokenizer, max_new_tokens=16, batch_size=512)


def tiny_config(seed: int, steps: int = 80, *, preset: Mapping[str, Any] = MappingProxyType({})) -> TrainConfig:
    """Settings under which the small policy learns in a minute or two, with what a recipe's preset says of updates."""
    updates = {name: value for name, value in preset.items() if name in ("updates_per_step", "epochs", "replay")}
    return TrainConfig(
        steps=steps,
        questions_per_step=8,
        group_size=12,
        learning_rate=5e-4,
        micro_batch=96,
        seed=seed,
        **updates,
    )


def tiny_recipe(name: str) -> Recipe:
    """A recipe without its KL and entropy terms: the small policy has far to go from a start not worth keeping to."""
    return replace(with_kl(recipe(name), 0.0), entropy=0.0)


def training_world(seed: int) -> World:
    """The world to train in; each seed has another."""
    return World(seed + 1, "train")


def test_world(seed: int) -> World:
    """A world to test in: none of its names stands in any training world."""
    return World(seed + 1000, "test")


def training_env(world: World, num_envs: int, index: Index | None = None) -> SearchVectorEnv:
    """Two- and three-hop questions over a world."""
    questions = [q for name in ("hop2", "hop3") for q in tinywiki_questions(world, name, TRAIN_QUESTIONS)]
    return SearchVectorEnv(index or tinywiki_index(world), questions, num_envs, TINYWIKI_RULES)


def tinywiki_suite(world: World, per_dataset: int = 150, index: Index | None = None) -> Suite:
    """In-domain: the hop counts and compositions of training. Out-of-domain: pairs of relations that it never had."""
    questions = {name: list(tinywiki_questions(world, name, per_dataset)) for name in suite_datasets("tinywiki")}
    return Suite("tinywiki", questions, index or tinywiki_index(world), TINYWIKI_RULES)
