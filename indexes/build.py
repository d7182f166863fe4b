"""Building any kind of index: in shards, in bounded memory, and resumable at every moment.

    OUT.partial/lock         held by the process that builds
    OUT.partial/plan.json    what is being built: a resumed build must want the same
    OUT.partial/work/00000   what the kind made of the first shard, and so on; gone at the end
    OUT.partial/index/       becomes OUT, by one rename, when all of it is there

A build reads its corpus again from the start when it is resumed, which costs minutes for all of Wikipedia, and
compares it with the passages stored so far; the costly steps are done once per shard. What comes out does not depend on
where it was stopped: equal corpora and settings give equal files, byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agentgym_ig.errors import BuildFailed
from agentgym_ig.indexes.manifest import write_manifest
from agentgym_ig.indexes.store import PassageStore, store_passages
from agentgym_ig.records import locked, write_json
from agentgym_ig.types import Passage

SHARD = 20_000
"""Passages per shard: some seconds of work for BM25, some minutes for an encoder on a CPU."""
MEMORY = 4 << 30
"""Bytes that a build may use where nobody says otherwise."""

Progress = Callable[[str, int, int | None], None]
"""Called with a phase's name, the passages done in it, and how many there are, where that is known."""


@dataclass(frozen=True)
class Work:
    """What `Kind.assemble` makes the index of."""

    folder: Path
    """Holds what was made of the shards, and whatever a kind wants to keep between two runs."""
    shards: Sequence[Path]
    """One folder for each shard, as `Kind.digest` left it, in order."""
    passages: PassageStore
    memory: int
    """Bytes that the build may use."""
    progress: Progress


class Kind(Protocol):
    """A kind of index, with its settings, and how to build it."""

    @property
    def name(self) -> str:
        """Stands in the manifest, so that the index can be opened."""
        ...

    def describe(self) -> dict[str, Any]:
        """The settings as JSON: all that the result depends on beside the passages."""
        ...

    def versions(self) -> dict[str, str]:
        """The libraries that make the index, with their versions."""
        ...

    def memory_needed(self, count: int, sample: Path) -> int:
        """Bytes that building takes for `count` passages; `sample` is an index of this kind over the first few."""
        ...

    def check(self, count: int, memory: int) -> None:
        """Raise BuildFailed if it is clear beforehand that `count` passages will not do with so many bytes."""
        ...

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        """Do the costly work for one shard, into an empty folder; when killed in it, that shard is begun again.

        `progress` may be called with the passages done.
        """
        ...

    def assemble(self, work: Work, folder: Path) -> None:
        """Make the index's own files in `folder`; must cope with what an interrupted call before it left there."""
        ...


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the disk knows no links. Replaces what is there."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build, as far as the result does not depend on it (but for `shard`, which cuts the files)."""

    shard: int = SHARD
    """Passages per shard: what a killed build loses at most."""
    memory: int = MEMORY
    """Bytes that the build may use."""
    progress: Progress = lambda phase, done, total: None

    def __post_init__(self) -> None:
        if self.shard < 1 or self.memory < 1:
            raise ValueError(f"shard={self.shard}, memory={self.memory}: both must be positive")


def build_index(
    passages: Iterable[Passage],
    folder: Path,
    kind: Kind | Callable[[int], Kind],
    options: BuildOptions | None = None,
) -> None:
    """Build an index in a folder, which appears only when it is whole; go on with it where an earlier call stopped.

    `kind` may be a function that chooses one by the number of passages.

    Raises FileExistsError when the folder is there already; CorpusError for a corpus that cannot be indexed or that is
    not the one an unfinished build began with; BuildFailed when the unfinished build wanted something else, when
    another process is building it, or when the disk is full. In all these cases nothing built so far is lost.
    """
    options = options or BuildOptions()
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give another folder, or delete it to build anew")
    partial = folder.with_name(f"{folder.name}.partial")
    with _owning(partial), _room_on_disk(partial):
        index = partial / "index"
        _check_plan(partial / "plan.json", {"shard": options.shard})
        store, corpus = store_passages(
            index, passages, options.shard, lambda done: options.progress("reading", done, None)
        )
        chosen = kind(len(store)) if callable(kind) else kind
        chosen.check(len(store), options.memory)
        _check_plan(partial / "plan.json", {"kind": chosen.name, "settings": chosen.describe()})
        _make(chosen, store, partial, options)
        about = {"kind": chosen.name, "passages": len(store), "shard": options.shard, "corpus_sha256": corpus}
        write_manifest(index, about | {"settings": chosen.describe(), "versions": chosen.versions()})
        index.rename(folder)
    shutil.rmtree(partial)


def _make(kind: Kind, store: PassageStore, partial: Path, options: BuildOptions) -> None:
    shards: list[Path] = []
    done = 0

    def progress(more: int) -> None:
        options.progress("indexing", done + more, len(store))

    progress(0)
    for number, passages in enumerate(store.shards()):
        shards.append(partial / "work" / f"{number:05d}")
        if not shards[-1].exists():
            begun = shards[-1].with_suffix(".begun")
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir(parents=True)
            kind.digest(passages, begun, progress)
            begun.rename(shards[-1])
        done += len(passages)
        progress(0)
    kind.assemble(Work(partial / "work", shards, store, options.memory, options.progress), partial / "index")


@contextmanager
def _owning(partial: Path) -> Iterator[None]:
    """Hold the folder of an unfinished build; the lock goes with the process, however it ends."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        if not locked(lock):
            raise BuildFailed(f"another process is building in {partial}; wait for it, or end it")
        yield


@contextmanager
def _room_on_disk(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BuildFailed(
            f"the disk of {partial} is full; what was built so far is kept there: make room, then run the same "
            "command again"
        ) from error


def _check_plan(path: Path, wanted: dict[str, Any]) -> None:
    """Note what is being built, or see that it is what the build began as."""
    begun = json.loads(path.read_text()) if path.exists() else {}
    plan = json.loads(json.dumps(wanted))  # as it will be read: tuples are lists
    differing = {name: begun[name] for name in plan if name in begun and begun[name] != plan[name]}
    if differing:
        raise BuildFailed(
            f"the unfinished build in {path.parent} was begun with {differing}, wanted "
            f"{ {name: plan[name] for name in differing} }; give the same settings, or delete it to begin anew"
        )
    write_json(path, begun | plan)
