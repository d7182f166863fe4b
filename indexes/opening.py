"""Open whatever index the user names: a folder of any kind, a server's address, or several of them as one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from agentgym_ig.errors import IndexUnusable
from agentgym_ig.indexes.base import Index
from agentgym_ig.indexes.bm25 import Bm25Index
from agentgym_ig.indexes.cache import CachedIndex
from agentgym_ig.indexes.http import HttpIndex
from agentgym_ig.indexes.hybrid import HybridIndex
from agentgym_ig.indexes.manifest import MANIFEST, read_manifest


def open_index(place: Path | str, *, encoder: str | None = None, device: str | None = None, threads: int = 1) -> Index:
    """The index in a folder, of whatever kind it is, or behind an address that begins with `http://` or `https://`.

    A folder of Lucene files that Anserini or pyserini made is an index too. `encoder` names the model folder where the
    one in the manifest has moved, and `device` where a dense index computes; `threads` is how many queries bm25s
    searches at once (Lucene, FAISS and torch take all cores by themselves). Kinds ignore what is not theirs.

    Raises IndexUnusable when there is no index, or one that does not fit its passages or encoder.
    """
    if str(place).startswith(("http://", "https://")):
        return HttpIndex(str(place))
    folder = Path(place)
    made_by_others = next(folder.glob("segments_*"), None) is not None
    kind = "lucene" if made_by_others else read_manifest(folder)["kind"]
    if kind == "bm25s":
        index = Bm25Index.open(folder)
        index.threads = threads
        return index
    if kind == "lucene":
        from agentgym_ig.indexes.lucene import LuceneIndex

        return LuceneIndex.open(folder)
    if kind in ("faiss", "torch"):
        from agentgym_ig.indexes.dense import DenseIndex

        return DenseIndex.open(folder, encoder=encoder, device=device)
    raise IndexUnusable(f"{folder} holds an index of kind {kind!r}, which this version does not know")


def open_indexes(
    places: Sequence[Path | str],
    *,
    encoder: str | None = None,
    device: str | None = None,
    threads: int = 1,
    rerank: str | None = None,
    cache: Path | None = None,
) -> Index:
    """One index out of all that the user named: fused if several, then reranked, then cached, as far as asked for.

    `rerank` names a cross-encoder of sentence-transformers, `cache` a file that keeps results for later runs.
    """
    if not places:
        raise IndexUnusable("no index was named; give a folder or an address")
    opened = [open_index(place, encoder=encoder, device=device, threads=threads) for place in places]
    index: Index = opened[0] if len(opened) == 1 else HybridIndex(opened)
    if rerank is not None:
        from agentgym_ig.indexes.rerank import RerankedIndex

        index = RerankedIndex(index, rerank)
    if cache is not None:
        index = CachedIndex(index, key=_identity(places, rerank), path=cache)
    return index


def _identity(places: Sequence[Path | str], rerank: str | None) -> str:
    """Changes whenever results may: with the indexes' own manifests, for folders that have one."""
    parts = [str(rerank)]
    for place in places:
        manifest = Path(place) / MANIFEST
        parts.append(manifest.read_text() if manifest.is_file() else str(place))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
