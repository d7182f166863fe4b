"""The training loop: it learns, it resumes exactly, and nothing that should not matter matters."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from agentgym_ig import CheckpointError, Stop
from agentgym_ig.envs import SearchVectorEnv
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES
from agentgym_ig.trainers import GRPO, IGPO, RECIPES, Run, TrainConfig, recipe, train
from agentgym_ig.trainers.batch import Experience
from agentgym_ig.trainers.checkpoint import checkpoints
from agentgym_ig.trainers.loop import METRICS_FILE, draw_starts, score_episodes, train_step, update
from agentgym_ig.trainers.tinywiki import WARM_START, load_policy_model, tiny_policy
from tests.fakes import QUESTIONS, BrokenIndex
from tests.tiny import play, tiny_env

SMALL = TrainConfig(
    steps=4,
    questions_per_step=3,
    group_size=4,
    learning_rate=5e-4,
    aggregation="token-mean",
    micro_batch=64,
    save_every=1,
)


def fresh(out: Path, name: str = "igpo", **changes: Any) -> Run:
    return Run(
        tiny_policy(*load_policy_model(WARM_START)), tiny_env(12), RECIPES[name], name, replace(SMALL, **changes), out
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def log(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def test_training_raises_the_reward(tmp_path: Path) -> None:
    run = fresh(tmp_path, steps=12, questions_per_step=4, group_size=8, save_every=12, learning_rate=1e-3)
    one_hop = list(run.env.questions.values())[:2]
    run = replace(run, env=SearchVectorEnv(run.env.index, one_hop, 32, TINYWIKI_RULES))
    train(run)
    outcome = [row["outcome"] for row in log(tmp_path)]
    assert sum(outcome[-3:]) / 3 > sum(outcome[:3]) / 3 + 0.2


@pytest.mark.parametrize("name", RECIPES)
def test_stopped_and_resumed_equals_never_stopped(name: str, tmp_path: Path) -> None:
    whole = fresh(tmp_path / "whole", name)
    train(whole)
    train(fresh(tmp_path / "parts", name, steps=2))
    resumed = fresh(tmp_path / "parts", name)
    train(resumed, resume=True)
    for key, tensor in weights(whole.policy.model).items():
        assert torch.equal(resumed.policy.model.state_dict()[key], tensor), key
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    last = [checkpoints(tmp_path / part / "checkpoints")[-1] / "optimizer.safetensors" for part in ("whole", "parts")]
    states = [load_file(path) for path in last]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


TRAIN = [sys.executable, "-m", "agentgym_ig", "train", "--steps", "6", "--questions-per-step", "2", "--group-size", "4"]
TRAIN += ["--save-every", "1", "--out"]


def started(out: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*TRAIN, str(out), *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_and_an_interrupted_one_end_as_one_left_alone(tmp_path: Path) -> None:
    finish(started(tmp_path / "alone"))
    for name, number in (("killed", signal.SIGKILL), ("interrupted", signal.SIGINT)):
        process = started(tmp_path / name)
        wait_for(tmp_path / name / "checkpoints", "step-000002/state.json", process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        if number == signal.SIGINT:
            assert process.returncode == 130, output
            assert "--resume" in output
        else:
            assert process.returncode == -signal.SIGKILL
        finish(started(tmp_path / name, "--resume"))
        ends = [load_file(tmp_path / part / "model" / "model.safetensors") for part in ("alone", name)]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
        assert log(tmp_path / name) == log(tmp_path / "alone")


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    after = []
    for size in (64, 5, 1):
        run = fresh(tmp_path / str(size), micro_batch=size)
        optimizer = torch.optim.SGD(run.policy.model.parameters(), lr=0.1)
        train_step(run, optimizer, 0)
        after.append(weights(run.policy.model))
    for other in after[1:]:
        for key, tensor in after[0].items():
            assert_close(other[key], tensor, atol=2e-6, rtol=0)


def test_only_sampled_tokens_have_a_gradient(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    episodes, encoded, old = score_episodes(run, play(8))
    silent = torch.zeros(len(episodes), 5)
    optimizer = torch.optim.SGD(run.policy.model.parameters(), lr=0.1)
    before = weights(run.policy.model)
    stats = update(run, optimizer, Experience(encoded, old, silent), 0)
    assert stats["tokens"] == sum(len(turn.action.token_ids) for episode in episodes for turn in episode.turns)
    assert stats["grad_norm"] == 0.0
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(run.policy.model).items())


def test_the_first_update_is_on_policy(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    episodes, encoded, old = score_episodes(run, play(8))
    learned = Experience(encoded, old, run.recipe(episodes))
    stats = update(run, torch.optim.SGD(run.policy.model.parameters(), lr=0.0), learned, 0)
    assert stats["clip_fraction"] == 0.0


def test_scoring_fills_in_the_channel_and_gains_telescope(tmp_path: Path) -> None:
    episodes, _, _ = score_episodes(fresh(tmp_path), play(16))
    for episode in episodes:
        assert len(episode.belief) == len(episode.turns)
        assert episode.channel("info_gain")[-1] is None
        assert episode.total("info_gain") == pytest.approx(episode.belief[-1] - episode.belief[0], abs=1e-6)
    plain, _, _ = score_episodes(fresh(tmp_path, "grpo"), play(4))
    assert all(episode.belief == () for episode in plain)


def test_failed_searches_are_counted_and_left_out(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    run = replace(run, env=SearchVectorEnv(BrokenIndex(), QUESTIONS, 12, TINYWIKI_RULES))
    before = weights(run.policy.model)
    metrics = train_step(run, torch.optim.SGD(run.policy.model.parameters(), lr=0.1), 0)
    assert metrics["episodes"] + metrics["episodes_failed"] == 12
    assert metrics["episodes_failed"] > 0
    if metrics["episodes"] == 0:
        assert all(torch.equal(before[key], tensor) for key, tensor in weights(run.policy.model).items())


def test_starts_depend_on_seed_and_step_alone() -> None:
    questions = [f"q{i}" for i in range(10)]
    assert draw_starts(questions, SMALL, 3) == draw_starts(questions, SMALL, 3)
    assert draw_starts(questions, SMALL, 3) != draw_starts(questions, SMALL, 4)
    starts = draw_starts(questions, SMALL, 0)
    assert len(starts) == 12
    assert len({start.seed for start in starts}) == 12
    assert [start.group for start in starts] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({start.question for start in starts}) == 3


def test_recipes_need_what_they_need() -> None:
    episodes = play(8)
    assert GRPO()(episodes).shape == (8, max(len(episode.turns) for episode in episodes))
    with pytest.raises(ValueError, match="score it first"):
        IGPO()(episodes)
    with pytest.raises(ValueError, match="grpo, igpo"):
        recipe("ppo2")


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    run = fresh(tmp_path, steps=2, save_every=2)
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"ste')  # as SIGKILL may leave it
    with pytest.raises(FileExistsError):
        train(run)
    train(run, resume=True)
    assert [row["step"] for row in log(tmp_path)] == [1, 2]


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train(fresh(tmp_path / "run"), resume=True)
    train(fresh(tmp_path / "run", steps=1))
    with pytest.raises(FileExistsError, match="--resume"):
        train(fresh(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"learning_rate=0.0005 \(now 0.1\)"):
        train(fresh(tmp_path / "run", learning_rate=0.1), resume=True)
    other = fresh(tmp_path / "run")
    from tests.tiny import untrained

    other = replace(other, policy=tiny_policy(untrained("llama"), other.policy.encoder.tokenizer))
    with pytest.raises(CheckpointError, match="of another model"):
        train(other, resume=True)
    (checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="delete it to go on from an older one"):
        train(fresh(tmp_path / "run"), resume=True)


def test_checkpoints_are_hub_folders_without_pickle_and_the_last_few_are_kept(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    train(run)
    kept = checkpoints(tmp_path / "checkpoints")
    assert [folder.name for folder in kept] == ["step-000003", "step-000004"]
    model, _ = load_policy_model(str(kept[-1]))
    assert all(torch.equal(weights(run.policy.model)[key], tensor) for key, tensor in weights(model).items())
    assert {path.suffix for path in kept[-1].iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 1}, "group_size=1"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"clip": 1.5}, "clip"),
        ({"aggregation": "mean"}, "token-mean, seq-mean-token-mean"),
        ({"aliases": "best"}, "first, max, mean"),
        ({"updates_per_step": 999}, "cannot be cut"),
    ],
)
def test_settings_are_checked_at_birth(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_a_greedy_policy_cannot_be_trained(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    run.policy.temperature = 0.0
    with pytest.raises(ValueError, match="samples no alternatives"):
        train(run)


def test_several_updates_per_step_visit_every_episode_once(tmp_path: Path) -> None:
    run = fresh(tmp_path, updates_per_step=3)
    metrics = train_step(run, torch.optim.SGD(run.policy.model.parameters(), lr=0.1), 0)
    assert metrics["episodes"] == 12
    assert metrics["tokens"] > 0
    assert Stop.SEARCH_FAILED not in {episode.stop for episode in play(4)}
