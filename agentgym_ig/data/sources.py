"""From what a user names to a source of rows: the hub, a file, or a folder of files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentgym_ig.data.hub import hub_rows, hub_splits, resolve_revision
from agentgym_ig.data.jsonl import Skip
from agentgym_ig.data.layouts import split_name
from agentgym_ig.data.reading import ENDINGS, Rows, file_rows
from agentgym_ig.data.releases import Dataset, Release, choose_split, find_dataset, find_release

HUB = "hf:"


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that can be read again from any row on.

    rows: takes how many rows to pass over. about: what the manifest says of the source. files: those that it reads.
    name: what to call rows that do not say which dataset they are of. layout: None where it is told from the fields
    of the first row. count: rows, where that is known.
    """

    rows: Callable[[int], Rows]
    about: dict[str, Any]
    name: str
    files: tuple[Path, ...] = ()
    layout: str | None = None
    count: int | None = None

    @property
    def split(self) -> str | None:
        """Our name of the split; None where nobody said."""
        return self.about.get("split")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a user asked for. source: a file, a folder, `hf:NAME`, or None for the dataset's own release."""

    source: str | None = None
    release: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    layout: str | None = None


def question_source(dataset: str, wanted: Wanted) -> Source:
    """Where to read a question set from.

    Raises ValueError for what does not exist, with what there is, FileNotFoundError, and HubUnreachable.
    """
    known = find_dataset(dataset)
    if wanted.source is None:
        return _release(dataset, wanted)
    if wanted.source.startswith(HUB):
        return _hub(wanted.source.removeprefix(HUB), wanted, known.licence)
    path = Path(wanted.source)
    if path.is_dir():
        return _in_folder(path, dataset, known, wanted)
    return _files([path], wanted, known.licence)


def _release(dataset: str, wanted: Wanted) -> Source:
    release = find_release(dataset, wanted.release)
    split = choose_split(wanted.split, release.splits, f"{dataset} in {release.repository}")
    asked = Wanted(
        config=release.config,
        split=release.splits[split],
        revision=wanted.revision or release.revision,
        layout=release.layout,
    )
    found = _hub(release.repository, asked, release.licence)
    return replace(
        found,
        about=found.about | {"split": split},
        layout=wanted.layout or release.layout,
        count=release.rows.get(split),
    )


def _hub(repository: str, wanted: Wanted, licence: str) -> Source:
    revision = resolve_revision(repository, wanted.revision)
    there = {split_name(name): name for name in hub_splits(repository, wanted.config, revision)}
    split = choose_split(split_name(wanted.split) if wanted.split else None, there, repository)

    def rows(skip: int) -> Rows:
        return hub_rows(repository, wanted.config, there[split], revision, skip)

    about = {"source": HUB + repository, "config": wanted.config, "split": split, "revision": revision}
    return Source(rows, about | {"licence": licence}, repository.rpartition("/")[2], layout=wanted.layout)


def _in_folder(folder: Path, dataset: str, known: Dataset, wanted: Wanted) -> Source:
    """A folder downloaded from the hub, or one of our own: FOLDER/<config>/<split>.* or FOLDER/<split>.*."""
    release = next(iter(known.releases.values()), None)
    places = [folder / name for name in (wanted.config, _config(release), dataset) if name]
    for place in (*places, folder):
        there = _splits_in(place) if place.is_dir() else {}
        if there:
            split = choose_split(wanted.split, there, str(place))
            return _files(there[split], wanted, known.licence, split)
    own = sorted(path for path in folder.iterdir() if path.is_file() and _stem(path) == dataset)
    if own:
        return _files(own, wanted, known.licence)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"folder {folder} holds no file of {dataset}: wanted {dataset}/test.jsonl, test.jsonl or {dataset}.jsonl (or "
        f"dev, train; {', '.join(ENDINGS)}), found {found}; name the file itself with --source"
    )


def _config(release: Release | None) -> str | None:
    return release.config if release else None


def _stem(path: Path) -> str | None:
    ending = next((own for own in sorted(ENDINGS, key=len, reverse=True) if path.name.endswith(own)), None)
    return None if ending is None else path.name.removesuffix(ending)


def _splits_in(folder: Path) -> dict[str, list[Path]]:
    """Split → its files: `test.jsonl`, or `train-00000-of-00002.parquet` and so on."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = split_name((_stem(path) or "").partition("-")[0])
        if path.is_file() and name in ("train", "dev", "test"):
            found.setdefault(name, []).append(path)
    return found


def _files(paths: list[Path], wanted: Wanted, licence: str, split: str | None = None) -> Source:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; give a file, a folder, or hf:NAME for a dataset of the hub")

    def rows(skip: int) -> Rows:
        left = Skip(skip)
        for path in paths:
            yield from file_rows(path, left)

    about = {"source": [str(path) for path in paths], "split": split or wanted.split, "revision": wanted.revision}
    name = paths[0].name.partition(".")[0]
    return Source(rows, about | {"licence": licence}, name, tuple(paths), wanted.layout)
