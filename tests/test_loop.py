"""The training loop: it learns, it neither overwrites nor mixes runs, and whatever ends it, it goes on from there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from agentgym_ig import CheckpointError
from agentgym_ig.envs import SearchVectorEnv
from agentgym_ig.envs.channels import SelfGuide
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES
from agentgym_ig.envs.wrappers import add_channel
from agentgym_ig.records import METRICS_FILE
from agentgym_ig.trainers import PARTS, recipe, train
from agentgym_ig.trainers.checkpoint import checkpoints
from agentgym_ig.trainers.loop import prepare, train_step
from tests.runs import fresh, log, paid_env, same, weights
from tests.tiny import tiny_env


def test_training_raises_the_reward(tmp_path: Path) -> None:
    plain = replace(recipe("igpo"), kl=0.0, entropy=0.0, aggregation="token-mean")
    run = fresh(tmp_path, plain, steps=12, questions_per_step=4, group_size=8, save_every=12, learning_rate=1e-3)
    one_hop = list(run.env.questions.values())[:2]
    run = replace(run, env=SearchVectorEnv(tiny_env().index, one_hop, 32, TINYWIKI_RULES))
    train(run)
    outcome = [row["outcome"] for row in log(tmp_path)]
    assert sum(outcome[-3:]) / 3 > sum(outcome[:3]) / 3 + 0.2


@pytest.mark.parametrize("name", PARTS)
def test_every_recipe_takes_a_step(name: str, tmp_path: Path) -> None:
    chosen = replace(recipe(name), sampling_rounds=min(recipe(name).sampling_rounds, 2))
    run = fresh(tmp_path, chosen, env=add_channel(paid_env(), SelfGuide(), weight=0.0))
    learner, _ = prepare(run)
    before = weights(run.policy.model)
    metrics = train_step(run, learner, 0)
    assert (metrics["step"], metrics["updates"], metrics["skipped_updates"]) == (1, 1, 0)
    assert metrics["grad_norm"] > 0
    assert not same(before, weights(run.policy.model))
    assert ("kl_loss" in metrics) == (chosen.kl > 0)
    assert ("entropy_loss" in metrics) == (chosen.entropy > 0)
    assert ("value_loss" in metrics) == ("critic_grad_norm" in metrics) == ("values" in chosen.needs)
    assert {"rollout_s", "score_s", "update_s"} <= set(metrics)


def test_metrics_say_what_the_batch_was_like(tmp_path: Path) -> None:
    train(fresh(tmp_path, env=paid_env(), steps=2, evaluate_every=2))
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["episodes"] == row["episodes_played"] == 12
        assert row["reward"] == pytest.approx(row["outcome"] - 0.1 * row["searches"], abs=1e-9)
        assert row["tokens"] == row["tokens_per_episode"] * 12
        assert 0 <= row["em"] <= 1
        assert row["turns"] > row["searches"] > 0
        assert isinstance(row["alarms"], list)


def test_evaluations_and_progress_come_when_they_should(tmp_path: Path) -> None:
    seen: list[int] = []
    run = fresh(tmp_path, "grpo", env=paid_env(), evaluate_every=2)
    run = replace(run, evaluate=lambda policy: {"same": policy is run.policy})
    train(run, progress=lambda done, metrics: seen.append(done))
    assert seen == [1, 2, 3, 4]
    assert ["evaluation" in row for row in log(tmp_path)] == [False, True, False, True]
    assert log(tmp_path)[1]["evaluation"] == {"same": True}


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    run = fresh(tmp_path, steps=2, save_every=2)
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"ste')  # as SIGKILL may leave it
    with pytest.raises(FileExistsError):
        train(run)
    train(run, resume=True)
    assert [row["step"] for row in log(tmp_path)] == [1, 2]


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train(fresh(tmp_path / "run"), resume=True)
    train(fresh(tmp_path / "run", steps=1))
    with pytest.raises(FileExistsError, match="--resume"):
        train(fresh(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"learning_rate=0.0005 \(now 0.1\)"):
        train(fresh(tmp_path / "run", learning_rate=0.1), resume=True)
    done = train(fresh(tmp_path / "run", steps=1), resume=True)  # nothing is left to do but to write the model
    assert same(
        load_file(done / "model.safetensors"),
        load_file(checkpoints(tmp_path / "run" / "checkpoints")[-1] / "model.safetensors"),
    )
    (tmp_path / "run" / METRICS_FILE).write_text("")
    with pytest.raises(CheckpointError, match=METRICS_FILE):
        train(fresh(tmp_path / "run"), resume=True)


def test_a_greedy_policy_cannot_be_trained(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    run.policy.temperature = 0.0
    with pytest.raises(ValueError, match="samples no alternatives"):
        train(run)


def test_a_guided_recipe_wants_its_channel(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SelfGuide"):
        train(fresh(tmp_path, "self-guide"))


STEPS = 10
TRAIN = [sys.executable, "-m", "agentgym_ig", "train", "--steps", str(STEPS), "--questions-per-step", "2"]
TRAIN += ["--group-size", "4", "--recipe", "igpo+gipo", "--replay", "1", "--kl", "0.01"]


def started(out: Path, save_every: int, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    asked = [*TRAIN, "--save-every", str(save_every), "--out", str(out), *more]
    return subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_steps(out: Path, count: int) -> bool:
    return not count or ((out / METRICS_FILE).exists() and (out / METRICS_FILE).read_bytes().count(b"\n") >= count)


def seconds_of_a_step(out: Path) -> float:
    rows = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return float(min(row["rollout_s"] + row["score_s"] + row["update_s"] for row in rows))


def assert_as_alone(out: Path, alone: Path) -> None:
    assert same(*(load_file(own / "model" / "model.safetensors") for own in (out, alone)))
    assert log(out) == log(alone)
    assert len(log(out)) == STEPS
    ends = [checkpoints(own / "checkpoints")[-1] for own in (out, alone)]
    for file in ("optimizer.safetensors", "replay-0.safetensors"):
        assert same(*(load_file(own / file) for own in ends))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_or_interrupted_ends_as_one_left_alone(tmp_path: Path) -> None:
    finish(started(tmp_path / "alone", 2))
    rng, killed = random.Random(5), tmp_path / "killed"
    for steps in (0, 2, 5):  # anywhere from there: while it starts, in a step, in a checkpoint
        process = started(killed, 2, *(["--resume"] if killed.exists() else []))
        wait_for(partial(has_steps, killed, steps), process)
        time.sleep(rng.uniform(0.0, 2 * seconds_of_a_step(tmp_path / "alone")))
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        finish(process, -signal.SIGKILL)
    finish(started(killed, 2, "--resume"))
    assert_as_alone(killed, tmp_path / "alone")

    interrupted = tmp_path / "interrupted"
    process = started(interrupted, 1)
    wait_for((interrupted / "checkpoints" / "step-000002" / "state.json").exists, process)
    process.send_signal(signal.SIGINT)
    assert "--resume" in finish(process, 130)
    finish(started(interrupted, 1, "--resume"))
    assert_as_alone(interrupted, tmp_path / "alone")
