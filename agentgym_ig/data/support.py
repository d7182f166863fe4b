"""What rows of multi-hop sets say about their evidence, in the forms in which they say it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

HOPS = {"nq": 1, "triviaqa": 1, "popqa": 1, "hotpotqa": 2, "bamboogle": 2}
"""Hops of datasets whose questions all have as many."""
_MUSIQUE = re.compile(r"(\d)hop")


def unique(texts: Iterable[str]) -> list[str]:
    """Each text once, in order, without empty ones."""
    return list(dict.fromkeys(text for text in texts if text))


def parsed(value: Any, name: str) -> Any:
    """The value of a field that may be JSON in a string. Raises ValueError for a string that is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error}): {value[:80]!r}") from error


def support(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Titles of the supporting paragraphs, and their texts, which are empty where a paragraph is not in the context.

    Understands pairs, as HotpotQA's and 2WikiMultihopQA's own files have them, columns, as the hub has them, and
    either as JSON in a string.
    """
    facts, context = (parsed(row[name], name) for name in ("supporting_facts", "context"))
    titles = unique(str(title) for title in (facts["title"] if isinstance(facts, dict) else _firsts(facts)))
    if isinstance(context, dict):
        sentences = context["sentences"] if "sentences" in context else context["content"]
        paragraphs = list(zip(context["title"], sentences, strict=True))
    else:
        paragraphs = [(pair[0], pair[1]) for pair in context or ()]
    texts = {str(title): f"{title} {' '.join(map(str, own))}" for title, own in paragraphs}
    return titles, [texts[title] for title in titles] if all(title in texts for title in titles) else []


def _firsts(pairs: Any) -> list[Any]:
    return [pair[0] for pair in pairs or ()]


def hops_of(dataset: str, name: str, kind: str | None) -> int | None:
    """How many hops a question takes, by its dataset, its id (MuSiQue) and its type (2WikiMultihopQA)."""
    if dataset == "musique":
        found = _MUSIQUE.match(name)
        return int(found[1]) if found else None
    if dataset == "2wikimultihopqa":
        return None if kind is None else 4 if kind == "bridge_comparison" else 2
    return HOPS.get(dataset)
