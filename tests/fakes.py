"""Small stand-ins that keep to the real contracts."""

from __future__ import annotations

from collections.abc import Sequence

from agentgym_ig.errors import SearchFailed
from agentgym_ig.types import Conversation, Hit, Passage, Question

PASSAGES = [
    Passage("p1", "Marie Curie", "Marie Curie, born in Warsaw, discovered radium and polonium."),
    Passage("p2", "Warsaw", "Warsaw is the capital of Poland and lies on the Vistula."),
    Passage("p3", "Vistula", "The Vistula is the longest river of Poland."),
]
QUESTIONS = [
    Question(
        "q1",
        "On which river lies the city where Marie Curie was born?",
        ("Vistula", "the Vistula"),
        "toy",
        ("p1", "p2"),
    ),
    Question("q2", "What is the capital of Poland?", ("Warsaw",), "toy", ("p2",)),
]


class ListIndex:
    """Scans a list: a passage's score is how many of the query's words stand in it. Counts its calls."""

    def __init__(self, passages: Sequence[Passage] = PASSAGES) -> None:
        self.passages, self.calls = list(passages), 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.calls += 1
        return [self._one(query.lower().split(), k) for query in queries]

    def _one(self, words: list[str], k: int) -> list[Hit]:
        hits = [Hit(p, float(sum(word in f"{p.title} {p.text}".lower() for word in words))) for p in self.passages]
        return sorted((hit for hit in hits if hit.score > 0), key=lambda hit: (-hit.score, hit.passage.id))[:k]


class BrokenIndex:
    """Fails every search."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        raise SearchFailed("the server is gone")


def shown_words(conversations: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """A scorer that believes in what has been shown: one nat for every word of the answer that stood somewhere."""
    shown = [" ".join(m.text for m in own.messages if m.role != "assistant").lower() for own in conversations]
    return [
        [-3.0 + sum(w in text for w in a.lower().split()) for a in own]
        for text, own in zip(shown, answers, strict=True)
    ]
