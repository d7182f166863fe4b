"""The note beside every prepared file: where its rows come from, what was left out, and their hash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentgym_ig.data.sources import Source
from agentgym_ig.data.work import KEPT, Work, hash_lines, partial_folder
from agentgym_ig.errors import CorpusError
from agentgym_ig.provenance import file_sha256, versions
from agentgym_ig.records import write_json

FORMAT = 1
"""Rises when a reader must know of a change."""
LIBRARIES = ("agentgym_ig", "datasets", "pyarrow", "ijson", "mwparserfromhell")


def manifest_path(path: Path) -> Path:
    """Where the manifest of a file lies."""
    return path.with_name(f"{path.name}.manifest.json")


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The manifest of a prepared file, for the record of an evaluation; `path` is the file's own or the manifest's.

    Raises FileNotFoundError where there is none, and CorpusError for something else.
    """
    path = Path(path)
    own = path if path.name.endswith(".manifest.json") else manifest_path(path)
    if not own.is_file():
        raise FileNotFoundError(f"no manifest {own}; `agentgym-ig data questions` and `data corpus` write one")
    try:
        found = json.loads(own.read_bytes())
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, wanted {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{own} is no manifest: {error!r}; prepare the file again") from error
    return dict(found)


def is_unchanged(path: Path) -> bool:
    """Whether a file's rows are those that its manifest was written for. Reads the whole file."""
    return bool(hash_lines(path)[1] == read_manifest(path)["rows_sha256"])


def begin_manifest(kind: str, source: Source, settings: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says whatever comes of the rows."""
    found = {**source.about, "kind": kind, "settings": settings, "versions": versions(LIBRARIES)}
    if source.files:
        found["source_sha256"] = [file_sha256(path) for path in source.files]
    return found


def plan_of(found: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with the one that began: all but the versions."""
    return {name: value for name, value in found.items() if name != "versions"}


def finished(out: Path, finals: Sequence[Path], found: dict[str, Any]) -> dict[Path, dict[str, Any]] | None:
    """The manifests of outputs that were made whole from the same source in the same way; None where one was not."""
    if partial_folder(out).is_dir() or not all(path.is_file() and manifest_path(path).is_file() for path in finals):
        return None
    plan = json.loads(json.dumps(plan_of(found)))
    made = {path: read_manifest(path) for path in finals}
    same = all(own.get(name) == value for own in made.values() for name, value in plan.items())
    return made if same else None


def hand_over(work: Work, path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Make the rows the output, with its manifest; gives the manifest back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = write_manifest(path, found, work, hash_lines(work.rows))
    work.rows.replace(path)
    return made


def write_manifest(path: Path, found: dict[str, Any], work: Work, rows: tuple[int, str]) -> dict[str, Any]:
    """Write the manifest of a file with so many rows of that hash, and give it back."""
    count, digest = rows
    dropped = {name: number for name, number in sorted(work.counts.items()) if name != KEPT and number}
    counted = {"read": work.read, "dropped": dropped, "kept": work.counts[KEPT], "written": count}
    whole = {"format": FORMAT, "file": path.name, **found, **work.notes, "rows": counted, "rows_sha256": digest}
    write_json(manifest_path(path), whole)
    return whole
