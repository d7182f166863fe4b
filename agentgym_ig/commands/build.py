"""`agentgym-ig index build`, `import` and `split`: making indexes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from agentgym_ig.commands.console import console, interruptible, progress_bar
from agentgym_ig.errors import AgentGymError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from agentgym_ig.indexes.bm25 import Bm25Settings
    from agentgym_ig.indexes.build import Kind, Progress
    from agentgym_ig.indexes.encoders import EncoderSettings

Corpus = Annotated[
    str,
    typer.Option(
        help="Passages: .jsonl, .jsonl.gz or .parquet with id, title, text (or id, contents), a folder of such files, "
        "a saved Hugging Face dataset, or hf:NAME[:SPLIT]."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the new index.")]
Memory = Annotated[str, typer.Option("--max-memory", help="What the build may use, such as 2GB or 800MB.")]
Model = Annotated[str, typer.Option(help="Encoder of a dense index: a model's folder, or its name on the hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of an encoder on the hub.")]
QueryPrefix = Annotated[str | None, typer.Option(help="Before every query; by default the encoder's own.")]
PassagePrefix = Annotated[str | None, typer.Option(help="Before every passage; by default the encoder's own.")]
Pooling = Annotated[str | None, typer.Option(help="mean, cls or last; by default the encoder's own.")]
Device = Annotated[
    str | None, typer.Option(help="Where to embed: cpu, cuda, cuda:1; by default a GPU if there is one.")
]

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
    revision: Revision = None,
    query_prefix: QueryPrefix = None,
    passage_prefix: PassagePrefix = None,
    pooling: Pooling = None,
    device: Device = None,
    factory: Annotated[
        str, typer.Option(help="faiss: factory string, such as HNSW32 or IVF4096,SQ8; auto goes by the corpus's size.")
    ] = "auto",
    parameters: Annotated[str, typer.Option(help="faiss: how thoroughly to search, such as nprobe=64.")] = "",
    vectors_from: Annotated[
        Path | None, typer.Option(help="faiss: take the vectors of this torch index over the same corpus.")
    ] = None,
    max_memory: Memory = "4GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the build will need.")] = False,
) -> None:
    """Build an index over a corpus. Killed or interrupted, the same command goes on where it stopped."""
    from agentgym_ig.indexes.bm25 import Bm25Settings

    bm25 = Bm25Settings(k1=k1, b=b, stemmer=None if stemmer == "none" else stemmer, title_weight=title_weight)
    chosen: Kind | Callable[[int], Kind]
    if kind == "auto":
        chosen = partial(_by_size, bm25=bm25)
    elif kind == "bm25s":
        chosen = bm25
    elif kind == "lucene":
        chosen = _lucene(bm25)
    elif kind in ("faiss", "torch"):
        from agentgym_ig.indexes.dense import Faiss, Torch, auto_factory

        settings = _encoder(encoder, revision, query_prefix, passage_prefix, pooling)

        def faiss(count: int) -> Kind:
            made = auto_factory(count) if factory == "auto" else factory
            return Faiss(settings, made, parameters, device=device, vectors_from=vectors_from)

        chosen = Torch(settings, device=device) if kind == "torch" else faiss
    else:
        raise ValueError(f"--kind {kind!r}: choose auto, bm25s, lucene, faiss or torch")
    if dry_run:
        _say_needs(corpus, chosen, _bytes(max_memory))
    else:
        _build(corpus, out, chosen, _bytes(max_memory))


def import_index(
    corpus: Corpus,
    out: Out,
    faiss: Annotated[Path | None, typer.Option(help="A FAISS file; row i of it is passage i of the corpus.")] = None,
    lucene: Annotated[
        Path | None,
        typer.Option(help="A folder of Lucene files, over the corpus in its order or with row numbers as ids."),
    ] = None,
    encoder: Model = "intfloat/e5-base-v2",
    revision: Revision = None,
    query_prefix: QueryPrefix = None,
    passage_prefix: PassagePrefix = None,
    pooling: Pooling = None,
    parameters: Annotated[str, typer.Option(help="faiss: how thoroughly to search, such as efSearch=128.")] = "",
) -> None:
    """Take in an index that others published, with its corpus and, for a FAISS file, its encoder."""
    if (faiss is None) == (lucene is None):
        raise ValueError("give --faiss FILE or --lucene FOLDER")
    kind: Kind
    if faiss is not None:
        from agentgym_ig.indexes.dense import FaissFile

        settings = _encoder(encoder, revision, query_prefix, passage_prefix, pooling)
        kind = FaissFile(settings, faiss, parameters)
    else:
        from agentgym_ig.indexes.lucene import LuceneFiles

        kind = LuceneFiles(path=cast("Path", lucene))
    _build(corpus, out, kind, _bytes("4GB"))


def _encoder(
    model: str, revision: str | None, query_prefix: str | None, passage_prefix: str | None, pooling: str | None
) -> EncoderSettings:
    from agentgym_ig.indexes.encoders import EncoderSettings

    return EncoderSettings(
        model=model,
        revision=revision,
        query_prefix=query_prefix,
        passage_prefix=passage_prefix,
        pooling=cast("Any", pooling),  # checked where it is used
    )


def _lucene(bm25: Bm25Settings) -> Kind:
    from agentgym_ig.indexes.jvm import find_jvm
    from agentgym_ig.indexes.lucene import Lucene

    find_jvm()  # or its absence would show only after the corpus was read
    return Lucene(k1=bm25.k1, b=bm25.b)


def _by_size(count: int, bm25: Bm25Settings) -> Kind:
    if count <= BM25S_UP_TO:
        console.print(f"{count:,} passages: bm25s, the faster up to {BM25S_UP_TO:,}")
        return bm25
    try:
        chosen = _lucene(bm25)
    except AgentGymError as error:
        console.print(f"{count:,} passages: bm25s, though Lucene would search them faster: {error}", markup=False)
        return bm25
    console.print(f"{count:,} passages: Lucene, the faster past {BM25S_UP_TO:,}")
    return chosen


def _bytes(size: str) -> int:
    found = re.fullmatch(r"([0-9.]+) *([KMGT]B)", size.strip().upper())
    if not found:
        raise ValueError(f"--max-memory {size!r}: give a number and a unit, such as 2GB or 800MB")
    return int(float(found[1]) * SIZES[found[2]])


def _size(count: int) -> str:
    unit = next(name for name in reversed(SIZES) if count >= SIZES[name] or name == "KB")
    return f"{count / SIZES[unit]:.1f} {unit}"


def _say_needs(corpus: str, choose: Kind | Callable[[int], Kind], memory: int) -> None:
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
