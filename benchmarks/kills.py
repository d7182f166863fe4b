"""A training run killed with SIGKILL at ten random moments and resumed, against the same run left alone.

    python -m benchmarks.kills --recipe igpo --out benchmarks/results/kills.json

Moments are drawn over the whole life of a process, its start-up included. Metrics, but for times, and the final weights
must be equal bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from safetensors.torch import load_file

from agentgym_ig.commands.console import console
from agentgym_ig.records import write_json
from benchmarks.measure import where

KILLS = 10
SETTINGS = ["--steps", "40", "--questions-per-step", "4", "--group-size", "8", "--save-every", "3"]
SETTINGS += ["--updates-per-step", "2", "--replay", "1", "--warmup-steps", "5", "--schedule", "cosine"]


def start(recipe: str, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "agentgym_ig", "train", "--recipe", recipe, "--out", str(out), *SETTINGS, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run ended with status {process.returncode}: {errors.decode()[-500:]}")


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def killed(recipe: str, out: Path, lifetime: float, rng: np.random.Generator) -> list[dict[str, float]]:
    """Play the run with kills; returns when each came, in seconds of its process, and after how many steps."""
    kills: list[dict[str, float]] = []
    while len(kills) < KILLS:
        begun = (out / "metrics.jsonl").exists()
        process = start(recipe, out, *(["--resume"] if begun else []))
        moment = float(rng.uniform(0.0, lifetime))
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            lines = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
            kills.append({"after_s": round(moment, 2), "steps": lines})
        else:
            finish(process)
            break
    finish(start(recipe, out, "--resume"))
    return kills


def main(
    recipe: Annotated[str, typer.Option(help="Any recipe.")] = "igpo",
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
) -> None:
    """Kill, resume, compare."""
    with tempfile.TemporaryDirectory() as scratch:
        alone, hunted = Path(scratch) / "alone", Path(scratch) / "hunted"
        begun = time.perf_counter()
        finish(start(recipe, alone))
        # Every life is at most this long, so that ten kills come before the end.
        lifetime = 0.35 * (time.perf_counter() - begun)
        kills = killed(recipe, hunted, lifetime, np.random.default_rng(seed))
        ends = [load_file(path / "model" / "model.safetensors") for path in (alone, hunted)]
        result = where() | {
            "recipe": recipe,
            "kills": kills,
            "weights_equal": all(bool((ends[0][name] == ends[1][name]).all()) for name in ends[0]),
            "metrics_equal": metrics(alone) == metrics(hunted),
            "steps": len(metrics(hunted)),
        }
    console.print_json(data=result)
    if out is not None:
        write_json(out, result)
    if not (result["weights_equal"] and result["metrics_equal"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
