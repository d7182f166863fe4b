"""Writing rows that a killed process can go on with.

    OUT.partial/lock         held by the process that writes
    OUT.partial/plan.json    what is being made, of which files: a resumed run must want the same
    OUT.partial/rows         what was made so far, in whole chunks
    OUT.partial/state.json   how much of the source is in it

A chunk ends after a fixed number of rows of the source, so what comes out does not depend on where a run was
stopped. The rows become OUT, or the parts of it, in one step when all of them are there.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from agentgym_ig.data.jsonl import open_bytes, reason
from agentgym_ig.data.reading import Row, Rows
from agentgym_ig.errors import CorpusError
from agentgym_ig.records import locked, write_json

CHUNK = 20_000
"""Lines packed together, and rows of a source after which the state is written."""

KEPT = "kept"
"""Counts what was made; all other counts are reasons for leaving a row out."""

Progress = Callable[[int, int], None]
"""Called with the rows read and the rows kept so far."""


@dataclass(frozen=True, slots=True)
class How:
    """Whether to go on with what was begun, and whether to write over what is there.

    chunk: rows of the source after which the state is written; a resumed run must have the same.
    """

    resume: bool = False
    force: bool = False
    progress: Progress = lambda read, kept: None
    chunk: int = CHUNK


class Work:
    """The folder of an output that is being made."""

    def __init__(self, folder: Path, packed: bool) -> None:
        self.folder, self._packed = folder, packed
        self.rows = folder / ("rows.jsonl.gz" if packed else "rows.jsonl")
        self._state: dict[str, Any] = {"read": 0, "bytes": 0, "complete": False, "counts": {}, "notes": {}}
        if (folder / "state.json").is_file():
            self._state = json.loads((folder / "state.json").read_bytes())
        self.counts = Counter(self._state["counts"])
        self.notes: dict[str, str] = self._state["notes"]
        if not self.handed_over:
            self._cut()

    def _cut(self) -> None:
        """Remove a chunk of which a crash has left a piece."""
        self.rows.touch()
        if self.rows.stat().st_size < self._state["bytes"]:
            raise ValueError(f"{self.rows} is shorter than it was; give --force to begin anew")
        os.truncate(self.rows, self._state["bytes"])

    @property
    def handed_over(self) -> bool:
        """Whether the rows have become the output already, and only this folder was left when the process ended."""
        return self.complete and not self.rows.exists()

    @property
    def read(self) -> int:
        """Rows of the source that are dealt with."""
        return int(self._state["read"])

    @property
    def complete(self) -> bool:
        """Whether these are all rows of the source."""
        return bool(self._state["complete"])

    def add(self, lines: list[bytes], read: int, complete: bool = False) -> None:
        """Keep what was made of the next rows; a crash after that does not lose it."""
        if lines:
            with self.rows.open("ab") as out:
                out.write(pack(lines, self._packed))
                out.flush()
                os.fsync(out.fileno())
        self._state |= {"read": self.read + read, "bytes": self.rows.stat().st_size, "complete": complete}
        write_json(self.folder / "state.json", self._state | {"counts": self.counts, "notes": self.notes})

    def lines(self) -> Iterator[bytes]:
        """What was made so far, unpacked."""
        with open_bytes(self.rows) as lines:
            yield from lines


def pack(lines: list[bytes], packed: bool) -> bytes:
    """Lines as they stand in a file; the same bytes each time."""
    content = b"".join(lines)
    return gzip.compress(content, 6, mtime=0) if packed else content


def partial_folder(out: Path) -> Path:
    """Where an output lies until it is whole."""
    return out.with_name(f"{out.name}.partial")


@contextmanager
def working(out: Path, finals: Sequence[Path], plan: dict[str, Any], how: How) -> Iterator[Work]:
    """The folder of an unfinished output, new or gone on with; removed when the block ends without an error.

    Raises FileExistsError for what would be written over, and ValueError for work begun in another way.
    """
    folder = partial_folder(out)
    if folder.is_dir() and not how.resume and not how.force:
        raise FileExistsError(
            f"{folder} holds work that was not finished: --resume goes on with it, --force begins anew"
        )
    if folder.is_dir() and not how.resume:
        shutil.rmtree(folder)
    existing = ", ".join(str(path) for path in finals if path.exists())
    if existing and not how.force and not folder.is_dir():
        raise FileExistsError(f"{existing} is there already; --force writes over it")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if not locked(lock):
            raise FileExistsError(f"another process is writing {out}; wait for it, or end it")
        _check_plan(folder, plan | {"chunk": how.chunk})
        work = Work(folder, out.name.endswith(".gz"))
        try:
            yield work
        except BaseException:
            if not work.read or not work.counts[KEPT]:
                shutil.rmtree(folder)  # nothing to go on with
            raise
    work.rows.unlink(missing_ok=True)
    for name in ("lock", "plan.json", "state.json"):  # the state last: it says that there is nothing left to do
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _check_plan(folder: Path, wanted: dict[str, Any]) -> None:
    path, plan = folder / "plan.json", json.loads(json.dumps(wanted))
    begun = json.loads(path.read_bytes()) if path.is_file() else plan
    differing = {name: begun.get(name) for name in plan if begun.get(name) != plan[name]}
    if differing:
        was = ", ".join(f"{name} was {value!r}" for name, value in differing.items())
        raise ValueError(f"{folder} was begun in another way ({was}); give the same again, or --force to begin anew")
    write_json(path, plan)


def make_rows(work: Work, rows: Callable[[int], Rows], make: Callable[[Row], list[bytes]], how: How) -> None:
    """Every row that is still to be read through `make`, in chunks.

    Raises CorpusError with the place of a row that `make` cannot use.
    """
    if work.complete:
        return
    lines: list[bytes] = []
    read = 0
    for where, row in rows(work.read):
        try:
            made = make(row)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise CorpusError(f"{where}: {reason(error)}") from error
        lines += made
        read += 1
        work.counts[KEPT] += len(made)
        if read == how.chunk:
            work.add(lines, read)
            how.progress(work.read, work.counts[KEPT])
            lines, read = [], 0
    work.add(lines, read, complete=True)
    how.progress(work.read, work.counts[KEPT])


def write_lines(path: Path, lines: Iterable[bytes]) -> tuple[int, str]:
    """A file that appears only when it is whole; how many lines it has, and the SHA-256 of them, unpacked.

    Lines are packed if the name ends in .gz.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, packed = path.with_name(f".{path.name}.partial"), path.name.endswith(".gz")
    count, digest, held = 0, sha256(), []
    with partial.open("wb") as out:
        for line in lines:
            held.append(line)
            digest.update(line)
            count += 1
            if len(held) == CHUNK:
                out.write(pack(held, packed))
                held = []
        out.write(pack(held, packed) if held or not count else b"")
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
    return count, digest.hexdigest()


def hash_lines(path: Path) -> tuple[int, str]:
    """How many lines a file has, and the SHA-256 of them in order, unpacked."""
    count, digest = 0, sha256()
    with open_bytes(path) as lines:
        for line in lines:
            digest.update(line)
            count += 1
    return count, digest.hexdigest()
