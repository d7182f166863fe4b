"""Several processes train as one: real ones, started as users start them, that meet over loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from agentgym_ig.records import METRICS_FILE
from agentgym_ig.trainers import ranks
from agentgym_ig.trainers.checkpoint import checkpoints
from tests.rank_runs import LEFT, TWO, run_in_two

STEPS = 3
TRAIN = ["train", "--questions-per-step", "3", "--group-size", "4", "--micro-batch", "4", "--updates-per-step", "2"]
RECIPES = {
    "igpo+gipo": ["--recipe", "igpo+gipo", "--kl", "0.01", "--entropy", "0.001", "--replay", "1"],
    "ppo": ["--recipe", "ppo", "--seed", "3"],
    "lora": ["--recipe", "igpo", "--lora-rank", "4", "--kl", "0.01"],
}


def launcher(kind: str) -> list[str]:
    """What starts a module in one process, or two: by torchrun, or by accelerate with the shards that we ship."""
    if kind == "one":
        return [sys.executable, "-m"]
    if kind == "two":
        return TWO
    config = str(files("agentgym_ig") / "launch" / "fsdp.yaml")
    settings = ["--config_file", config, "--num_processes", "2", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *settings, "-m"]


def started(kind: str, out: Path, *more: str, steps: int = STEPS) -> subprocess.Popen[str]:
    command = [
        *launcher(kind),
        "agentgym_ig" if kind == "one" else "tests.rank_runs",
        *TRAIN,
        "--steps",
        str(steps),
        "--out",
        str(out),
        *more,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def trained(kind: str, out: Path, *more: str, steps: int = STEPS) -> Path:
    process = started(kind, out, *more, steps=steps)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert kind != "two" or output.count(f"{LEFT} []") == 2, output
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in found]


def assert_as_one(out: Path, one: Path, *, within: float = 1e-5) -> None:
    assert len(rows(out)) == len(rows(one))
    for own, wanted in zip(rows(out), rows(one), strict=True):
        assert own.keys() == wanted.keys()
        for name, value in wanted.items():
            assert own[name] == pytest.approx(value, abs=within, rel=within), name
    weights, wanted_weights = (load_file(own / "model" / "model.safetensors") for own in (out, one))
    assert weights.keys() == wanted_weights.keys()
    for name, value in wanted_weights.items():
        assert_close(weights[name], value, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_and_two_shards_train_as_one(name: str, tmp_path: Path) -> None:
    one = trained("one", tmp_path / "one", *RECIPES[name])
    assert min(row["grad_norm"] for row in rows(one)) > 1e-3
    assert_as_one(trained("two", tmp_path / "two", *RECIPES[name]), one)
    assert_as_one(trained("shards", tmp_path / "shards", *RECIPES[name]), one)


@pytest.mark.slow
def test_a_rank_that_dies_stops_all_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    alone = trained("one", tmp_path / "alone", "--save-every", "1", steps=4)
    killed = tmp_path / "killed"
    process = started("shards", killed, "--save-every", "1", steps=4)
    deadline = time.monotonic() + 200
    while not checkpoints(killed / "checkpoints"):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks_of_it = [own for own in psutil.Process(process.pid).children(recursive=True) if "train" in own.cmdline()]
    ranks_of_it[-1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0, output
    assert len(checkpoints(killed / "checkpoints")) >= 1
    assert not (killed / "model").exists()
    trained("one", killed, "--save-every", "1", "--resume", steps=4)
    assert_as_one(killed, alone, within=1e-4)


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    run_in_two("tests.rank_runs", "failing", tmp_path, timeout=200)
    assert [row["skipped_updates"] for row in rows(tmp_path / "run")] == [0, 1, 0]
    assert [row["updates"] for row in rows(tmp_path / "run")] == [1, 0, 1]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_shares_have_every_row_once_and_about_as_many_tokens(lengths: list[int], parts: int) -> None:
    found = ranks.shares(lengths, parts)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in rows) for rows in found]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_passes_hold_every_row_once_and_no_more_than_allowed(lengths: list[int], size: int) -> None:
    found = ranks.micro_batches(lengths, size)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    assert max(map(len, found)) <= size
    ordered: Sequence[int] = [lengths[row] for rows in found for row in rows]
    assert list(ordered) == sorted(ordered)


def test_one_rank_has_nobody_to_ask() -> None:
    assert ranks.gather({"a": [1.5]}) == [{"a": [1.5]}]
    assert ranks.sums({"a": 2.0}) == {"a": 2.0}
    assert ranks.first()
