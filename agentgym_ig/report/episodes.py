"""Episodes packed for a page: a light table of all of them, and compressed blocks that are opened on demand."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentgym_ig.answers import score
from agentgym_ig.grammar import GRAMMARS, Malformed
from agentgym_ig.types import Question, Stop, Trajectory, Turn

BLOCK = 100
"""Episodes in one compressed block."""
SHARED_BLOCK = 200
"""Texts in one block of those that several blocks of episodes need."""

_BEFORE = re.compile(r"\n*(?:<(?:information|tool_response)>)?\n*")
_AFTER = ("</information>", "</tool_response>")
_BLOCKS = re.compile(r"<(think|guide|search|answer|tool_call)>(.*?)</\1>", re.S)


@dataclass
class Packed:
    """What the page's script reads. `table` goes in as it is, `episodes` and `texts` as gzip in base64."""

    table: dict[str, Any]
    episodes: list[str]
    texts: list[str]


@dataclass
class _Questions:
    """Every question once, as columns; runs refer to them by number."""

    numbers: dict[tuple[str, str, str], int] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(
        default_factory=lambda: {"id": [], "dataset": [], "text": [], "answers": [], "supporting": []}
    )

    def number(self, question: Question) -> int:
        key = (question.dataset, question.id, question.text)
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
            row = (question.id, question.dataset, question.text, question.answers, question.supporting)
            for column, value in zip(self.columns.values(), row, strict=True):
                column.append(value)
        return self.numbers[key]


def pack(runs: Iterable[tuple[str, Iterable[Trajectory]]], datasets: Sequence[str]) -> Packed:
    """Pack the episodes of labelled runs; `datasets` gives the order in which they are listed."""
    questions, tables = _Questions(), []
    blocks: list[list[dict[str, Any]]] = []
    rank = {name: number for number, name in enumerate(datasets)}
    for label, episodes in runs:
        rows = []
        for episode in episodes:
            order = (rank.get(episode.question.dataset, len(rank)), episode.group, episode.seed)
            rows.append((order, _row(episode, questions.number(episode.question)), _details(episode)))
        rows.sort(key=lambda row: row[0])
        tables.append({"label": label, "block": len(blocks), **_columns([row for _, row, _ in rows])})
        details = [own for _, _, own in rows]
        blocks += [details[first : first + BLOCK] for first in range(0, len(details), BLOCK)]
    texts = _share(blocks)
    table = {
        "blockSize": BLOCK,
        "textsPerBlock": SHARED_BLOCK,
        "failed": [stop.value for stop in Stop if stop.failed],
        "questions": questions.columns,
        "runs": tables,
    }
    shared = [texts[first : first + SHARED_BLOCK] for first in range(0, len(texts), SHARED_BLOCK)]
    return Packed(table, [_compressed(block) for block in blocks], [_compressed(own) for own in shared])


def to_script(value: object) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element, and it is plain ASCII."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _compressed(value: object) -> str:
    packed = gzip.compress(json.dumps(value, separators=(",", ":"), allow_nan=False).encode(), mtime=0)
    return base64.b64encode(packed).decode()


def _number(value: float | None) -> float | None:
    """Four digits are enough to read, and JSON knows no other numbers than finite ones."""
    return None if value is None or not math.isfinite(value) else round(float(value), 4)


def _row(episode: Trajectory, question: int) -> dict[str, Any]:
    names = {name for turn in episode.turns for name in turn.rewards}
    return {
        "question": question,
        "won": int(score("em", episode.answer, episode.question.answers)),
        "f1": _number(score("f1", episode.answer, episode.question.answers)),
        "turns": len(episode.turns),
        "stop": episode.stop.value,
        "answer": episode.answer,
        "channels": {name: _number(episode.total(name)) for name in names},
    }


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows as columns; of tries at one question, which one each is."""
    tries: dict[int, int] = {}
    for row in rows:
        row["try"] = tries[row["question"]] = tries.get(row["question"], 0) + 1
    plain = ("question", "try", "won", "f1", "turns", "stop", "answer")
    names = sorted({name for row in rows for name in row["channels"]})
    return {
        **{name: [row[name] for row in rows] for name in plain},
        "channels": {name: [row["channels"].get(name) for row in rows] for name in names},
    }


def _details(episode: Trajectory) -> dict[str, Any]:
    details: dict[str, Any] = {
        "opening": [[message.role, message.text] for message in episode.opening],
        "turns": [_turn(turn, episode.grammar) for turn in episode.turns],
        "seed": episode.seed,
    }
    return details | ({"error": episode.error} if episode.error else {})


def _turn(turn: Turn, grammar: str) -> dict[str, Any]:
    """A turn; `pieces` of the action and `texts` of the reply are whole when they are put together again."""
    pieces, fault = split_action(turn.action.text, grammar)
    row: dict[str, Any] = {
        "pieces": pieces,
        "tokens": len(turn.action.token_ids),
        "queries": turn.queries,
        "retrieved": turn.retrieved,
        "rewards": {name: _number(value) for name, value in turn.rewards.items()},
        **split_reply(turn.observation, len(turn.retrieved)),
    }
    return row | ({"fault": fault} if fault else {})


def split_action(text: str, grammar: str) -> tuple[list[tuple[str, str]], str | None]:
    """(kind, text) of the pieces of an action, which together are all of it, and what is wrong with it, if anything.

    A kind is the name of the block whose content the piece is, "" for tags and space between them, or "unread".
    """
    parsed = GRAMMARS[grammar].parse(text) if grammar in GRAMMARS else Malformed(f"unknown grammar {grammar!r}")
    if isinstance(parsed, Malformed):
        return [("unread", text)], parsed.fault
    pieces: list[tuple[str, str]] = []
    end = 0
    for block in _BLOCKS.finditer(text):
        pieces += [("", text[end : block.start(2)]), (block[1], block[2])]
        end = block.end(2)
    return [*pieces, ("", text[end:])], None


def split_reply(observation: str, passages: int) -> dict[str, Any]:
    """A reply as its frame and the text of each of its passages, or as one text where it cannot be taken apart.

    `ranked` says that every text stood behind its rank, as in "[1] ": the same passage has one text at any rank.
    """
    before = _BEFORE.match(observation)
    start = before.end() if before else 0
    inner = observation[start:].rstrip("\n")
    for tag in _AFTER:
        inner = inner.removesuffix(tag).rstrip("\n")
    texts = inner.split("\n")
    if len(texts) != passages:
        return {"reply": observation} if observation else {}
    ranks = [f"[{rank}] " for rank in range(1, passages + 1)]
    ranked = all(text.startswith(rank) for text, rank in zip(texts, ranks, strict=True))
    if ranked:
        texts = [text.removeprefix(rank) for text, rank in zip(texts, ranks, strict=True)]
    return {
        "texts": texts,
        "frame": [observation[:start], observation[start + len(inner) :]],
        **({"ranked": True} if ranked else {}),
    }


def _share(blocks: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Replace passages that more than one block needs by their numbers; return those passages."""
    first: dict[str, int] = {}
    shared: dict[str, int] = {}
    for number, block in enumerate(blocks):
        for text in (text for row in block for turn in row["turns"] for text in turn.get("texts", ())):
            if first.setdefault(text, number) != number:
                shared.setdefault(text, len(shared))
    for block in blocks:
        for turn in (turn for row in block for turn in row["turns"] if "texts" in turn):
            turn["texts"] = [shared.get(text, text) for text in turn["texts"]]
    return list(shared)
