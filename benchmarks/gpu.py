"""What only a GPU can show, in one command.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json
    python -m benchmarks.gpu --device cpu --small

- step: a training step of random models of 0.5B, 1.5B and 7B (the last with LoRA) on episodes of 8,192 tokens that they
  have played, in bfloat16 with gradient checkpointing: update tokens/s and MFU (the goal is 0.45 of 790 TFLOP/s for
  1.5B), what information gain adds (the goal is 10 % of the step), peak memory beside what the planner says, and the
  error of bfloat16 (benchmarks.gpu_parts).
- rollout: tokens/s of each generation engine with the same models (benchmarks.engines).
- learning: a run of IGPO in the tiny world.
- info_gain: scoring of information gain with a random 0.5B model, packed and online beside plain passes
  (benchmarks.info_gain).
- flat_search: exact search over as many made-up vectors as wiki-18 has passages (21,015,324 of 768 numbers, 32 GB as
  float16), by torch and, where FAISS has GPUs, by FAISS, beside what the memory's bandwidth allows: a batch must read
  every vector once.
- kernels: updates of the 0.5B model by each attention kernel that is there, and with Liger's.

A part that fails is recorded with its error, and the others go on; one for which too little of --minutes is left is
skipped, and says so. Not yet measured; the last command above tries all of the code on tiny shapes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
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
from benchmarks import gpu_parts
from benchmarks.gpu_parts import FULL, MODELS, SMALL, Size, wait
from benchmarks.measure import where

SECONDS_WANTED = {
    "step 1.5B": 50, "step 0.5B": 40, "step 7B": 90, "rollout 1.5B": 30, "rollout 0.5B": 30, "rollout 7B": 40,
    "learning": 60, "info_gain": 60, "flat_search": 80, "kernels": 60,
}  # fmt: skip
"""Each part, in the order in which they run, and how many seconds must be left for it to begin: guesses."""
SHARD = 500_000
BATCHES = (1, 64, 512)
K = 10
SECONDS = 5.0
"""For which each search is repeated."""
SMALL_VECTORS = (2000, 32)
"""How many, and of how many numbers, to try the code."""


def made_up(count: int, dimension: int, device: str) -> list[NDArray[np.float16]]:
    """Unit vectors in random directions, made on the device and kept in the machine's memory."""
    generator = torch.Generator(device).manual_seed(0)
    shards: list[NDArray[np.float16]] = []
    for first in range(0, count, SHARD):
        block = torch.randn(min(SHARD, count - first), dimension, generator=generator, device=device)
        shards.append(torch.nn.functional.normalize(block).half().cpu().numpy())
    return shards


def bandwidth(device: str, seconds: float) -> float:
    """Bytes a second that a plain sum over a large array reads."""
    array = torch.ones(1 << 30 if device != "cpu" else 1 << 26, dtype=torch.float16, device=device)
    return array.nbytes / _seconds(partial(torch.sum, array), device, seconds)


def _seconds(run: Any, device: str, least: float) -> float:
    """The mean time of a call, after one that does not count, of as many as fill the least seconds."""
    run()
    wait(device)
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < least:
        run()
        wait(device)
        calls += 1
    return (time.perf_counter() - started) / calls


def flat_search(count: int, dimension: int, device: str, seconds: float) -> dict[str, Any]:
    """Queries per second at each batch size, and the share of what the bandwidth would allow."""
    shards = made_up(count, dimension, device)
    extent = Extent(dimension, 1.001, True)
    queries = np.concatenate([shard[: -(-512 // len(shards))] for shard in shards]).astype(np.float32)[:512]
    scans: dict[str, Scan] = {"torch": TorchScan(shards, extent, device)}
    if device != "cpu" and load_faiss().get_num_gpus() > 0:
        scans["faiss-gpu"] = FaissScan(_faiss_flat(shards, dimension), extent)
    per_second = bandwidth(device, seconds)
    figures: dict[str, Any] = {
        "vectors": count, "dimension": dimension, "k": K, "bandwidth_gb_per_s": round(per_second / 1e9, 1),
    }  # fmt: skip
    for name, scan in scans.items():
        for batch in BATCHES:
            asked = queries[:batch]
            took = _seconds(partial(scan.search, asked, K), device, seconds)
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


def parts_of(size: Size, vectors: int, dimension: int, device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name → what measures it, in the order of `SECONDS_WANTED`."""
    count, width, seconds = (*SMALL_VECTORS, 0.01) if size is SMALL else (vectors, dimension, SECONDS)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "learning": partial(gpu_parts.learning, size, device),
        "info_gain": partial(gpu_parts.info_gain, size, device),
        "flat_search": partial(flat_search, count, width, device, seconds),
        "kernels": partial(gpu_parts.kernels, size, device),
    }
    for name in MODELS:
        parts[f"step {name}"] = partial(gpu_parts.step, name, size, device)
        parts[f"rollout {name}"] = partial(gpu_parts.rollout, name, size, device)
    return {name: parts[name] for name in SECONDS_WANTED}


def guarded(part: Callable[[], dict[str, Any]], wanted: float, left: float) -> dict[str, Any]:
    """A part's figures and how long it took; or its error, or, with too few seconds left, that it was skipped."""
    if left < wanted:
        return {"skipped": f"{max(left, 0):.0f} s of --minutes are left, and {wanted:.0f} s are set aside for it"}
    begun = time.perf_counter()
    try:
        figures = part()
    except Exception as error:  # the other parts are worth having: memory may be enough for them
        figures = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()  # what a failed part had went with its traceback
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"part_seconds": round(time.perf_counter() - begun, 1)} | figures


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    small: Annotated[bool, typer.Option("--small", help="Try the code with tiny models.")] = False,
    minutes: Annotated[float, typer.Option(help="Time for all of it; parts that do not fit are skipped.")] = 8.0,
    vectors: Annotated[int, typer.Option(help="How many.")] = 21_015_324,
    dimension: Annotated[int, typer.Option(help="Numbers in a vector.")] = 768,
    only: Annotated[list[str] | None, typer.Option(help=f"Parts: {', '.join(SECONDS_WANTED)}; all by default.")] = None,
) -> None:
    """Run everything and print it; what is done is written before the next part begins.

    Ends with an error, after all parts, if one of them had one.
    """
    begun = time.perf_counter()
    if unknown := set(only or ()) - set(SECONDS_WANTED):
        raise typer.BadParameter(f"unknown {', '.join(sorted(unknown))}; choose some of {', '.join(SECONDS_WANTED)}")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"device={device!r}, but torch {torch.__version__} sees no GPU; take --device cpu")
    parts = parts_of(SMALL if small else FULL, vectors, dimension, device)
    figures: dict[str, Any] = where() | {"device": gpu_parts.device_name(device), "torch": torch.__version__}
    figures |= {"small": small}
    for name in only or parts:
        left = 60 * minutes - (time.perf_counter() - begun)
        figures[name] = guarded(parts[name], 0 if small else SECONDS_WANTED[name], left)
        figures["seconds"] = round(time.perf_counter() - begun, 1)
        console.print_json(data={name: figures[name]})
        if out is not None:
            write_json(out, figures)
    if failed := [name for name, own in figures.items() if isinstance(own, dict) and "error" in own]:
        console.print(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
