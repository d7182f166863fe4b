"""Question sets, from their releases to our own format: streamed, resumable, without duplicates, divided."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from agentgym_ig.data.content import check_parts, part_of, question_key, rank
from agentgym_ig.data.jsonl import json_line
from agentgym_ig.data.layouts import LAYOUTS, Found, Row, check_fields, recognise, split_name
from agentgym_ig.data.manifest import begin_manifest, finished, hand_over, plan_of, read_manifest, write_manifest
from agentgym_ig.data.passages import unquote
from agentgym_ig.data.releases import TRIVIAQA, find_dataset
from agentgym_ig.data.reliability import unreliable
from agentgym_ig.data.seen import Digests
from agentgym_ig.data.sources import Source
from agentgym_ig.data.work import KEPT, How, Work, make_rows, working, write_lines
from agentgym_ig.errors import CorpusError

ENDINGS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to keep of a question set, and how to divide it."""

    split: str | None = None
    """Leave out rows that say they are of another split."""
    subset: int | None = None
    """So many questions of each file: those with the smallest hashes of seed and question."""
    seed: int = 0
    """For parts and subsets."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Name → share; each becomes a file of its own."""
    drop_unreliable: bool = False
    """Leave out what `reliability` describes."""
    keep_duplicates: bool = False
    """Keep questions that stood before with the same answers."""

    def __post_init__(self) -> None:
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"a subset of {self.subset} questions is none; give 1 or more")
        check_parts(self.parts)


def outputs(dataset: str, out: Path, parts: Mapping[str, float]) -> dict[str | None, Path]:
    """Part → the file that will hold it; None stands for the whole.

    `out` is a file (.jsonl or .jsonl.gz) or a folder, in which files are named after the dataset, as the other commands
    look for them; with parts it is a folder and each part has one of its own.
    """
    is_file = out.name.endswith(ENDINGS) and not out.is_dir()
    if parts and is_file:
        raise ValueError(f"--out {out} is one file, but parts become several; give a folder")
    if parts:
        return {part: out / part / f"{dataset}.jsonl" for part in parts}
    return {None: out if is_file else out / f"{dataset}.jsonl"}


def prepare_questions(
    dataset: str, source: Source, out: Path, settings: Settings, how: How | None = None
) -> dict[Path, dict[str, Any]]:
    """Write the questions of a source in our own format, with a manifest beside each file. Returns file → manifest.

    Raises CorpusError with the place of a row that cannot be used, or when no question is left; ValueError for names
    that do not exist; FileExistsError for what would be written over.
    """
    how, files = how or How(), outputs(dataset, out, settings.parts)
    place = out / dataset if settings.parts else files[None]
    found = begin_manifest("questions", source, asdict(settings)) | {"dataset": dataset}
    finals = list(files.values())
    if how.resume and (made := finished(place, finals, found)):
        return made
    with working(place, finals, plan_of(found), how) as work:
        if work.handed_over:
            return {path: read_manifest(path) for path in finals}
        questions = Questions(dataset, source, settings, work)
        make_rows(work, source.rows, questions.make, how)
        if not work.counts[KEPT]:
            raise CorpusError(f"no question of {dataset} is left: {questions.why_none()}")
        if settings.parts or settings.subset:
            return _divide(work, files, found, settings)
        return {finals[0]: hand_over(work, finals[0], found)}


