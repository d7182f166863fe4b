"""An episode drawn for a terminal, while it goes on or from its record."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from io import StringIO

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agentgym_ig.answers import score
from agentgym_ig.envs.episode import Episode
from agentgym_ig.grammar import GRAMMARS, Answer, Grammar, Search
from agentgym_ig.text import neutralise
from agentgym_ig.types import Message, Trajectory, Turn

WIDTH = 100
BAR = 12
"""Characters of the longest bar of information gain."""

_THOUGHT = re.compile(r"<(think|guide)>(.*?)</\1>", re.DOTALL)
_FRAME = re.compile(r"</?(?:information|tool_response)>")
_STYLES = {"think": "dim italic", "guide": "magenta", "search": "bold cyan", "answer": "bold green", "unread": "red"}
_FOUND = "black on yellow"


def draw(episode: Episode | None) -> str:
    """The question, every turn with what it found, and how it ended, with terminal colours."""
    out = StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=True, color_system="standard", highlight=False)
    if episode is None:
        console.print(Text("no episode has begun; call reset()", style="dim"))
        return out.getvalue()
    rows = _grid(episode.question.text)
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


def recorded(episode: Trajectory) -> Table:
    """A recorded episode for a rich console: also its gold answers, the verdict, and every turn's channels.

    The gold answers are marked in the replies, supporting passages are labelled, and information gain is a bar.
    """
    grammar = GRAMMARS[episode.grammar]
    answers = [neutralise(answer) for answer in episode.question.answers]
    rows = _grid(episode.question.text)
    rows.add_row("id", Text(neutralise(f"{episode.question.dataset}/{episode.question.id}"), style="dim"))
    rows.add_row("gold", Text(" | ".join(answers), style="green"))
    gains = [abs(value) for value in episode.channel("info_gain") if value is not None and math.isfinite(value)]
    for number, turn in enumerate(episode.turns, 1):
        rows.add_row("", Rule(f"turn {number} of {len(episode.turns)}", align="left", style="dim"))
        for label, text in _lines(Message("assistant", turn.action.text), grammar):
            rows.add_row(label, Text(text, style=_STYLES.get(label, "")))
        for label, text in _reply(turn, episode.question.supporting):
            shown = Text(text)
            shown.highlight_words([answer for answer in answers if len(answer) > 3], _FOUND, case_sensitive=False)
            rows.add_row(label, shown)
        rows.add_row("", _channels(turn, max(gains, default=0.0) or 1.0))
    rows.add_row("", Rule(f"{episode.stop.value} after {len(episode.turns)}", align="left", style="dim"))
    rows.add_row(*_verdict(episode))
    return rows


def _grid(question: str) -> Table:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", width=8, justify="right")
    rows.add_column(overflow="fold")
    rows.add_row("question", Text(neutralise(question), style="bold"))
    return rows


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


def _reply(turn: Turn, supporting: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The lines of a reply; those that are supporting passages are labelled where lines and passages agree."""
    lines = [text for _, text in _lines(Message("tool", turn.observation), GRAMMARS["tags"])]
    names = turn.retrieved if len(lines) == len(turn.retrieved) else [""] * len(lines)
    yield from (("support" if name in supporting else "", line) for name, line in zip(names, lines, strict=True))


def _channels(turn: Turn, largest: float) -> Text:
    shown = Text(style="dim")
    for name, value in turn.rewards.items():
        shown.append(f"{neutralise(name)} {value:+.2f}  ")
        if name == "info_gain":
            length = round(BAR * min(abs(value) / largest, 1.0)) if math.isfinite(value) else 0
            shown.append("█" * length + "  ", style="green" if value > 0 else "red")
    return shown


def _verdict(episode: Trajectory) -> tuple[str, Text]:
    em, f1 = (score(metric, episode.answer, episode.question.answers) for metric in ("em", "f1"))
    if episode.stop.failed:
        return "failed", Text(neutralise(episode.error or ""), style="yellow")
    said = neutralise(episode.answer) if episode.answer is not None else "no answer"
    return ("won" if em else "lost"), Text(f"{said} (F1 {100 * f1:.0f})", style="bold green" if em else "bold red")
