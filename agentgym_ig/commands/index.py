"""`agentgym-ig index`: build and search indexes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from agentgym_ig.commands.console import bar, console, interruptible

app = typer.Typer(no_args_is_help=True, help="Build and search indexes.")


@app.command()
def build(
    corpus: Annotated[Path, typer.Option(help="Passages: .jsonl or .jsonl.gz with id, title, text (or id, contents).")],
    out: Annotated[Path, typer.Option(help="Folder of the new index.")],
    k1: Annotated[float, typer.Option(help="BM25's term-frequency saturation.")] = 0.9,
    b: Annotated[float, typer.Option(help="BM25's length normalisation.")] = 0.4,
    stemmer: Annotated[str, typer.Option(help="Snowball stemmer, or 'none'.")] = "english",
    title_weight: Annotated[int, typer.Option(help="How often the title counts beside the text.")] = 1,
) -> None:
    """Build a BM25 index over a corpus."""
    from agentgym_ig.indexes.bm25 import Bm25Index, Bm25Settings
    from agentgym_ig.indexes.corpus import read_corpus

    settings = Bm25Settings(k1=k1, b=b, stemmer=None if stemmer == "none" else stemmer, title_weight=title_weight)
    started = time.perf_counter()
    with interruptible("Nothing was written; run the same command again."), bar("reading", None) as advance:

        def progress(phase: str, done: int) -> None:
            if done % 1000 == 0 or phase != "reading":
                advance(done, note=phase)

        index = Bm25Index.build(read_corpus(corpus), out, settings, progress=progress)
    console.print(f"{len(index):,} passages indexed in {time.perf_counter() - started:.1f} s: {out}")


@app.command()
def search(
    query: Annotated[list[str], typer.Argument(help="One or more queries.")],
    index: Annotated[Path, typer.Option(help="Folder of the index.")],
    k: Annotated[int, typer.Option(help="Passages per query.")] = 5,
) -> None:
    """Search an index."""
    from rich.markup import escape

    from agentgym_ig.indexes.bm25 import Bm25Index

    for asked, hits in zip(query, Bm25Index.open(index).search(query, k), strict=True):
        console.print(f"[bold]{escape(asked)}[/]" + ("" if hits else "  (nothing found)"))
        for rank, hit in enumerate(hits, 1):
            passage = hit.passage
            console.print(f"{rank:3d} {hit.score:7.3f}  [cyan]{escape(passage.title)}[/]  [dim]{escape(passage.id)}[/]")
            console.print(f"      {escape(passage.text[:200])}", highlight=False)
