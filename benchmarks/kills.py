"""A training run killed with SIGKILL at ten random moments and resumed, against the same run left alone.

    python -m benchmarks.kills --recipe igpo --out benchmarks/results/kills.json

Each process lives up to three steps beyond the first that it has finished, so that kills fall into rollouts, updates
and the writing of checkpoints. Metrics, but for times, and the final weights must be equal bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
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
SETTINGS = ["--steps", "60", "--questions-per-step", "4", "--group-size", "8", "--save-every", "3"]
SETTINGS += ["--updates-per-step", "2", "--replay", "1", "--warmup-steps", "5", "--schedule", "cosine"]


def start(recipe: str, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "agentgym_ig", "train", "--recipe", recipe, "--out", str(out), *SETTINGS, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run ended with status {process.returncode}: {errors.decode()[-500:]}")


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows(out)]


def killed(recipe: str, out: Path, most: float, rng: np.random.Generator) -> list[dict[str, float]]:
    """Play the run with kills, each up to `most` seconds after a process has written its first metrics; returns how
    long after, and how many steps there were then.
    """
    kills: list[dict[str, float]] = []
    for number in range(KILLS):
        process = start(recipe, out, *(["--resume"] if number else []))
        written = lines(out)
        while lines(out) <= written and process.poll() is None:
            time.sleep(0.01)
        moment = float(rng.uniform(0.0, most))
        time.sleep(moment)
        if process.poll() is not None:
            finish(process)
            raise RuntimeError(f"the run was over before kill {number + 1} of {KILLS}; give it more steps")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills.append({"after_s": round(moment, 3), "steps": lines(out)})
    finish(start(recipe, out, "--resume"))
    return kills


def lines(out: Path) -> int:
    """Whole lines of metrics."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(
    recipe: Annotated[str, typer.Option(help="Any recipe.")] = "igpo",
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
) -> None:
    """Kill, resume, compare."""
    with tempfile.TemporaryDirectory() as scratch:
        alone, hunted = Path(scratch) / "alone", Path(scratch) / "hunted"
        finish(start(recipe, alone))
        seconds = [sum(row[name] for name in row if name.endswith("_s")) for row in rows(alone)]
        # A life comes four steps ahead at most, of which those since the last checkpoint are lost: sixty are enough.
        kills = killed(recipe, hunted, 3 * statistics.median(seconds), np.random.default_rng(seed))
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
