"""MiniWiki: some hundred encyclopedic passages on real things, and questions over them, that ship with the package.

All of it was written for this project. Four areas; `arts` is the one that nothing is trained on.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import orjson

from agentgym_ig.types import Passage, Question

AREAS = ("science", "history", "places", "arts")
SPLITS = ("train", "dev", "test")


def _rows(name: str) -> list[dict[str, object]]:
    lines = (files(__name__) / name).read_text(encoding="utf-8").splitlines()
    return [orjson.loads(line) for line in lines if line]


@cache
def miniwiki_passages() -> tuple[Passage, ...]:
    """All passages, area by area."""
    return tuple(
        Passage(str(row["id"]), str(row["title"]), str(row["text"]))
        for area in AREAS
        for row in _rows(f"passages_{area}.jsonl")
    )


@cache
def miniwiki_questions(area: str, split: str = "test") -> tuple[Question, ...]:
    """The questions of an area and split, with the passages that support each, in the order of reasoning.

    Raises ValueError for an area or split that does not exist.
    """
    if area not in AREAS or split not in SPLITS:
        raise ValueError(
            f"MiniWiki has no {split!r} questions about {area!r}; areas are {', '.join(AREAS)}, splits"
            f" {', '.join(SPLITS)}"
        )
    return tuple(
        Question(
            id=str(row["id"]),
            text=str(row["question"]),
            answers=tuple(map(str, row["answers"])),  # type: ignore[call-overload]
            dataset=area,
            supporting=tuple(map(str, row["supporting"])),  # type: ignore[call-overload]
        )
        for row in _rows(f"questions_{area}.jsonl")
        if row["split"] == split
    )
