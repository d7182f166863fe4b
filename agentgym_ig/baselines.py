"""Baselines without a model: closed-book, retrieve-once and multi-hop search, with a reader of a few rules.

They are floors: what the wording of the questions and the retriever give away. The reader answers with `yes`, a date,
a number or a name, whichever the question's first words ask for, from the sentences that share most words with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from agentgym_ig.answers import normalise_squad
from agentgym_ig.grammar import Answer, Search
from agentgym_ig.policies import Policy, QuestionPolicy, session_of
from agentgym_ig.text import neutralise
from agentgym_ig.types import Action, Conversation, Question

_YES_OR_NO = re.compile(r"(?:is|are|was|were|do|does|did|has|have|had|can|could)\b", re.IGNORECASE)
_WHEN = re.compile(r"\b(?:when|(?:what|which) (?:year|date|day))\b", re.IGNORECASE)
_HOW_MANY = re.compile(r"\bhow (?:many|much|old|long|tall|high|far|big)\b", re.IGNORECASE)
_EITHER = re.compile(r"(?:[,:]|\bor\b|\bbetween\b)\s*([^,:?]+?)\s*,?\s+\b(?:or|and)\b\s+([^,:?]+)\?", re.IGNORECASE)

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = re.compile(
    rf"\b(?:\d{{1,2}} {_MONTH} \d{{4}}|{_MONTH} \d{{1,2}}, \d{{4}}|{_MONTH} \d{{4}}|1\d{{3}}|20\d{{2}})\b"
)
_YEAR = re.compile(r"\b(?:1\d{3}|20\d{2})\b")
_NUMBER = re.compile(r"\b\d[\d,.]*\b(?<![,.])")
_WORD = r"[A-Z](?:[\w'’.-]*\w)?"
_NAME = re.compile(rf"\b{_WORD}(?:\.?\s+(?:(?:of|the|de|da|van|von|and)\s+)?{_WORD})*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_SMALL = frozenset(
    "a an the of in on at to for by with from and or is are was were be been who whom whose what which when where how"
    " why did does do that this it he she they his her its their as who's name".split()
)


def closed_book(prompts: Mapping[str, Question]) -> QuestionPolicy:
    """Answers at once, from the question's own words. prompts: see `QuestionPolicy`."""
    return QuestionPolicy(prompts, lambda question, conversation: Answer(guess(question.text, ())))


def retrieve_once(prompts: Mapping[str, Question]) -> QuestionPolicy:
    """Searches the question's own words, then answers from what that found."""
    return multi_hop(prompts, searches=1)


def multi_hop(prompts: Mapping[str, Question], *, searches: int = 2) -> QuestionPolicy:
    """Searches the question, then each time the question with the likeliest name found so far, then answers."""

    def act(question: Question, conversation: Conversation) -> Search | Answer:
        read = [message.text for message in conversation.messages if message.role == "tool"]
        if conversation.turn >= searches:
            return Answer(guess(question.text, read))
        bridge = _best(_names(question.text, read)) if read else ""
        return Search((neutralise(f"{bridge} {question.text}".strip()),))

    return QuestionPolicy(prompts, act)


class SearchFirst:
    """A policy whose first action is made for it, a search for the question's words: retrieve-once for models.

    prompts: see `QuestionPolicy`. With `max_turns=2` all that is left to do is to answer.
    """

    def __init__(self, policy: Policy, prompts: Mapping[str, Question]) -> None:
        self.policy, self.first = policy, retrieve_once(prompts)

    def session(self) -> AbstractContextManager[None]:
        """The policy's own."""
        return session_of(self.policy)

    def __call__(self, conversations: Sequence[Conversation], /) -> list[Action | None]:
        """The search for conversations that begin, the policy's own action for all others."""
        later = [own for own in conversations if own.turn]
        said: Iterator[str | Action | None] = iter(self.policy(later) if later else ())
        searched = iter(self.first([own for own in conversations if not own.turn]))
        chosen = [next(said) if own.turn else next(searched) for own in conversations]
        return [Action(each) if isinstance(each, str) else each for each in chosen]


def guess(question: str, texts: Sequence[str]) -> str:
    """A short answer to a question from texts, the most trusted first; `unknown` where no rule finds any."""
    if _YES_OR_NO.match(question):
        return "yes"
    if either := _EITHER.search(question):
        return _of_two(either[1], either[2], question, texts)
    if _WHEN.search(question):
        pattern = _YEAR if "year" in question.lower() else _DATE
        return _best(_matches(pattern, question, texts)) or "unknown"
    if _HOW_MANY.search(question):
        return _best(_matches(_NUMBER, question, texts)) or "unknown"
    return _best(_names(question, texts)) or _best(Counter(_NAME.findall(question)[1:])) or "unknown"


def _of_two(first: str, second: str, question: str, texts: Sequence[str]) -> str:
    """The one of two alternatives that is found in the better sentence; the first where neither is."""
    found = dict.fromkeys((first, second), 0)
    for weight, sentence in _sentences(question, texts):
        for name in found:
            if name.lower() in sentence.lower():
                found[name] = max(found[name], weight)
    return max(found, key=lambda name: found[name])


def _words(text: str) -> set[str]:
    return set(normalise_squad(text).split()) - _SMALL


def _sentences(question: str, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Every sentence and its weight: the square of the number of words that it shares with the question."""
    asked = _words(question)
    for text in texts:
        for sentence in _SENTENCE.split(text):
            if shared := len(asked & _words(sentence)):
                yield shared**2, sentence


def _matches(pattern: re.Pattern[str], question: str, texts: Sequence[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for weight, sentence in _sentences(question, texts):
        for match in set(pattern.findall(sentence)):
            if match not in question:
                found[match] += weight
    return found


def _names(question: str, texts: Sequence[str]) -> Counter[str]:
    """Names in the texts that bring a word that the question has not, with their weights."""
    asked = _words(question)
    found = _matches(_NAME, question, texts)
    return Counter({name: weight for name, weight in found.items() if len(name) > 2 and _words(name) - asked})


def _best(found: Counter[str]) -> str:
    """The heaviest; of equals the first in the alphabet, so that no order of sets decides."""
    return min(found, key=lambda name: (-found[name], name), default="")
