"""TinyWiki as search environments: its index, its rules and its question sets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from agentgym_ig.envs.episode import Rules
from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv
from agentgym_ig.indexes.bm25 import Bm25Index, Bm25Settings
from agentgym_ig.tinywiki import STOPWORDS, Path, World, chains
from agentgym_ig.types import Question

TINYWIKI_RULES = Rules(prompt="tinywiki", max_turns=5, top_k=1, metric="em")
"""Exact match, since F1 would pay for the relation word without the right name, and policies find that out."""

TINYWIKI_BM25 = Bm25Settings(k1=1.2, b=0.75, stopwords=STOPWORDS, stemmer=None, title_weight=3)

DATASETS = {
    "hop1": (1, False),
    "hop2": (2, False),
    "hop3": (3, False),
    "hop4": (4, False),
    "compose2": (2, True),
    "compose3": (3, True),
}
"""Question set → (hops, whether it is made of held-out pairs of relations)."""


@cache
def tinywiki_index(world: World) -> Bm25Index:
    """A BM25 index over the world's articles, in memory; made once per world."""
    return Bm25Index.from_passages(world.passages, TINYWIKI_BM25)


def tinywiki_questions(world: World, dataset: str, count: int) -> dict[Question, Path]:
    """`count` different questions of a set and the paths behind them, the same for equal worlds.

    Raises ValueError for an unknown set, or more questions than the world has.
    """
    if dataset not in DATASETS:
        raise ValueError(f"TinyWiki has no question set {dataset!r}; choose one of {', '.join(DATASETS)}")
    hops, held_out = DATASETS[dataset]
    rng = np.random.default_rng((world.seed, list(DATASETS).index(dataset)))
    paths = world.draw_paths(chains(hops, held_out=held_out), count, rng)
    return {world.question(path, dataset): path for path in paths}


def _world_questions(seed: int, datasets: Sequence[str], per_dataset: int) -> tuple[Bm25Index, list[Question]]:
    world = World(seed, "train")
    questions = [question for name in datasets for question in tinywiki_questions(world, name, per_dataset)]
    return tinywiki_index(world), questions


def tiny_env(
    world_seed: int = 1,
    datasets: Sequence[str] = ("hop2", "hop3"),
    per_dataset: int = 100,
    rules: Rules = TINYWIKI_RULES,
    render_mode: str | None = None,
) -> SearchEnv:
    """The registered `agentgym_ig/TinyWiki-v0`: questions over a training world, with nothing to download."""
    index, questions = _world_questions(world_seed, datasets, per_dataset)
    return SearchEnv(index, questions, rules, render_mode)


def tiny_vector_env(
    num_envs: int = 1,
    world_seed: int = 1,
    datasets: Sequence[str] = ("hop2", "hop3"),
    per_dataset: int = 100,
    rules: Rules = TINYWIKI_RULES,
) -> SearchVectorEnv:
    """The vector form of `tiny_env`."""
    index, questions = _world_questions(world_seed, datasets, per_dataset)
    return SearchVectorEnv(index, questions, num_envs, rules)
