"""What only a GPU can show, in one command.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json

- Scoring of information gain with a random 0.5B model, packed and online beside plain passes (benchmarks.info_gain).
- Exact flat search over as many made-up vectors as wiki-18 has passages (21,015,324 of 768 numbers, 32 GB as float16),
  by torch and, where FAISS has GPUs, by FAISS, beside what the memory's bandwidth allows: a batch must read every
  vector once.

Not yet measured; `--device cpu --vectors 20000 --only flat_search` tries the code.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from agentgym_ig.commands.console import console
from agentgym_ig.indexes.faiss_scan import FaissScan, load_faiss
from agentgym_ig.indexes.scans import Extent, Scan, TorchScan
from agentgym_ig.records import write_json
from benchmarks.info_gain import on as info_gain_on
from benchmarks.measure import where

SHARD = 500_000
BATCHES = (1, 64, 512)
K = 10
SECONDS = 5.0


def made_up(count: int, dimension: int, device: str) -> list[NDArray[np.float16]]:
    """Unit vectors in random directions, made on the device and kept in the machine's memory."""
    generator = torch.Generator(device).manual_seed(0)
    shards: list[NDArray[np.float16]] = []
    for first in range(0, count, SHARD):
        block = torch.randn(min(SHARD, count - first), dimension, generator=generator, device=device)
        shards.append(torch.nn.functional.normalize(block).half().cpu().numpy())
    return shards


def bandwidth(device: str) -> float:
    """Bytes a second that a plain sum over a large array reads."""
    array = torch.ones(1 << 30 if device != "cpu" else 1 << 26, dtype=torch.float16, device=device)
    return array.nbytes / _seconds(partial(torch.sum, array), device)


def _seconds(run: Any, device: str) -> float:
    """The mean time of a call, after one that does not count."""
    run()
    _wait(device)
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        run()
        _wait(device)
        calls += 1
    return (time.perf_counter() - started) / calls


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def flat_search(count: int, dimension: int, device: str) -> dict[str, Any]:
    """Queries per second at each batch size, and the share of what the bandwidth would allow."""
    shards = made_up(count, dimension, device)
    extent = Extent(dimension, 1.001, True)
    queries = np.concatenate([shard[: -(-512 // len(shards))] for shard in shards]).astype(np.float32)[:512]
    scans: dict[str, Scan] = {"torch": TorchScan(shards, extent, device)}
    if device != "cpu" and load_faiss().get_num_gpus() > 0:
        scans["faiss-gpu"] = FaissScan(_faiss_flat(shards, dimension), extent)
    per_second = bandwidth(device)
    figures: dict[str, Any] = {
        "vectors": count, "dimension": dimension, "k": K, "bandwidth_gb_per_s": round(per_second / 1e9, 1),
    }  # fmt: skip
    for name, scan in scans.items():
        for batch in BATCHES:
            asked = queries[:batch]
            took = _seconds(partial(scan.search, asked, K), device)
            bound = sum(shard.nbytes for shard in shards) / per_second
            row = {"queries_per_s": round(len(asked) / took, 1), "share_of_bandwidth_bound": round(bound / took, 3)}
            figures[f"{name}, batches of {batch}"] = row
    return figures


def _faiss_flat(shards: list[NDArray[np.float16]], dimension: int) -> Any:
    """A flat index, which `FaissScan` copies to the GPUs in float16."""
    index = load_faiss().IndexFlatIP(dimension)
    for shard in shards:
        index.add(shard.astype(np.float32))
    return index


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cuda",
    vectors: Annotated[int, typer.Option(help="How many.")] = 21_015_324,
    dimension: Annotated[int, typer.Option(help="Numbers in a vector.")] = 768,
    only: Annotated[list[str] | None, typer.Option(help="info_gain, flat_search; both by default.")] = None,
) -> None:
    """Run everything and print it; what is done is written before the next part begins."""
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    parts = {
        "info_gain": partial(info_gain_on, device),
        "flat_search": partial(flat_search, vectors, dimension, device),
    }
    figures: dict[str, Any] = where() | {"device": name}
    for part in only or parts:
        figures[part] = parts[part]()
        console.print_json(data={part: figures[part]})
        if out is not None:
            write_json(out, figures)


if __name__ == "__main__":
    typer.run(main)
