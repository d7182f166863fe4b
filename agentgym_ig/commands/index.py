"""`agentgym-ig index`: build, check, search, evaluate and serve indexes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agentgym_ig.commands.console import bar, console, interruptible
from agentgym_ig.errors import AgentGymError

IndexFolder = Annotated[Path, typer.Option("--index", help="Folder of the index.")]

app = typer.Typer(no_args_is_help=True, help="Build, check, search, evaluate and serve indexes.")


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
def info(index: IndexFolder) -> None:
    """Show what an index was made of."""
    from agentgym_ig.indexes.bm25 import read_manifest

    console.print_json(data=read_manifest(index))


@app.command()
def verify(index: IndexFolder) -> None:
    """Read every file of an index and compare it with the manifest, byte for byte."""
    from agentgym_ig.indexes.bm25 import damaged_files, read_manifest

    damaged = damaged_files(index)
    if damaged:
        console.print(f"[red]damaged:[/] {', '.join(damaged)}; build the index anew")
        raise typer.Exit(1)
    console.print(f"{len(read_manifest(index)['files'])} files as they were built")


@app.command("eval")
def evaluate(
    index: IndexFolder,
    questions: Annotated[list[Path], typer.Option(help="Question files; give the option once for each.")],
    k: Annotated[str, typer.Option(help="Numbers of passages, with commas.")] = "1,3,5,10",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recall of the supporting passages, with each question's own words as the query."""
    from agentgym_ig.indexes.bm25 import Bm25Index
    from agentgym_ig.indexes.corpus import read_questions
    from agentgym_ig.indexes.evaluate import evaluate_retrieval

    try:
        wanted = sorted({int(number) for number in k.split(",")})
    except ValueError as error:
        raise ValueError(f"--k {k!r}: give whole numbers with commas, such as 1,3,5,10") from error
    asked = [question for path in questions for question in read_questions(path)]
    figures = evaluate_retrieval(Bm25Index.open(index), asked, wanted)
    if as_json:
        console.print_json(data=figures)
        return
    table = Table(*("measure", *(f"@{number}" for number in wanted)), box=SIMPLE_HEAD)
    for measure in ("recall", "all_gold", "answer"):
        table.add_row(measure, *(f"{figures[measure][str(number)]:.3f}" for number in wanted))
    console.print(f"{figures['questions']:,} questions with supporting passages")
    console.print(table)


@app.command()
def serve(
    index: IndexFolder,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines reach it only if you name one.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="AGENTGYM_IG_TOKEN", help="Ask for this bearer token.", show_envvar=True)
    ] = None,
    max_queries: Annotated[int, typer.Option(help="Queries per request.")] = 1024,
    max_k: Annotated[int, typer.Option(help="Passages per query.")] = 1000,
) -> None:
    """Serve an index over HTTP, as Search-R1's retrieval server does (POST /retrieve)."""
    try:
        import uvicorn

        from agentgym_ig.indexes.server import Limits, create_app
    except ModuleNotFoundError as error:
        raise AgentGymError(
            f"{error.name} is missing; install the server: pip install 'agentgym_ig[server]'"
        ) from error
    from agentgym_ig.indexes.bm25 import Bm25Index

    opened = Bm25Index.open(index)
    opened.search(["warm up"], 1)  # the first search maps the files and, for large indexes, compiles
    served = create_app(opened, limits=Limits(queries=max_queries, k=max_k), token=token)
    console.print(f"{len(opened):,} passages on http://{host}:{port}/retrieve; stop with Ctrl-C")
    uvicorn.run(served, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)


@app.command()
def search(
    query: Annotated[list[str], typer.Argument(help="One or more queries.")],
    index: IndexFolder,
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
