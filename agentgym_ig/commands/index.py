"""`agentgym-ig index`: build, check, search, evaluate and serve indexes."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agentgym_ig.commands.build import build, import_index, split
from agentgym_ig.commands.console import console, interruptible
from agentgym_ig.commands.parts import Cache, Device, Indexes, Moved, Rerank
from agentgym_ig.errors import AgentGymError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Token = Annotated[
    str | None, typer.Option(envvar="AGENTGYM_IG_TOKEN", help="Ask for this bearer token.", show_envvar=True)
]
IndexFolder = Annotated[Path, typer.Option("--index", help="Folder of the index.")]

app = typer.Typer(no_args_is_help=True, help="Build, check, search, evaluate and serve indexes.")


app.command()(build)
app.command("import")(import_index)
app.command()(split)


def _numbers(option: str, given: str) -> list[int]:
    try:
        return sorted({int(number) for number in given.split(",")})
    except ValueError as error:
        raise ValueError(f"{option} {given!r}: give whole numbers with commas, such as 1,10") from error


@app.command()
def info(index: IndexFolder) -> None:
    """Show what an index was made of."""
    from agentgym_ig.indexes.manifest import read_manifest

    console.print_json(data=read_manifest(index))


@app.command()
def verify(index: IndexFolder) -> None:
    """Read every file of an index and compare it with the manifest, byte for byte."""
    from agentgym_ig.indexes.manifest import damaged_files, read_manifest

    damaged = damaged_files(index)
    if damaged:
        console.print(f"[red]damaged:[/] {', '.join(damaged)}; build the index anew")
        raise typer.Exit(1)
    console.print(f"{len(read_manifest(index)['files'])} files as they were built")


@app.command("eval")
def evaluate(
    index: Indexes,
    questions: Annotated[list[Path], typer.Option(help="Question files; give the option once for each.")],
    k: Annotated[str, typer.Option(help="Numbers of passages, with commas.")] = "1,3,5,10",
    encoder: Moved = None,
    device: Device = None,
    rerank: Rerank = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Recall of the supporting passages, with each question's own words as the query."""
    from agentgym_ig.data.questions import read_questions
    from agentgym_ig.indexes.evaluate import evaluate_retrieval
    from agentgym_ig.indexes.opening import open_indexes

    wanted = _numbers("--k", k)
    asked = [question for path in questions for question in read_questions(path)]
    figures = evaluate_retrieval(
        open_indexes(index, encoder=encoder, device=device, rerank=rerank, cache=cache), asked, wanted
    )
    if as_json:
        console.print_json(data=figures)
        return
    table = Table(*("measure", *(f"@{number}" for number in wanted)), box=SIMPLE_HEAD)
    for measure in ("recall", "all_gold", "answer"):
        table.add_row(measure, *(f"{figures[measure][str(number)]:.3f}" for number in wanted))
    console.print(f"{figures['questions']:,} questions with supporting passages")
    console.print(table)


@app.command()
def bench(
    index: Indexes,
    questions: Annotated[list[Path], typer.Option(help="Question files, whose words are the queries.")],
    k: Annotated[int, typer.Option(help="Passages per query.")] = 10,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,64,512",
    encoder: Moved = None,
    device: Device = None,
    rerank: Rerank = None,
    as_json: AsJson = False,
) -> None:
    """Time opening and searching on this machine."""
    from agentgym_ig.data.questions import read_questions
    from agentgym_ig.indexes.bench import bench as measure
    from agentgym_ig.indexes.opening import open_indexes

    sizes = _numbers("--batch", batch)
    queries = [question.text for path in questions for question in read_questions(path)]
    figures = measure(lambda: open_indexes(index, encoder=encoder, device=device, rerank=rerank), queries, k, sizes)
    if as_json:
        console.print_json(data=figures)
        return
    console.print(
        f"opened in {figures['open_s']:.2f} s ({figures['open_mb']:.0f} MB resident), first search "
        f"{figures['first_search_s']:.2f} s ({figures['searched_mb']:.0f} MB at the end)"
    )
    table = Table("batch", "queries/s", "p50 ms", "p99 ms", box=SIMPLE_HEAD)
    for size, row in figures["batches"].items():
        table.add_row(size, f"{row['queries_per_s']:,.0f}", f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}")
    console.print(table)


@app.command()
def serve(
    index: Indexes,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines reach it only if you name one.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    token: Token = None,
    max_queries: Annotated[int, typer.Option(help="Queries per request.")] = 1024,
    max_k: Annotated[int, typer.Option(help="Passages per query.")] = 1000,
    encoder: Moved = None,
    device: Device = None,
    rerank: Rerank = None,
    cache: Cache = None,
) -> None:
    """Serve an index over HTTP, as Search-R1's retrieval server does (POST /retrieve)."""
    try:
        import uvicorn

        from agentgym_ig.indexes.server import Limits, create_app, leave_cores_to_others
    except ModuleNotFoundError as error:
        raise AgentGymError(
            f"{error.name} is missing; install the server: pip install 'agentgym_ig[server]'"
        ) from error
    from agentgym_ig.indexes.opening import open_indexes

    leave_cores_to_others()
    cores = os.cpu_count() or 1
    opened = open_indexes(index, encoder=encoder, device=device, threads=cores, rerank=rerank, cache=cache)
    opened.search(["warm", "up"], 1)  # the first search maps the files and, for large indexes, compiles
    served = create_app(opened, limits=Limits(queries=max_queries, k=max_k), token=token)
    console.print(f"serving on http://{host}:{port}/retrieve; stop with Ctrl-C")
    uvicorn.run(served, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)


@app.command("serve-cluster")
def serve_cluster(
    shard: Annotated[list[Path], typer.Option(help="Folder of a part, the same on every host; once for each.")],
    replicas: Annotated[int, typer.Option(help="Processes per shard, spread over the hosts.")] = 1,
    host: Annotated[str, typer.Option(help="Every host's loopback, or 0.0.0.0 for all their addresses.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    token: Token = None,
) -> None:
    """Serve the parts of an index (`index split`) from the Ray cluster that this host belongs to."""
    if find_spec("ray") is None:
        raise AgentGymError("ray is missing; install it: pip install 'agentgym_ig[ray]'")
    from agentgym_ig.indexes.cluster import Cluster, serving

    with interruptible("Stopped."), serving(shard, Cluster(replicas=replicas, token=token), host=host, port=port):
        console.print(f"{len(shard)} shards on http://{host}:{port}/retrieve, from every host; stop with Ctrl-C")
        threading.Event().wait()


@app.command()
def search(
    query: Annotated[list[str], typer.Argument(help="One or more queries.")],
    index: Indexes,
    k: Annotated[int, typer.Option(help="Passages per query.")] = 5,
    encoder: Moved = None,
    device: Device = None,
    rerank: Rerank = None,
    cache: Cache = None,
) -> None:
    """Search an index."""
    from rich.markup import escape

    from agentgym_ig.indexes.opening import open_indexes

    opened = open_indexes(index, encoder=encoder, device=device, rerank=rerank, cache=cache)
    for asked, hits in zip(query, opened.search(query, k), strict=True):
        console.print(f"[bold]{escape(asked)}[/]" + ("" if hits else "  (nothing found)"))
        for rank, hit in enumerate(hits, 1):
            passage = hit.passage
            console.print(f"{rank:3d} {hit.score:7.3f}  [cyan]{escape(passage.title)}[/]  [dim]{escape(passage.id)}[/]")
            console.print(f"      {escape(passage.text[:200])}", highlight=False)
