"""Trajectories as JSON lines."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from agentgym_ig.errors import CorpusError
from agentgym_ig.types import Action, Message, Question, Stop, Trajectory, Turn

EVALUATION_FILE, EPISODES_FILE = "evaluation.json", "episodes.jsonl"
"""What the folder of an evaluation holds: its figures, and its episodes."""
METRICS_FILE = "metrics.jsonl"
"""What the folder of a training run holds: a line for every step."""


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
            tuple(turn["queries"]),
            tuple(turn["retrieved"]),
        )
        for turn in row["turns"]
    ]
    own = {
        "question": Question(**question),
        "opening": tuple(Message(**message) for message in row["opening"]),
        "turns": tuple(turns),
        "stop": Stop(row["stop"]),
        "belief": tuple(row["belief"]),
    }
    return Trajectory(**(row | own))


def _line(episode: Trajectory) -> bytes:
    row = to_json(episode)
    try:
        return json.dumps(row, ensure_ascii=False, default=plain_number).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold and UTF-8 cannot
        return json.dumps(row, default=plain_number).encode() + b"\n"


def plain_number(value: Any) -> Any:
    """A number of NumPy's as one of Python's."""
    return value.item()


def write_episodes(path: Path, episodes: Iterable[Trajectory]) -> None:
    """One trajectory a line; the file appears only when it is whole."""
    write_whole(path, b"".join(map(_line, episodes)))


def read_episodes(path: Path) -> list[Trajectory]:
    """The trajectories of a file. Raises CorpusError, naming file and line, for a line that is none."""
    with path.open("rb") as lines:
        return _read(path, lines)


def _read(path: Path, lines: Iterable[bytes]) -> list[Trajectory]:
    episodes: list[Trajectory] = []
    for number, line in enumerate(lines, 1):
        try:
            episodes.append(from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{path}:{number} is no episode ({error!r}); wanted a line of JSON for each, as `agentgym-ig eval"
                " --out` and rollout(out=...) write them"
            ) from error
    return episodes


_BEGINNING = b'{"question": {"id": '
"""Of every line of an episode."""


class EpisodeLog:
    """A file that episodes are added to as they end, a line each; what was in it when it was opened is in `done`.

    A last line that a crash has cut off is removed. Raises CorpusError for a file of something else, and
    FileExistsError while another process adds to it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._out = path.open("ab")
        try:
            if not locked(self._out):
                raise FileExistsError(f"another process is adding episodes to {path}; wait for it")
            self.done = self._begin(path)
        except BaseException:
            self._out.close()
            raise

    @staticmethod
    def _begin(path: Path) -> list[Trajectory]:
        """What the file holds already."""
        content = path.read_bytes()
        if content:
            whole = content.rfind(b"\n") + 1
            if not _BEGINNING.startswith(content[whole : whole + len(_BEGINNING)]):
                raise CorpusError(f"{path} ends with something that is no episode; give another file")
            done = _read(path, content[:whole].splitlines())
            os.truncate(path, whole)
            return done
        return []

    def add(self, episode: Trajectory) -> None:
        """Write an episode; a crash of this process after that does not lose it."""
        self._out.write(_line(episode))
        self._out.flush()

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def forget_failed(path: Path) -> int:
    """Take the episodes out of a file that ended through no fault of the agent, to play them again; says how many."""
    if not path.is_file():
        return 0
    log = EpisodeLog(path)
    log.close()
    kept = [episode for episode in log.done if not episode.stop.failed]
    if len(kept) < len(log.done):
        write_episodes(path, kept)
    return len(log.done) - len(kept)


def locked(file: IO[Any]) -> bool:
    """Lock an open file for this process, until it is closed; False where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears only when it is whole, and then outlives a loss of power."""
    partial = path.with_name(f".{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    """A JSON file that appears only when it is whole. Lone surrogates become question marks."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))
