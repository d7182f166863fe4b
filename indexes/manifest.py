"""The manifest of an index folder: what the index was made of, and the hash of each of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agentgym_ig.errors import IndexUnusable
from agentgym_ig.provenance import file_sha256
from agentgym_ig.records import write_json

FORMAT = 2
"""Rises when older indexes can no longer be read as they are."""
MANIFEST = "manifest.json"


def write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Describe all files of a finished index folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths
    }
    write_json(folder / MANIFEST, {"format": FORMAT, **entries, "files": files})


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of an index folder, checked against the sizes of its files, and against `kind` where one is wanted.

    Raises IndexUnusable, saying how to build an index, when there is none or it does not fit.
    """
    build = f"agentgym-ig index build --corpus CORPUS.jsonl --out {folder}"
    path = folder / MANIFEST
    if not path.is_file():
        partial = folder.with_name(f"{folder.name}.partial")
        begun = f"; {partial} holds a build that was not finished: run its command again" if partial.is_dir() else ""
        raise IndexUnusable(f"no index in {folder} (found no {MANIFEST}); build one: {build}{begun}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        found, made = manifest["format"], manifest["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise IndexUnusable(f"{path} cannot be read ({error!r}); build the index anew: {build}") from error
    if found != FORMAT:
        raise IndexUnusable(f"{folder} is of format {found}, wanted {FORMAT}; build it anew: {build}")
    if kind is not None and made != kind:
        raise IndexUnusable(
            f"{folder} holds a {made} index, wanted {kind}; agentgym_ig.indexes.open_index opens any kind"
        )
    for name, entry in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != entry["bytes"]:
            raise IndexUnusable(f"{folder / name} has {size} bytes, wanted {entry['bytes']}; build it anew: {build}")
    return manifest


def damaged_files(folder: Path) -> list[str]:
    """What is not as the manifest says, shards of passages with the rows they hold. Reads every file."""
    manifest = read_manifest(folder)
    damaged = [name for name, entry in manifest["files"].items() if file_sha256(folder / name) != entry["sha256"]]
    return [_with_rows(name, manifest) for name in damaged]


def _with_rows(name: str, manifest: dict[str, Any]) -> str:
    stem = Path(name).stem
    if not stem.isdigit():
        return name
    first = int(stem) * manifest["shard"]
    last = min(first + manifest["shard"], manifest["passages"])
    return f"{name} (shard {int(stem)}: passages {first + 1:,} to {last:,})"
