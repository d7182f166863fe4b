"""How well an index finds what questions need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentgym_ig.answers import normalise_squad
from agentgym_ig.indexes.base import Index
from agentgym_ig.types import Hit, Question


def evaluate_retrieval(index: Index, questions: Sequence[Question], ks: Sequence[int]) -> dict[str, Any]:
    """Search each question's own words, and look at the best k passages for every k.

    Over the questions that have supporting passages: `recall`, the mean share of them that was found; `all_gold`,
    the share of questions for which all were; `answer`, the share for which some accepted answer stands in a passage
    (normalised as SQuAD does, whole words). Raises ValueError for k < 1, and when no question has supporting passages.
    """
    supported = [question for question in questions if question.supporting]
    if not ks or min(ks) < 1:
        raise ValueError(f"k={list(ks)}: give numbers of 1 or more")
    if not supported:
        raise ValueError(f"none of {len(questions)} questions has supporting passages, so recall cannot be measured")
    found = index.search([question.text for question in supported], max(ks))
    figures: dict[str, Any] = {"questions": len(supported), "recall": {}, "all_gold": {}, "answer": {}}
    firsts = [_first_answer(question, hits) for question, hits in zip(supported, found, strict=True)]
    for k in ks:
        shares = [_share_found(question, hits[:k]) for question, hits in zip(supported, found, strict=True)]
        figures["recall"][str(k)] = sum(shares) / len(shares)
        figures["all_gold"][str(k)] = sum(share == 1 for share in shares) / len(shares)
        figures["answer"][str(k)] = sum(first is not None and first < k for first in firsts) / len(firsts)
    return figures


def _share_found(question: Question, hits: Sequence[Hit]) -> float:
    wanted = set(question.supporting)
    return len(wanted & {hit.passage.id for hit in hits}) / len(wanted)


def _first_answer(question: Question, hits: Sequence[Hit]) -> int | None:
    """The rank, from 0, of the first passage with an answer in it."""
    answers = [f" {answer} " for answer in map(normalise_squad, question.answers) if answer]
    for rank, hit in enumerate(hits):
        text = f" {normalise_squad(f'{hit.passage.title} {hit.passage.text}')} "
        if any(answer in text for answer in answers):
            return rank
    return None
