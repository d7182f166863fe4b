"""Corpora and queries for the retrieval benchmarks."""

from __future__ import annotations

import os
import random
from pathlib import Path

from agentgym_ig import Passage, Question
from agentgym_ig.indexes import read_corpus, read_questions, write_corpus

DATA = Path(os.environ.get("AGENTGYM_IG_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
PASSAGES = DATA / "corpus.jsonl.gz"
WITH_GOLD = ("nq", "hotpotqa", "2wikimultihopqa", "musique", "popqa")


def questions(dataset: str) -> list[Question]:
    """One dataset's questions."""
    return read_questions(DATA / "questions" / f"{dataset}.jsonl.gz")


def queries(count: int) -> list[str]:
    """The words of real questions, of all datasets in turn."""
    every = [question.text for dataset in WITH_GOLD for question in questions(dataset)]
    return random.Random(0).sample(every, count)


def spliced(count: int, scratch: Path) -> Path:
    """A corpus of any size: the real passages, then passages of four 25-word pieces of different real ones.

    Its vocabulary does not grow past that of the real passages, as that of a real corpus would.
    """
    path = scratch / f"corpus-{count}.jsonl"
    if not path.exists():
        real = list(read_corpus(PASSAGES))[:count]
        rng = random.Random(0)
        words = [passage.text.split() for passage in real]
        pieces = [" ".join(own[i : i + 25]) for own in words for i in range(0, len(own), 25)]
        more = (
            Passage(f"s{i:07d}", rng.choice(real).title, " ".join(rng.sample(pieces, 4)))
            for i in range(count - len(real))
        )
        write_corpus(path.with_suffix(".partial"), [*real, *more])
        path.with_suffix(".partial").rename(path)
    return path
