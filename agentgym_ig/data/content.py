"""What makes two questions the same, and which part and subset a question belongs to.

Nothing here depends on the order of a file or on the other rows in it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from hashlib import blake2b

_WORDS = re.compile(r"\w+")
SPAN = 1 << 64
ROUNDING = 1e-9
"""Shares such as 0.7, 0.2 and 0.1 add up to a little less or more than 1."""


def fold(text: str) -> str:
    """A text without case, punctuation, runs of white space and compatibility forms; itself if nothing is left."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(_WORDS.findall(plain.casefold())) or text


def _digest(*texts: str, size: int) -> bytes:
    return blake2b("\0".join(texts).encode("utf-8", "replace"), digest_size=size).digest()


def question_key(question: str, answers: Iterable[str]) -> bytes:
    """16 bytes, equal for equal questions with equal sets of answers, both folded."""
    return _digest(fold(question), *sorted({fold(answer) for answer in answers}), size=16)


def passage_key(title: str, text: str) -> bytes:
    """16 bytes, equal for passages of equal title and text, both folded."""
    return _digest(fold(title), fold(text), size=16)


def rank(purpose: str, seed: int, question: str) -> int:
    """A number below 2**64 that depends on the purpose, the seed and the folded question alone."""
    return int.from_bytes(_digest(purpose, str(seed), fold(question), size=8), "big")


def part_of(question: str, parts: Mapping[str, float], seed: int) -> str | None:
    """The part that a question belongs to; None where the shares leave room and it falls into that.

    parts: name → share of all questions; `check_parts` says what is allowed.
    """
    place, reached = rank("part", seed, question) / SPAN, 0.0
    for name, share in parts.items():
        reached += share
        if place < reached + ROUNDING:
            return name
    return None


def check_parts(parts: Mapping[str, float]) -> None:
    """Raise ValueError for shares that are not above 0, or add up to more than 1."""
    if any(share <= 0 for share in parts.values()) or sum(parts.values()) > 1 + ROUNDING:
        raise ValueError(f"parts {dict(parts)}: shares must be above 0 and add up to at most 1")
