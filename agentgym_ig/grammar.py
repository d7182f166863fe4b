"""The two action grammars, written and parsed in one place.

`tags` (after Search-R1, arXiv 2503.09516) and `tools` (function calls in the form of Qwen and Hermes, as
DeepResearcher, arXiv 2504.03160, and IGPO use them). In both, an action is any number of `<think>` and `<guide>`
blocks and then either searches or answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import orjson

MAX_QUERIES = 3
"""Queries that one action of the `tools` grammar may hold, as in DeepResearcher."""

MAX_CHARACTERS = 10_000
"""Of a query. Passages have less than a thousand, and servers refuse requests without bounds."""


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


def _searched(queries: Sequence[str]) -> Search | Malformed:
    longest = max(map(len, queries))
    if longest > MAX_CHARACTERS:
        return Malformed(f"a query has {longest} characters; at most {MAX_CHARACTERS}")
    return Search(tuple(queries))


class Grammar(Protocol):
    """How an action is written and read."""

    name: ClassVar[str]
    stop_strings: ClassVar[tuple[str, ...]]
    """A policy has finished its turn when it has written one of these."""
    one_message: ClassVar[bool]
    """Whether the whole episode is one assistant message of the chat template, replies included."""

    def parse(self, text: str) -> Parsed:
        """Read one action. Never raises on a string, whatever it contains; takes time linear in its length."""
        ...

    def search(self, *queries: str) -> str:
        """The action that searches. Raises ValueError for more queries than one action may hold, and for none."""
        ...

    def answer(self, text: str) -> str:
        """The action that answers."""
        ...


_THOUGHTS = ("think", "guide")


def _control(*names: str) -> re.Pattern[str]:
    return re.compile(rf"</?(?:{'|'.join(names)})>")


_TAGS = _control(*_THOUGHTS, "search", "answer", "information")
_TOOLS = _control(*_THOUGHTS, "tool_call", "answer", "tool_response")


def blocks(text: str, control: re.Pattern[str]) -> list[tuple[str, str]] | None:
    """The (name, content) of the blocks that a text is made of; None where it is made of anything else."""
    found: list[tuple[str, str]] = []
    end = 0
    tags = control.finditer(text)
    for opening in tags:
        name, closing = opening.group()[1:-1], next(tags, None)
        if closing is None or closing.group() != f"</{name}>" or text[end : opening.start()].strip():
            return None
        found.append((name, text[opening.end() : closing.start()]))
        end = closing.end()
    return None if text[end:].strip() else found


class Tags:
    """`<search>query</search>` or `<answer>text</answer>`; replies come inside `<information>`."""

    name: ClassVar[str] = "tags"
    stop_strings: ClassVar[tuple[str, ...]] = ("</search>", "</answer>")
    one_message: ClassVar[bool] = True

    def parse(self, text: str) -> Parsed:
        """See `Grammar.parse`."""
        found = blocks(text, _TAGS)
        if not found or found[-1][0] in _THOUGHTS or any(name not in _THOUGHTS for name, _ in found[:-1]):
            return Malformed(
                "wanted one <search>query</search> or <answer>text</answer> at the end, after any <think> blocks"
            )
        name, content = found[-1]
        if name == "information":
            return Malformed("<information> is written by the environment alone")
        if not content.strip():
            return Malformed(f"<{name}> is empty")
        return _searched([content.strip()]) if name == "search" else Answer(content.strip())

    def search(self, *queries: str) -> str:
        """See `Grammar.search`. A query that holds a tag of the grammar cannot be read again."""
        if len(queries) != 1:
            raise ValueError(f"{len(queries)} queries; an action of the tags grammar holds one")
        return f"<search>{queries[0]}</search>"

    def answer(self, text: str) -> str:
        """See `Grammar.answer`."""
        return f"<answer>{text}</answer>"


class Tools:
    """`<tool_call>{"name": "search", "arguments": {"query": [...]}}</tool_call>` or `<answer>text</answer>`.

    A call holds one to three queries, as a list or a single string; several calls may follow each other if they
    hold no more than three queries together. Replies come as messages of the role `tool`.
    """

    name: ClassVar[str] = "tools"
    stop_strings: ClassVar[tuple[str, ...]] = ("</tool_call>", "</answer>")
    one_message: ClassVar[bool] = False
    tool = "search"

    def parse(self, text: str) -> Parsed:
        """See `Grammar.parse`."""
        found = blocks(text, _TOOLS)
        acts = [block for block in found or () if block[0] not in _THOUGHTS]
        names = {name for name, _ in acts}
        if not found or not acts or found[-len(acts) :] != acts or not (names == {"tool_call"} or len(acts) == 1):
            return Malformed("wanted <tool_call> or one <answer>text</answer> at the end, after any <think> blocks")
        if names == {"answer"}:
            answer = acts[0][1].strip()
            return Answer(answer) if answer else Malformed("<answer> is empty")
        if names != {"tool_call"}:
            return Malformed("<tool_response> is written by the environment alone")
        return self._searches([content for _, content in acts])

    def _searches(self, calls: list[str]) -> Parsed:
        queries: list[str] = []
        for call in calls:
            own = self._queries(call)
            if isinstance(own, Malformed):
                return own
            queries += own
        if len(queries) > MAX_QUERIES:
            return Malformed(f"{len(queries)} queries in one turn; at most {MAX_QUERIES}")
        return _searched(queries)

    def _queries(self, call: str) -> list[str] | Malformed:
        try:
            asked: Any = orjson.loads(call)
        except ValueError:
            return Malformed("the tool call is no JSON")
        if not isinstance(asked, dict) or set(asked) != {"name", "arguments"}:
            return Malformed('a tool call is {"name": ..., "arguments": {...}}')
        if asked["name"] != self.tool:
            return Malformed(f"the only tool is {self.tool}")
        if not isinstance(asked["arguments"], dict) or set(asked["arguments"]) != {"query"}:
            return Malformed(f"{self.tool} takes the argument query and no other")
        wanted = asked["arguments"]["query"]
        queries = [wanted] if isinstance(wanted, str) else wanted
        if not isinstance(queries, list) or not queries or not all(isinstance(q, str) and q.strip() for q in queries):
            return Malformed("query is a list of strings that are not empty")
        return [query.strip() for query in queries]

    def search(self, *queries: str) -> str:
        """See `Grammar.search`."""
        if not 1 <= len(queries) <= MAX_QUERIES:
            raise ValueError(f"{len(queries)} queries; an action of the tools grammar holds one to {MAX_QUERIES}")
        call = json.dumps({"name": self.tool, "arguments": {"query": queries}}, ensure_ascii=False)
        escaped = call.replace("<", "\\u003c")  # so that a query may quote a tag
        return f"<tool_call>\n{escaped}\n</tool_call>"

    def answer(self, text: str) -> str:
        """See `Grammar.answer`."""
        return f"<answer>{text}</answer>"


GRAMMARS: dict[str, Grammar] = {"tags": Tags(), "tools": Tools()}
"""Grammars by name."""
