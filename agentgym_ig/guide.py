"""Self-Guide (arXiv 2604.03098): the policy's own short assessment of the episode, and the reward made of it.

The policy opens its action with `<guide>one sentence, then a verdict</guide>` and goes on in the light of it. The
verdict is worth +0.1, 0 or -0.1; how far it is trusted is a function of training progress.
"""

from __future__ import annotations

import re

VERDICTS = {"positive": 0.1, "neutral": 0.0, "negative": -0.1}
"""Verdict → reward."""

_VERDICT = re.compile(r"\b(positive|neutral|negative)\b", re.IGNORECASE)


def verdict(action: str) -> str | None:
    """The last verdict inside the action's guide block; None where there is no block, no verdict, or several blocks."""
    if action.count("<guide>") != 1 or action.count("</guide>") != 1:
        return None
    content = action.partition("<guide>")[2].partition("</guide>")
    verdicts = _VERDICT.findall(content[0]) if content[1] else []
    return verdicts[-1].lower() if verdicts else None


def trust(progress: float) -> float:
    """How much the verdicts count at a training progress in [0, 1]: nothing until 0.5, all from 0.625 to 0.875, then
    less until nothing at 1 (the paper's 0, 40, 50, 70 and 80 of 80 steps). Raises ValueError outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} is the share of training that is done; give a number from 0 to 1")
    return min(max((progress - 0.5) / 0.125, 0.0), 1.0, (1.0 - progress) / 0.125)
