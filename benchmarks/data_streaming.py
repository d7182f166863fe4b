"""Question files of a million rows, prepared in a process of its own: its peak memory, and rows per second.

    python -m benchmarks.data_streaming --scratch SCRATCH --out benchmarks/results/data_streaming.json

The rows are made up, in FlashRAG's layout, no two questions alike, so that the memory of what was seen is at its
largest.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from agentgym_ig.commands.console import console
from agentgym_ig.data.prepare import Settings, prepare_questions
from agentgym_ig.data.sources import Wanted, question_source
from agentgym_ig.records import write_json
from benchmarks.measure import fresh, timed, where

ROWS = 1_000_000
LIMIT_MB = 500.0
WORDS = [
    first + last for first in ("ba", "ke", "li", "mo", "nu", "ra", "so", "ti") for last in ("den", "for", "lan", "mer")
]


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Questions of 12 words with three answers, each with two numbers that make it unlike the others."""
    rng = random.Random(0)
    for number in range(count):
        drawn = rng.choices(WORDS, k=16)
        yield {
            "id": f"train_{number}",
            "question": f"which {' '.join(drawn[:10])} was number {number}",
            "golden_answers": [" ".join(drawn[10:12]), " ".join(drawn[12:14]), f"{drawn[14]} {number % 977}"],
            "metadata": {"type": "bridge", "level": "hard"},
        }


def write_lines(path: Path, count: int) -> None:
    with path.open("w") as out:
        for row in rows(count):
            out.write(json.dumps(row) + "\n")


def write_list(path: Path, count: int) -> None:
    """One JSON list, as HotpotQA's own files are."""
    with path.open("w") as out:
        for number, row in enumerate(rows(count)):
            out.write(("[" if not number else ",") + json.dumps(row))
        out.write("]")


def write_parquet(path: Path, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    batch: list[dict[str, Any]] = []
    first = pa.Table.from_pylist(list(rows(1)))
    with pq.ParquetWriter(path, first.schema) as out:
        for row in rows(count):
            batch.append(row)
            if len(batch) == 100_000:
                out.write_table(pa.Table.from_pylist(batch, first.schema))
                batch = []
        if batch:
            out.write_table(pa.Table.from_pylist(batch, first.schema))


def prepare(source: str, out: Path, subset: int | None) -> tuple[dict[str, Any], float]:
    """The manifest's counts, and the seconds that it took."""
    found = question_source("nq", Wanted(source=source, split="train"))
    made, seconds = timed(lambda: prepare_questions("nq", found, out, Settings(subset=subset)))
    return made[out]["rows"], seconds


def measure(name: str, source: str, scratch: Path, subset: int | None = None) -> dict[str, Any]:
    """One source, in a process of its own."""
    out = scratch / "prepared" / f"{name}.jsonl"
    (counts, seconds), peak = fresh(prepare, source, out, subset)
    figures = {"rows": counts["read"], "written": counts["written"], "seconds": round(seconds, 1)}
    return figures | {"rows_per_s": round(counts["read"] / seconds), "peak_mb": peak}


def main(
    scratch: Annotated[Path, typer.Option(help="Folder for the files that are made.")],
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    count: Annotated[int, typer.Option(help="Rows of each file.")] = ROWS,
) -> None:
    """Measure every way in which a large file may come."""
    repository = scratch / "repository"
    shutil.rmtree(scratch / "prepared", ignore_errors=True)
    repository.mkdir(parents=True, exist_ok=True)
    write_lines(repository / "train.jsonl", count)
    write_list(scratch / "list.json", count)
    write_parquet(scratch / "train.parquet", count)
    figures: dict[str, Any] = where() | {"limit_mb": LIMIT_MB}
    figures["jsonl"] = measure("jsonl", str(repository / "train.jsonl"), scratch)
    figures["jsonl, subset of 1,000"] = measure("subset", str(repository / "train.jsonl"), scratch, 1000)
    figures["json list"] = measure("list", str(scratch / "list.json"), scratch)
    figures["parquet"] = measure("parquet", str(scratch / "train.parquet"), scratch)
    figures["datasets, streamed from a local repository"] = measure("hub", f"hf:{repository}", scratch)
    console.print(figures)
    peaks = {name: own["peak_mb"] for name, own in figures.items() if isinstance(own, dict)}
    if max(peaks.values()) >= LIMIT_MB:
        console.print(f"[red]more than {LIMIT_MB} MB:[/] {peaks}")
    if out is not None:
        write_json(out, figures)


if __name__ == "__main__":
    typer.run(main)
