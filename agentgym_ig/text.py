"""The `tags` action grammar (after Search-R1, arXiv 2503.09516), rendered and parsed in one place.

A turn is optional `<think>` blocks followed by exactly one `<search>query</search>` or `<answer>text</answer>`.
The environment replies inside `<information>`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from agentgym_ig.types import Passage

STOP_STRINGS = ("</search>", "</answer>")
"""A policy has finished its turn when it has written one of these."""

_CONTROL = r"</?(?:think|search|information|answer)>"
_THOUGHTS = re.compile(r"\s*(?:<think>(?:(?!" + _CONTROL + r").)*</think>\s*)*", re.DOTALL)
_BLOCK = re.compile(r"<(search|answer)>((?:(?!" + _CONTROL + r").)*)</\1>\s*", re.DOTALL)
_TAG_OPENS = re.compile(r"<(?=[/|!?_a-zA-Z])|\[(?=/?INST\])")
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})


@dataclass(frozen=True, slots=True)
class Search:
    """The agent wants to see what these queries find."""

    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The agent gives its final answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """The action follows no rule of the grammar; `fault` says which one it breaks."""

    fault: str


Parsed = Search | Answer | Malformed


def parse_action(text: str) -> Parsed:
    """Read one action. Never raises on a string, whatever it contains; takes time linear in its length."""
    thoughts = _THOUGHTS.match(text)
    start = thoughts.end() if thoughts else 0
    block = _BLOCK.fullmatch(text, start)
    if block is None:
        return Malformed(
            "wanted one <search>query</search> or <answer>text</answer> at the end, after any <think> blocks"
        )
    kind, content = block.group(1), block.group(2).strip()
    if not content:
        return Malformed(f"<{kind}> is empty")
    return Search((content,)) if kind == "search" else Answer(content)


def neutralise(text: str) -> str:
    """Foreign text in a form that can be mistaken neither for a control tag nor for a chat-template token.

    `<` where a tag could begin becomes `‹`; invisible, bidirectional and control characters go, line breaks
    and tabs become spaces.
    """
    visible = "".join(kept for character in text if (kept := _visible(character)))
    return _TAG_OPENS.sub(lambda found: "‹" if found.group() == "<" else "⁅", visible)


@cache
def _visible(character: str) -> str:
    if character.isspace():
        return " "
    return "" if unicodedata.category(character) in _INVISIBLE else character


@dataclass(frozen=True, slots=True)
class Prompt:
    """How an episode reads: all texts that the environment writes, as data.

    question: the first message; `{question}` and `{max_turns}` are filled in.
    passage: one passage of a reply; `{rank}`, `{title}` and `{text}` are filled in.
    reply: what surrounds the passages, `{passages}`; nothing_found and malformed stand in their place.
    answer_prefix, answer_suffix: what is put around the gold answer when its likelihood is read
    (methods: IGPO, arXiv 2510.14967); only the answer between them is scored.
    """

    question: str
    passage: str
    reply: str
    nothing_found: str
    malformed: str
    answer_prefix: str
    answer_suffix: str

    def render_question(self, question: str, max_turns: int) -> str:
        """The first message of an episode."""
        return self.question.format(question=neutralise(question), max_turns=max_turns)

    def render_passages(self, passages: Sequence[Passage]) -> str:
        """The reply to a search."""
        shown = [
            self.passage.format(rank=rank, title=neutralise(passage.title), text=neutralise(passage.text))
            for rank, passage in enumerate(passages, 1)
        ]
        return self.reply.format(passages="\n".join(shown) if shown else self.nothing_found)

    def render_malformed(self, fault: str) -> str:
        """The reply to an action that follows no rule."""
        return self.reply.format(passages=self.malformed.format(fault=neutralise(fault)))


PROMPTS = {
    "search-r1": Prompt(
        question=(
            "Answer the question below. You can look things up in an encyclopedia as often as you need, in at most"
            " {max_turns} turns. In every turn, first reason inside <think> and </think>. Then do one of two things:"
            " write a search query inside <search> and </search>, and the best passages come back between"
            " <information> and </information>; or, once you know enough, write the answer, as short as possible and"
            " without explanation, inside <answer> and </answer>. For example: <answer>Marie Curie</answer>.\n"
            "Question: {question}\n"
        ),
        passage="[{rank}] {title}: {text}",
        reply="\n\n<information>\n{passages}\n</information>\n\n",
        nothing_found="No passage matches this query.",
        malformed="This turn could not be read: {fault}.",
        answer_prefix="<think>I have found what I need.</think>\n<answer>",
        answer_suffix="</answer>",
    ),
    "tinywiki": Prompt(
        question="{question}",
        passage="{text}",
        reply="<information>{passages}</information>",
        nothing_found="nothing",
        malformed="nothing",
        answer_prefix="<answer>",
        answer_suffix="</answer>",
    ),
}
"""Prompts by name."""