class Questions:
    """Rows of a source to lines of ours; knows what it has seen, also of a run before this one."""

    def __init__(self, dataset: str, source: Source, settings: Settings, work: Work) -> None:
        self.dataset, self.source, self.settings, self.work = dataset, source, settings, work
        self.mixed = find_dataset(dataset).mixed
        self._seen, self._ids = Digests(), Digests()
        self._others: set[str] = set()
        for line in work.lines():
            row = orjson.loads(line)
            self._seen.add(question_key(row["question"], row["answers"]))
            self._ids.add(_digest(row["id"]))

    def make(self, row: Row) -> list[bytes]:
        """The line of a row, or nothing for one that is left out, which is counted."""
        found = self._read(row)
        why = self._why_not(found)
        key = question_key(found.question, found.answers)
        if why is None and key in self._seen and not self.settings.keep_duplicates:
            why = "duplicate"
        if why is not None:
            self.work.counts[why] += 1
            return []
        self._seen.add(key)
        made = found.as_row(self.source.name if self.mixed else self.dataset, self.source.split)
        made["id"] = self._own_id(made["id"], made["dataset"], key)
        return [json_line(made)]

    def why_none(self) -> str:
        """What became of the rows, for an error."""
        counts = {name: number for name, number in self.work.counts.items() if number}
        others = f"; its rows are of {', '.join(sorted(self._others))}" if self._others else ""
        return f"{self.work.read} rows read, left out: {counts or 'none'}{others}"

    def _read(self, row: Row) -> Found:
        layout = self.work.notes.get("layout") or self.source.layout
        if layout is None:
            layout = recognise(row)
        elif layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; choose {', '.join(LAYOUTS)}")
        self.work.notes["layout"] = layout
        check_fields(layout, row)
        found = LAYOUTS[layout].read(row)
        if TRIVIAQA in (found.dataset, self.dataset):
            found.question = unquote(found.question)
        return found

    def _why_not(self, found: Found) -> str | None:
        if not self.mixed and found.dataset not in (None, self.dataset):
            self._others.add(str(found.dataset))
            return "other_dataset"
        if self.settings.split and found.split and split_name(found.split) != self.settings.split:
            return "other_split"
        if self.settings.drop_unreliable:
            return unreliable(found)
        if not found.question:
            raise ValueError(f"question {found.id!r} has no text; --drop-unreliable leaves such rows out")
        if not found.answers:
            raise ValueError(
                f"question {found.id!r} has no answer; --drop-unreliable leaves such rows out (several test splits "
                "are published without answers: take dev)"
            )
        return None

    def _own_id(self, given: str | None, dataset: str, key: bytes) -> str:
        """The row's id, or one made of its content where it has none or another question has it already."""
        own = given or f"{dataset}_{key.hex()[:16]}"
        if _digest(own) in self._ids:
            own = f"{own}_{key.hex()[:16]}"
        while _digest(own) in self._ids:  # only where duplicates are kept
            own += "+"
        self._ids.add(_digest(own))
        return own


def _digest(name: str) -> bytes:
    return blake2b(name.encode("utf-8", "replace"), digest_size=16).digest()


def _divide(
    work: Work, files: Mapping[str | None, Path], found: dict[str, Any], settings: Settings
) -> dict[Path, dict[str, Any]]:
    chosen = _smallest(work, settings) if settings.subset else None
    made = {}
    for part, path in files.items():
        own = (line for number, line, at in _placed(work, settings) if at == part and (not chosen or number in chosen))
        made[path] = write_manifest(path, found | {"part": part}, work, write_lines(path, own))
    return made


def _placed(work: Work, settings: Settings) -> Iterator[tuple[int, bytes, str | None]]:
    """Number, line and part of every question; the part is "" for what falls into none."""
    for number, line in enumerate(work.lines()):
        if settings.parts:
            yield number, line, part_of(orjson.loads(line)["question"], settings.parts, settings.seed) or ""
        else:
            yield number, line, None


def _smallest(work: Work, settings: Settings) -> set[int]:
    """Numbers of the lines of each part's subset."""
    kept: dict[str | None, list[tuple[int, bytes, int]]] = defaultdict(list)
    for number, line, part in _placed(work, settings):
        row = orjson.loads(line)
        key = bytes(255 - byte for byte in question_key(row["question"], row["answers"]))
        entry = (-rank("subset", settings.seed, row["question"]), key, number)  # the largest hash is the first to go
        push = heapq.heappush if len(kept[part]) < int(settings.subset or 0) else heapq.heappushpop
        push(kept[part], entry)
    return {number for entries in kept.values() for _, _, number in entries}
