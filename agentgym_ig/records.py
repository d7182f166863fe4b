"""Trajectories as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentgym_ig.types import Action, Question, Stop, Trajectory, Turn


def to_json(episode: Trajectory) -> dict[str, Any]:
    """All of a trajectory in plain JSON types."""
    return asdict(episode)


def from_json(row: dict[str, Any]) -> Trajectory:
    """The trajectory that `to_json` was given."""
    question = row["question"] | {name: tuple(row["question"][name]) for name in ("answers", "supporting")}
    turns = [
        Turn(
            Action(turn["action"]["text"], tuple(turn["action"]["token_ids"]), tuple(turn["action"]["logprobs"])),
            turn["observation"],
            turn["rewards"],
            tuple(turn["retrieved"]),
        )
        for turn in row["turns"]
    ]
    own = {
        "question": Question(**question),
        "turns": tuple(turns),
        "stop": Stop(row["stop"]),
        "belief": tuple(row["belief"]),
    }
    return Trajectory(**(row | own))


def write_episodes(path: Path, episodes: Iterable[Trajectory]) -> None:
    """One trajectory a line; the file appears only when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8", errors="replace") as lines:
        for episode in episodes:
            lines.write(json.dumps(to_json(episode), ensure_ascii=False) + "\n")
    partial.replace(path)


def read_episodes(path: Path) -> list[Trajectory]:
    """The trajectories that `write_episodes` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [from_json(json.loads(line)) for line in lines]


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears only when it is whole, and then outlives a loss of power."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    """A JSON file that appears only when it is whole."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
