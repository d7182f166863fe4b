"""Checkpoints: a run that was stopped goes on as if it had not been, and none goes on as another."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agentgym_ig import CheckpointError
from agentgym_ig.envs import SearchVectorEnv
from agentgym_ig.envs.channels import Format, SelfGuide
from agentgym_ig.envs.rollout import VectorSearch
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES
from agentgym_ig.envs.wrappers import add_channel
from agentgym_ig.trainers import IGPO, Recipe, Run, recipe, train
from agentgym_ig.trainers.adapters import adapter_state, base_weights, merged, with_lora
from agentgym_ig.trainers.checkpoint import FORMAT, checkpoints, read_state, restore, save_checkpoint
from agentgym_ig.trainers.loop import prepare, train_step
from agentgym_ig.trainers.losses import gipo_loss
from agentgym_ig.trainers.tinywiki import load_policy_model, tiny_policy
from tests.runs import fresh, log, paid_env, same, weights
from tests.tiny import tiny_env, untrained


def guided_env() -> VectorSearch:
    return add_channel(paid_env(12), SelfGuide())


class Stopped(Exception):
    """As if the machine had."""


def stop_at(step: int, done: int, metrics: dict[str, Any]) -> None:
    if done == step:
        raise Stopped


DAPO = replace(recipe("dapo"), sampling_rounds=3)
LORA = {"adapt": with_lora}
CASES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "igpo": (recipe("igpo"), {}),
    "ppo": (recipe("ppo"), {"updates_per_step": 2}),
    "gipo with replay": (recipe("gipo"), {"replay": 2, "epochs": 2, "updates_per_step": 2, "steps": 4}),
    "dapo": (DAPO, {"save_every": 2}),
    "self-guide": (recipe("self-guide"), {"env": guided_env}),
    "lora": (replace(recipe("grpo"), kl=0.1), LORA),
    "cosine": (recipe("igpo+gipo"), {"schedule": "cosine", "warmup_steps": 2}),
    "bf16": (recipe("igpo-gigpo"), {"schedule": "linear", "bf16": True, "gradient_checkpointing": True}),
}


def case(name: str, out: Path) -> Run:
    chosen, changes = CASES[name]
    env = changes.get("env", paid_env)()
    return fresh(out, chosen, **{"steps": 3} | changes | {"env": env})


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_resumed_equals_never_stopped(name: str, tmp_path: Path) -> None:
    whole = case(name, tmp_path / "whole")
    before = weights(whole.policy.model)
    train(whole)
    with pytest.raises(Stopped):  # after that step's metrics and before its checkpoint
        train(case(name, tmp_path / "parts"), progress=partial(stop_at, whole.config.steps))
    assert len(log(tmp_path / "parts")) == whole.config.steps
    assert read_state(checkpoints(tmp_path / "parts" / "checkpoints")[-1])["step"] < whole.config.steps
    resumed = case(name, tmp_path / "parts")
    train(resumed, resume=True)
    assert same(weights(whole.policy.model), weights(resumed.policy.model))
    assert not same(before, weights(whole.policy.model))
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    one, other = (checkpoints(tmp_path / part / "checkpoints")[-1] for part in ("whole", "parts"))
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    assert all(same(load_file(one / file), load_file(other / file)) for file in files)
    assert read_state(one) == read_state(other)
    wanted = {
        "ppo": "critic.safetensors",
        "gipo with replay": "replay-1.safetensors",
        "lora": "adapter_model.safetensors",
    }
    assert wanted.get(name, "optimizer.safetensors") in files


@pytest.mark.parametrize("replay", [0, 1, 2, 3])
def test_so_many_earlier_batches_are_learned_from_again(replay: int, tmp_path: Path) -> None:
    run = fresh(tmp_path, "gipo", env=paid_env(), replay=replay)
    learner, settings = prepare(run)
    kept: list[Any] = []
    for step in range(5):
        earlier = sum(turn >= 0 for batch in learner.replay for own in batch.encoded for turn in own.turn)
        metrics = train_step(run, learner, step)
        assert metrics["tokens"] == earlier + metrics["tokens_per_episode"] * metrics["episodes"]
        assert len(learner.replay) == min(step + 1, replay)
        assert learner.replay[:-1] == kept[1:] if len(kept) == replay else learner.replay[:-1] == kept
        kept = list(learner.replay)
    folder = save_checkpoint(tmp_path / "checkpoints", 5, learner, settings)
    again, _ = prepare(fresh(tmp_path, "gipo", env=paid_env(), replay=replay))
    assert restore(folder, again, settings) == 5
    assert len(again.replay) == replay
    for one, other in zip(learner.replay, again.replay, strict=True):
        assert same(one.tensors(), other.tensors())
        assert one.encoded == other.encoded


def saved(run: Run) -> Path:
    learner, settings = prepare(run)
    return save_checkpoint(run.out / "checkpoints", 1, learner, settings, keep=run.config.keep)


def resumed(folder: Path, run: Run) -> int:
    learner, settings = prepare(run)
    return restore(folder, learner, settings)


def other_env(**changes: Any) -> VectorSearch:
    rules = replace(TINYWIKI_RULES, **{name: value for name, value in changes.items() if name != "questions"})
    asked = list(tiny_env().questions.values())[: changes.get("questions")]
    return add_channel(SearchVectorEnv(tiny_env().index, asked, 12, rules), Format(name="form"), weight=0.5)


PLAIN = replace(recipe("igpo"), kl=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.1}, r"learning_rate=0.0005 \(now 0.1\)"),
        ({"seed": 1, "group_size": 6}, r"group_size=4 \(now 6\), seed=0 \(now 1\)"),
        ({"schedule": "cosine"}, "schedule='constant_with_warmup'"),
        ({"replay": 1, "epochs": 2}, r"epochs=1 \(now 2\), replay=0 \(now 1\)"),
        ({"bf16": True}, r"bf16=False \(now True\)"),
        ({"chosen": replace(PLAIN, loss=gipo_loss)}, "gipo_loss"),
        ({"chosen": replace(PLAIN, loss=partial(gipo_loss, sigma=0.5))}, "'sigma': 0.5"),
        ({"chosen": replace(PLAIN, estimator=IGPO(gamma=0.5))}, "'gamma': 0.5"),
        ({"env": other_env(questions=8)}, "questions="),
        ({"env": other_env(max_turns=4)}, "rules="),
        ({"env": other_env(weights={"outcome": 2.0})}, "rules="),
        ({"env": tiny_env()}, "channels="),
        ({"env": add_channel(tiny_env(), Format(name="form"), weight=0.25)}, "channels="),
    ],
)
def test_a_run_with_other_settings_is_not_this_run(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(fresh(tmp_path, PLAIN, env=other_env()))
    with pytest.raises(CheckpointError, match=f"with other settings: .*{message}.*repeat them"):
        resumed(folder, fresh(tmp_path, **{"chosen": PLAIN, "env": other_env()} | change))


def test_what_a_policy_samples_with_is_a_setting(tmp_path: Path) -> None:
    folder = saved(fresh(tmp_path))
    for name, value in {"temperature": 0.5, "max_new_tokens": 8}.items():
        run = fresh(tmp_path)
        setattr(run.policy, name, value)
        with pytest.raises(CheckpointError, match=name):
            resumed(folder, run)


def test_settings_that_change_no_step_may_differ(tmp_path: Path) -> None:
    folder = saved(fresh(tmp_path))
    free: dict[str, Any] = {
        "micro_batch": 3,
        "save_every": 7,
        "keep": 9,
        "evaluate_every": 3,
        "max_skipped_updates": 0,
        "steps": 99,
    }
    assert resumed(folder, fresh(tmp_path, **free)) == 1


@pytest.mark.parametrize(("chosen", "schedule"), [("grpo", "cosine"), ("self-guide", "constant_with_warmup")])
def test_how_many_steps_is_a_setting_where_something_depends_on_it(chosen: str, schedule: str, tmp_path: Path) -> None:
    folder = saved(fresh(tmp_path, chosen, env=guided_env(), schedule=schedule))
    with pytest.raises(CheckpointError, match=r"steps=4 \(now 5\)"):
        resumed(folder, fresh(tmp_path, chosen, env=guided_env(), schedule=schedule, steps=5))


def moved(adapt: Any = None) -> Any:
    """The shipped model with one weight changed."""

    def change(model: Any) -> Any:
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-3
        return adapt(model) if adapt else model

    return change


@pytest.mark.parametrize(("chosen", "adapt"), [("grpo", None), ("ppo", None), ("dapo", with_lora)])
def test_other_first_weights_are_refused_where_they_count(chosen: str, adapt: Any, tmp_path: Path) -> None:
    folder = saved(fresh(tmp_path, chosen, adapt=adapt))
    assert resumed(folder, fresh(tmp_path, chosen, adapt=adapt)) == 1
    with pytest.raises(CheckpointError, match="base_weights"):
        resumed(folder, fresh(tmp_path, chosen, adapt=moved(adapt)))


def test_without_a_reference_only_the_saved_weights_count(tmp_path: Path) -> None:
    first = fresh(tmp_path, "dapo")
    folder, run = saved(first), fresh(tmp_path, "dapo", adapt=moved())
    assert resumed(folder, run) == 1
    assert same(weights(run.policy.model), weights(first.policy.model))


def test_another_model_format_or_damage_is_refused(tmp_path: Path) -> None:
    folder = saved(fresh(tmp_path))
    run = fresh(tmp_path)
    other = replace(run, policy=tiny_policy(untrained("llama"), run.policy.encoder.tokenizer))
    with pytest.raises(CheckpointError, match="of another model"):
        resumed(folder, other)
    with pytest.raises(CheckpointError, match="of another model"):
        resumed(folder, fresh(tmp_path, adapt=with_lora))
    state = json.loads((folder / "state.json").read_text())
    for found in (1, FORMAT + 1):
        (folder / "state.json").write_text(json.dumps(state | {"format": found}))
        with pytest.raises(CheckpointError, match=f"of format {found}, wanted {FORMAT}"):
            resumed(folder, run)
    for damaged in ("{", "[]", "{}", ""):
        (folder / "state.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="delete it to go on from an older one"):
            resumed(folder, run)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_few_are_kept(keep: int, tmp_path: Path) -> None:
    learner, settings = prepare(fresh(tmp_path))
    (tmp_path / "checkpoints" / "step-000009").mkdir(parents=True)  # not whole: it holds no state
    for step in range(1, 6):
        save_checkpoint(tmp_path / "checkpoints", step, learner, settings, keep=keep)
    kept = checkpoints(tmp_path / "checkpoints")
    assert [folder.name for folder in kept] == [f"step-{step:06d}" for step in range(6 - keep, 6)]
    assert [read_state(folder)["step"] for folder in kept] == list(range(6 - keep, 6))
    assert not (tmp_path / "checkpoints" / ".partial").exists()


def test_checkpoints_are_hub_folders_without_pickle(tmp_path: Path) -> None:
    run = fresh(tmp_path, "ppo", env=paid_env(), steps=1, replay=1)
    train(run)
    (folder,) = checkpoints(tmp_path / "checkpoints")
    for place in (folder, tmp_path / "model"):
        model, _ = load_policy_model(str(place))
        assert same(weights(run.policy.model), weights(model))
        assert {path.suffix for path in place.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_with_an_adapter_it_alone_is_trained_and_the_model_is_whole_in_the_end(tmp_path: Path) -> None:
    run = fresh(tmp_path, replace(recipe("igpo"), kl=0.1), adapt=partial(with_lora, rank=4), env=paid_env(), steps=2)
    model = run.policy.model
    first = {name: own.clone() for name, own in base_weights(model).items()}
    adapter = adapter_state(model)
    train(run)
    assert same(first, base_weights(model))
    assert not same(adapter, adapter_state(model))
    assert log(tmp_path)[0]["kl_loss"] == pytest.approx(0.0, abs=1e-8)
    assert log(tmp_path)[1]["kl_loss"] != 0.0
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same(weights(merged(model)), weights(final))
    assert not same(first, weights(final))
    folder = checkpoints(tmp_path / "checkpoints")[-1]
    assert not (folder / "model.safetensors").exists()
    assert same(load_file(folder / "adapter_model.safetensors"), adapter_state(model))
