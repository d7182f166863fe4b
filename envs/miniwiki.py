"""MiniWiki as search environments: real text and real questions with nothing to download."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from agentgym_ig.envs.episode import Rules
from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv
from agentgym_ig.envs.suites import Suite, suite_datasets
from agentgym_ig.indexes.bm25 import Bm25Index
from agentgym_ig.miniwiki import miniwiki_passages, miniwiki_questions
from agentgym_ig.types import Question

TRAINED = tuple(name for name, domain in suite_datasets("miniwiki").items() if domain == "in_domain")


@cache
def miniwiki_index() -> Bm25Index:
    """A BM25 index over MiniWiki, in memory; made once."""
    return Bm25Index.from_passages(miniwiki_passages())


def miniwiki_suite(split: str = "test", limit: int | None = None, rules: Rules | None = None) -> Suite:
    """The suite: three areas in-domain, the arts out-of-domain; areas without questions of the split are left out.

    `limit` takes the first so many questions of each area.
    """
    asked = {area: miniwiki_questions(area, split)[:limit] for area in suite_datasets("miniwiki")}
    return Suite("miniwiki", {area: own for area, own in asked.items() if own}, miniwiki_index(), rules or Rules())


def _questions(areas: Sequence[str], split: str) -> list[Question]:
    return [question for area in areas for question in miniwiki_questions(area, split)]


def mini_env(
    areas: Sequence[str] = TRAINED, split: str = "train", rules: Rules | None = None, render_mode: str | None = None
) -> SearchEnv:
    """The registered `agentgym_ig/MiniWiki-v0`: questions over the areas to train on."""
    return SearchEnv(miniwiki_index(), _questions(areas, split), rules or Rules(), render_mode)


def mini_vector_env(
    num_envs: int = 1, areas: Sequence[str] = TRAINED, split: str = "train", rules: Rules | None = None
) -> SearchVectorEnv:
    """The vector form of `mini_env`."""
    return SearchVectorEnv(miniwiki_index(), _questions(areas, split), num_envs, rules or Rules())
