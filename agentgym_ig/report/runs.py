"""What a report is made of: the evaluations and training runs found in folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentgym_ig.errors import CorpusError
from agentgym_ig.records import EPISODES_FILE, EVALUATION_FILE, METRICS_FILE, from_json
from agentgym_ig.types import Trajectory

_NOT_RUNS = {"checkpoints", "model", "worlds", "trackers", "wandb", "warm_start", "index"}
"""Folders that hold no runs, and may hold much else."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation folder: its figures, and where its episodes are."""

    folder: Path
    label: str
    figures: dict[str, Any]

    def episodes(self) -> Iterator[Trajectory]:
        """Its episodes, as they ended; none where the file is missing. See `read_lines` for errors."""
        path = self.folder / EPISODES_FILE
        return read_lines(path) if path.is_file() else iter(())


@dataclass(frozen=True)
class Trained:
    """A training run's folder and its metrics, a row a step."""

    folder: Path
    label: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """All that one page shows."""

    names: list[str]
    """Of the folders that were asked for."""
    evaluations: list[Evaluated]
    trainings: list[Trained]

    @property
    def stamp(self) -> list[tuple[str, int, int]]:
        """Something that differs once a file of these runs has changed: (path, nanoseconds, bytes) of each."""
        files = [own.folder / name for own in self.evaluations for name in (EVALUATION_FILE, EPISODES_FILE)]
        files += [own.folder / METRICS_FILE for own in self.trainings]
        return [(str(own), own.stat().st_mtime_ns, own.stat().st_size) for own in files if own.is_file()]

    @property
    def suite(self) -> str | None:
        """The suite of the evaluations; None where there are none."""
        return self.evaluations[0].figures["suite"] if self.evaluations else None

    @property
    def domains(self) -> dict[str, str]:
        """Dataset → domain, in the order of the figures."""
        found: dict[str, str] = {}
        for evaluation in self.evaluations:
            found |= {name: row.get("domain", "") for name, row in evaluation.figures["datasets"].items()}
        return found


def read_lines(path: Path) -> Iterator[Trajectory]:
    """The episodes of a file, one after another; a last line that is still being written is left out.

    Raises CorpusError, naming file and line, for any other line that is no episode.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CorpusError(f"{path}:{number} is no episode ({error!r}); play it again with --resume") from error


def find_runs(folders: Sequence[Path]) -> Found:
    """The evaluations and training runs in folders and in the folders below them.

    Raises FileNotFoundError for a folder without any, and ValueError for a damaged file and for evaluations of
    different suites, which cannot stand in one table.
    """
    evaluations: list[Path] = []
    trainings: list[Path] = []
    asked = list(dict.fromkeys(Path(own).resolve() for own in folders))
    for folder in asked:
        holding = list(_holding(folder))
        if not holding:
            raise FileNotFoundError(_nothing_in(folder))
        evaluations += [own for own in holding if (own / EVALUATION_FILE).is_file()]
        trainings += [own for own in holding if (own / METRICS_FILE).is_file()]
    evaluations, trainings = list(dict.fromkeys(evaluations)), list(dict.fromkeys(trainings))
    labels = _labels([*evaluations, *trainings])
    found = Found(
        [own.name for own in asked],
        [Evaluated(own, labels[own], _figures(own / EVALUATION_FILE)) for own in evaluations],
        [Trained(own, labels[own], _rows(own / METRICS_FILE)) for own in trainings],
    )
    suites = {own.figures["suite"]: own.folder for own in found.evaluations}
    if len(suites) > 1:
        named = " and ".join(f"{folder} is of suite {suite}" for suite, folder in suites.items())
        raise ValueError(f"{named}; their figures cannot be compared: give runs of one suite")
    return found


def _nothing_in(folder: Path) -> str:
    wanted = "wanted a folder that `agentgym-ig eval`, `train` or `quickstart` wrote with --out"
    if not folder.exists():
        return f"there is no folder {folder}; {wanted}"
    if not folder.is_dir():
        return f"{folder} is a file; {wanted}"
    return f"{folder} holds neither {EVALUATION_FILE} nor {METRICS_FILE}; {wanted}"


def _holding(folder: Path) -> Iterator[Path]:
    """The folders, from this one down, that hold an evaluation or a training run."""
    for path, below, files in os.walk(folder):
        below[:] = sorted((name for name in below if name not in _NOT_RUNS and name[0] != "."), key=_natural)
        if EVALUATION_FILE in files or METRICS_FILE in files:
            yield Path(path)


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key under which step-9 comes before step-10."""
    pieces = "".join(c if c.isdigit() else f" {c} " for c in name).split()
    return [(int(piece), "") if piece.isascii() and piece.isdigit() else (-1, piece) for piece in pieces]


def _labels(folders: Sequence[Path]) -> dict[Path, str]:
    """Folder → the part of its path that tells it from the others."""
    shared = Path(os.path.commonpath(folders))
    return {own: own.relative_to(shared).as_posix() if own != shared else own.name for own in folders}


def _figures(path: Path) -> dict[str, Any]:
    """The content of an evaluation.json. Raises ValueError where it is something else."""
    wanted = "wanted the file that `agentgym-ig eval --out FOLDER` writes; evaluate again into a new folder"
    try:
        found: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); {wanted}") from error
    figures: dict[str, Any] = found if isinstance(found, dict) else {}
    rows = figures.get("datasets")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{path} has no figures by dataset; {wanted}")
    if figures.get("format", 1) != 1:
        raise ValueError(f"{path} is of format {figures['format']!r}, this version reads 1; {wanted}")
    if not isinstance(figures.get("suite"), str):
        raise ValueError(f"{path} does not say of which suite it is; {wanted}")
    return figures


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that is still being written is left out. Raises ValueError."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no JSON ({error}); resume the training to mend it") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is {type(row).__name__}, wanted an object of metrics")
        rows.append(row)
    return rows
