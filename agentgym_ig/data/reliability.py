"""Questions whose gold answer cannot be trusted or scored: what `--drop-unreliable` leaves out."""

from __future__ import annotations

from collections.abc import Iterable

from agentgym_ig.answers import normalise_squad
from agentgym_ig.data.layouts import Found

LONGEST = 12
"""Words of the longest answer that an agent can be expected to give word for word."""
YES_OR_NO = frozenset({"yes", "no"})

REASONS = {
    "no_answer": "no answer, or none with anything left when it is normalised as SQuAD does",
    "unanswerable": "the release marks the question as one that cannot be answered (MuSiQue-Full)",
    "long_answer": f"every accepted answer is longer than {LONGEST} words",
    "not_in_evidence": "no accepted answer stands in a supporting paragraph, and none is yes or no; looked at only "
    "where the row holds all its supporting paragraphs",
}
"""Why a question is left out, in the order in which it is looked at."""


def unreliable(found: Found) -> str | None:
    """The reason to leave a question out; None for one to keep."""
    answers = [text for answer in found.answers if (text := normalise_squad(answer))]
    if not answers:
        return "no_answer"
    if not found.answerable:
        return "unanswerable"
    if all(len(answer.split()) > LONGEST for answer in found.answers):
        return "long_answer"
    if found.evidence and not YES_OR_NO & set(answers) and not _stands_in(answers, found.evidence):
        return "not_in_evidence"
    return None


def _stands_in(answers: Iterable[str], evidence: Iterable[str]) -> bool:
    texts = [f" {normalise_squad(text)} " for text in evidence]
    return any(f" {answer} " in text for answer in answers for text in texts)
