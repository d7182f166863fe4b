"""`agentgym-ig index build`, `import` and `split`: making indexes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentgym_ig.commands.console import console, interruptible, progress_bar
from agentgym_ig.errors import AgentGymError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from agentgym_ig.indexes.bm25 import Bm25Settings
    from agentgym_ig.indexes.build import Kind, Progress

Corpus = Annotated[
    str,
    typer.Option(
        help="Passages: .jsonl, .jsonl.gz or .parquet with id, title, text (or id, contents), a folder of such files, "
        "a saved Hugging Face dataset, or hf:NAME[:SPLIT]."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the new index.")]
Memory = Annotated[str, typer.Option("--max-memory", help="What the build may use, such as 2GB or 800MB.")]
Model = Annotated[str, typer.Option(help="Encoder of a dense index: a sentence-transformers or transformers model.")]

SIZES = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
BM25S_UP_TO = 1_000_000
"""Passages up to which bm25s searches faster than Lucene; Lucene's cost grows with the root of their number."""


def build(
    corpus: Corpus,
    out: Out,
    kind: Annotated[
        str, typer.Option(help="bm25s, lucene, faiss, torch, or auto: BM25 by the corpus's size.")
    ] = "auto",
    k1: Annotated[float, typer.Option(help="BM25's term-frequency saturation.")] = 0.9,
    b: Annotated[float, typer.Option(help="BM25's length normalisation.")] = 0.4,
    stemmer: Annotated[str, typer.Option(help="bm25s: Snowball stemmer, or 'none'.")] = "english",
    title_weight: Annotated[int, typer.Option(help="bm25s: how often the title counts beside the text.")] = 1,
    encoder: Model = "intfloat/e5-base-v2",
    factory: Annotated[str, typer.Option(help="faiss: factory string, such as Flat, HNSW32 or IVF4096,SQ8.")] = "auto",
    max_memory: Memory = "4GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the build will need.")] = False,
) -> None:
    """Build an index over a corpus. Killed or interrupted, the same command goes on where it stopped."""
    from agentgym_ig.indexes.bm25 import Bm25Settings

    settings = Bm25Settings(k1=k1, b=b, stemmer=None if stemmer == "none" else stemmer, title_weight=title_weight)

    def choose(count: int) -> Kind:
        if kind == "auto":
            return _by_size(count, settings)
        return _kind(kind, settings, encoder, factory)

    if kind != "auto":
        choose(0)  # a mistake in the options shows before the corpus is read
    memory = _bytes(max_memory)
    if dry_run:
        _say_needs(corpus, choose, memory)
    else:
        _build(corpus, out, choose, memory)


def _kind(kind: str, bm25: Bm25Settings, encoder: str, factory: str) -> Kind:
    if kind == "bm25s":
        return bm25
    if kind in ("faiss", "torch"):
        return _dense(kind, encoder, factory)
    if kind == "lucene":
        from agentgym_ig.indexes.lucene import Lucene

        return Lucene(k1=bm25.k1, b=bm25.b)
    raise ValueError(f"--kind {kind!r}: choose auto, bm25s, lucene, faiss or torch")


def _dense(kind: str, encoder: str, factory: str) -> Kind:
    from agentgym_ig.indexes.dense import Faiss, Torch
    from agentgym_ig.indexes.encoders import EncoderSettings

    settings = EncoderSettings(model=encoder)
    return Torch(settings) if kind == "torch" else Faiss(settings, factory)


def _by_size(count: int, bm25: Bm25Settings) -> Kind:
    if count <= BM25S_UP_TO:
        console.print(f"{count:,} passages: bm25s, the faster up to {BM25S_UP_TO:,}")
        return bm25
    from agentgym_ig.indexes.jvm import find_jvm

    try:
        find_jvm()
    except AgentGymError as error:
        console.print(f"{count:,} passages: bm25s, though Lucene would search them faster: {error}")
        return bm25
    console.print(f"{count:,} passages: Lucene, the faster past {BM25S_UP_TO:,}")
    return _kind("lucene", bm25, "", "")


def _bytes(size: str) -> int:
    found = re.fullmatch(r"([0-9.]+) *([KMGT]B)", size.strip().upper())
    if not found:
        raise ValueError(f"--max-memory {size!r}: give a number and a unit, such as 2GB or 800MB")
    return int(float(found[1]) * SIZES[found[2]])


def _size(count: int) -> str:
    unit = next(name for name in reversed(SIZES) if count >= SIZES[name] or name == "KB")
    return f"{count / SIZES[unit]:.1f} {unit}"


def _say_needs(corpus: str, choose: Callable[[int], Kind], memory: int) -> None:
    from agentgym_ig.indexes.estimate import estimate

    needs = estimate(corpus, choose)
    console.print(
        f"{needs.passages:,} passages will need about {_size(needs.memory_bytes)} of memory, "
        f"{_size(needs.disk_bytes)} of disk (twice that while it is built) and "
        f"{timedelta(seconds=round(needs.seconds))} of time; judged by building {needs.sampled:,} of them"
    )
    if needs.memory_bytes > memory:
        console.print(f"[yellow]that is more than --max-memory {_size(memory)}[/]")


def _build(corpus: str, out: Path, choose: Kind | Callable[[int], Kind], memory: int) -> None:
    from agentgym_ig.indexes.build import BuildOptions, build_index
    from agentgym_ig.indexes.manifest import read_manifest
    from agentgym_ig.indexes.sources import count_rows, read_corpus

    started = time.perf_counter()
    with interruptible("Run the same command again to go on from here."), _phases(count_rows(corpus)) as progress:
        build_index(read_corpus(corpus), out, choose, BuildOptions(memory=memory, progress=progress))
    made = read_manifest(out)
    seconds = time.perf_counter() - started
    console.print(f"{made['passages']:,} passages indexed ({made['kind']}) in {seconds:.1f} s: {out}")


@contextmanager
def _phases(rows: int) -> Iterator[Progress]:
    """One bar for each phase of a build; `rows` is about how many passages will be read."""
    with progress_bar() as shown:
        bars: dict[str, TaskID] = {}

        def progress(phase: str, done: int, total: int | None) -> None:
            if phase not in bars:
                bars[phase] = shown.add_task(phase, total=total or rows, note="")
            shown.update(bars[phase], completed=done, total=total or max(rows, done))

        yield progress


def split(
    index: Annotated[Path, typer.Option(help="Folder of a BM25 index.")],
    parts: Annotated[int, typer.Option(help="How many parts to cut it into.")],
    out: Annotated[Path, typer.Option(help="Folder for part-0, part-1 and so on.")],
) -> None:
    """Cut an index into parts for several machines; merged, they answer exactly as the whole."""
    from agentgym_ig.indexes.splitting import split_index

    for made in split_index(index, parts, out):
        console.print(str(made))
