"""An episode drawn for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agentgym_ig.envs.episode import Episode
from agentgym_ig.grammar import GRAMMARS, Answer, Grammar, Search
from agentgym_ig.text import neutralise
from agentgym_ig.types import Message

WIDTH = 100
_THOUGHT = re.compile(r"<(think|guide)>(.*?)</\1>", re.DOTALL)
_FRAME = re.compile(r"</?information>")
_STYLES = {"think": "dim italic", "guide": "magenta", "search": "bold cyan", "answer": "bold green", "unread": "red"}


def draw(episode: Episode | None) -> str:
    """The question, every turn with what it found, and how it ended, with terminal colours."""
    out = StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=True, color_system="standard", highlight=False)
    if episode is None:
        console.print(Text("no episode has begun; call reset()", style="dim"))
        return out.getvalue()
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", width=8, justify="right")
    rows.add_column(overflow="fold")
    rows.add_row("question", Text(neutralise(episode.question.text), style="bold"))
    turn = 0
    for message in episode.conversation.messages[len(episode.opening) :]:
        if message.role == "assistant":
            turn += 1
            rows.add_row("", Rule(f"turn {turn} of {episode.rules.max_turns}", align="left", style="dim"))
        for label, text in _lines(message, GRAMMARS[episode.conversation.grammar]):
            rows.add_row(label, Text(text, style=_STYLES.get(label, "")))
    if episode.stop is not None:
        rows.add_row("", Rule(f"{episode.stop.value} after {episode.turn}", align="left", style="dim"))
    console.print(rows)
    return out.getvalue()


def _lines(message: Message, grammar: Grammar) -> Iterator[tuple[str, str]]:
    """(label, text) of each line of a message, with nothing in it that a terminal would obey."""
    if message.role == "tool":
        yield from (("", neutralise(line)) for line in _FRAME.sub("", message.text).strip().splitlines())
        return
    action = grammar.parse(message.text)
    if not isinstance(action, Search | Answer):
        yield "unread", neutralise(message.text)
        return
    yield from ((name, neutralise(content.strip())) for name, content in _THOUGHT.findall(message.text))
    if isinstance(action, Search):
        yield from (("search", neutralise(query)) for query in action.queries)
    else:
        yield "answer", neutralise(action.text)
