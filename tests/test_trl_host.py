"""Our environments, channels, estimators and losses inside TRL's real GRPOTrainer, against our own trainer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("trl", reason="TRL is not installed: pip install 'agentgym_ig[trl]'")

from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOTrainer, SFTTrainer

from agentgym_ig.envs import SearchVectorEnv, rollout
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES
from agentgym_ig.lm.encode import OBSERVED
from agentgym_ig.lm.tiny import tiny_tokenizer
from agentgym_ig.trainers import Recipe, recipe
from agentgym_ig.trainers.experience import experience
from agentgym_ig.trainers.recipes import with_kl
from agentgym_ig.trainers.tinywiki import tiny_recipe
from agentgym_ig.trainers.trl_checks import check_settings, check_trl
from agentgym_ig.trainers.trl_host import SearchGRPOTrainer, question_dataset, trl_settings
from agentgym_ig.trainers.trl_rows import check_same_rows, hosted
from agentgym_ig.types import Stop
from tests.fakes import QUESTIONS, BrokenIndex
from tests.rank_runs import run_in_two
from tests.runs import begun, fresh, paid_env, same, scored, updating, weights
from tests.test_collect import Flaky
from tests.tiny import tiny_env
from tests.trl_hosts import EACH, ROWS, batch, config, everything, host, shared

# Of transformers, about what TRL asks it for.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_.*able)?. is deprecated:FutureWarning")


@pytest.fixture
def trainer(tmp_path: Path) -> SearchGRPOTrainer:
    return host(tmp_path)


def mask(made: dict[str, Any]) -> Tensor:
    own: Tensor = (made["completion_mask"] * made["tool_mask"]).bool()
    return own


def real(made: dict[str, Any], part: str, row: int) -> list[int]:
    ids: list[int] = made[f"{part}_ids"][row][made[f"{part}_mask"][row].bool()].tolist()
    return ids


@pytest.mark.parametrize("name", ["igpo", "grpo", "gipo"])
def test_rows_hold_exactly_what_was_sampled(name: str, tmp_path: Path) -> None:
    trainer = host(tmp_path, name, temperature=0.8, pad_to_multiple_of=8)
    made = batch(trainer)
    assert trainer.hosted is not None
    episodes = trainer.hosted.episodes
    assert len(episodes) == len(made["completion_ids"]) == ROWS
    assert [own.question.id for own in episodes] == [
        trainer.train_dataset[row // EACH]["question"] for row in range(12)
    ]
    for row, episode in enumerate(episodes):
        encoded = trainer.sampler.encoder.encode(episode.conversation)
        prompt, completion = (real(made, part, row) for part in ("prompt", "completion"))
        assert prompt + completion == encoded.ids
        sampled = [token for turn in episode.turns for token in turn.action.token_ids]
        assert made["completion_ids"][row][mask(made)[row]].tolist() == sampled
        assert len(prompt) + mask(made)[row].nonzero()[0, 0] == encoded.turn.index(0)
    assert (made["completion_mask"].bool() & ~mask(made)).any(1).sum() > 4  # replies are there and masked


def test_sampled_log_probabilities_are_those_that_trl_reads(tmp_path: Path) -> None:
    trainer = host(tmp_path, temperature=0.8)
    made = batch(trainer)
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    real = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
    with torch.no_grad():
        read, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, real, made["completion_ids"].shape[1]
        )
    own = mask(made)
    assert_close(made["sampling_per_token_logps"][own], read[own], atol=1e-4, rtol=0)
    assert read[own].std() > 0.1  # there is something to agree about


def test_the_episodes_are_those_of_our_own_policy(tmp_path: Path) -> None:
    trainer, run = host(tmp_path), fresh(tmp_path / "own", env=paid_env(5))
    batch(trainer)
    assert trainer.hosted is not None
    for ours, theirs in zip(rollout(run.env, run.policy, trainer._starts()), trainer.hosted.episodes, strict=True):
        assert (ours.conversation, ours.stop, ours.group) == (theirs.conversation, theirs.stop, theirs.group)
        assert [turn.rewards for turn in ours.turns] == [turn.rewards for turn in theirs.turns]
        for one, other in zip(ours.turns, theirs.turns, strict=True):
            assert one.action.logprobs == pytest.approx(other.action.logprobs, abs=1e-4)


NAMES = ["igpo", "grpo", "igpo+gipo", "gigpo", "igpo-gae", "reinforce++-baseline", "drgrpo"]


@pytest.mark.parametrize("name", NAMES)
def test_advantages_are_those_of_our_trainer(name: str, tmp_path: Path) -> None:
    trainer = host(tmp_path, name)
    made = batch(trainer)
    assert trainer.hosted is not None
    run = fresh(tmp_path / "own", tiny_recipe(name), env=paid_env())
    ours = scored(run, episodes=trainer.hosted.episodes)
    learned = experience(ours, run.recipe.estimator(ours))
    for row, own in enumerate(learned.columns["advantages"]):
        sampled = torch.tensor(learned.encoded[row].turn) != OBSERVED
        assert_close(made["advantages"][row][mask(made)[row]], own[sampled], atol=1e-5, rtol=1e-4)
    assert made["advantages"].shape == made["completion_ids"].shape
    assert (made["advantages"][mask(made)] != 0).any()
    assert not made["advantages"][~mask(made)].any()


THREE = {"gradient_accumulation_steps": 3, "gradient_checkpointing": True}
UPDATES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "igpo, kl, entropy": (everything(), {}),
    "grpo": (tiny_recipe("grpo"), {}),
    "gipo": (tiny_recipe("igpo+gipo"), {}),
    "in parts": (replace(everything(), aggregation="token-mean"), THREE),
    "dr.grpo": (tiny_recipe("drgrpo"), {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("name", UPDATES)
def test_two_updates_on_a_batch_are_those_of_our_trainer(name: str, tmp_path: Path) -> None:
    chosen, settings = UPDATES[name]
    parts, rate = settings.get("gradient_accumulation_steps", 1), 0.1
    trainer = host(
        tmp_path,
        chosen,
        rate=rate,
        num_iterations=2,
        max_steps=2,
        per_device_train_batch_size=ROWS // parts,
        **settings,
    )
    trainer.train()
    assert trainer.hosted is not None
    run = fresh(tmp_path / "own", chosen, env=paid_env(), epochs=2, micro_batch=5)
    learner = begun(run, rate=rate)
    before = weights(run.policy.model)
    ours = scored(run, learner, trainer.hosted.episodes)
    figures = updating(run, learner)(experience(ours, run.recipe.estimator(ours)), 0)
    assert figures["updates"] == 2
    moved = 0.0
    for key, own in run.policy.model.state_dict().items():
        assert_close(trainer.model.state_dict()[key], own, atol=1e-5, rtol=0)
        moved = max(moved, float((own - before[key]).abs().max()))
    assert moved > 5e-4
    steps = [row for row in trainer.state.log_history if "policy_loss" in row]
    for term in ("policy_loss", "kl_loss", "entropy_loss", "ratio", "trust", "grad_norm"):
        if term in figures:
            assert sum(row[term] for row in steps) / 2 == pytest.approx(figures[term], abs=1e-4)


def test_a_correction_for_the_engine_weighs_the_policy_loss_alone(tmp_path: Path) -> None:
    trainer = host(tmp_path, everything())
    made = batch(trainer)
    made["ref_per_token_logps"] = made["ref_per_token_logps"] - 0.5  # so that there is a KL
    whole = trainer._compute_loss(trainer.model, made).item()
    parts = {name: trainer._metrics["train"][name][0] for name in ("policy_loss", "kl_loss", "entropy_loss")}
    assert whole == pytest.approx(sum(parts.values()), abs=1e-6)
    assert min(map(abs, parts.values())) > 1e-4
    half = trainer._compute_loss(trainer.model, made | {"importance_sampling_ratio": torch.full((ROWS, 1), 0.5)})
    assert half.item() == pytest.approx(whole - parts["policy_loss"] / 2, abs=1e-6)


def test_several_updates_share_a_generation_batch(tmp_path: Path) -> None:
    trainer = host(tmp_path, per_device_train_batch_size=ROWS // 4, steps_per_generation=4, max_steps=4)
    before = weights(trainer.model)
    trainer.train()
    assert not same(before, weights(trainer.model))
    assert batch(trainer)["token_weights"].sum() == pytest.approx(4)  # of each update 1, on average


def test_training_raises_the_reward(tmp_path: Path) -> None:
    whole = tiny_env()
    env = SearchVectorEnv(whole.index, list(whole.questions.values())[:2], 32, TINYWIKI_RULES)
    chosen = replace(tiny_recipe("igpo+gipo"), aggregation="token-mean")
    trainer = host(
        tmp_path, chosen, env=env, num_generations=16, per_device_train_batch_size=32, max_steps=12, learning_rate=1e-3
    )
    trainer.train()
    outcome = [row["outcome"] for row in trainer.state.log_history if "outcome" in row]
    assert sum(outcome[-3:]) / 3 > sum(outcome[:3]) / 3 + 0.2


def test_failed_episodes_are_masked_counted_and_left_out(tmp_path: Path) -> None:
    whole = tiny_env()
    env = SearchVectorEnv(Flaky(whole.index), list(whole.questions.values()), 5, TINYWIKI_RULES)
    trainer = host(tmp_path, env=env)
    made = batch(trainer)
    assert trainer.hosted is not None
    failed = torch.tensor([own.stop.failed for own in trainer.hosted.episodes])
    assert 0 < failed.sum() < ROWS
    assert not mask(made)[failed].any()
    assert not made["advantages"][failed].any()
    assert not made["token_weights"][failed].any()
    assert mask(made)[~failed].any(1).all()
    assert made["token_weights"].sum() == pytest.approx(1)
    assert trainer._metrics["train"]["episodes_failed"] == [int(failed.sum())]
    run = fresh(tmp_path / "own", tiny_recipe("igpo"), env=tiny_env())
    ours = scored(run, episodes=[own for own in trainer.hosted.episodes if not own.stop.failed])
    kept = experience(ours, run.recipe.estimator(ours)).columns["advantages"]
    assert_close(made["advantages"].sum(), torch.cat(list(kept)).sum(), atol=1e-4, rtol=1e-4)


def test_an_episode_without_a_turn_has_one_masked_token(trainer: SearchGRPOTrainer) -> None:
    batch(trainer)
    assert trainer.hosted is not None
    first, *others = trainer.hosted.episodes
    made = hosted(trainer._run(), [replace(first, turns=(), stop=Stop.SEARCH_FAILED), *others], 0, 7)
    assert made.failed == 1
    assert (made.rows[0].completion_ids, made.rows[0].own, made.rows[0].advantages) == ([7], [0], [0.0])
    assert [row.completion_ids for row in made.rows[1:]] == [row.completion_ids for row in trainer.hosted.rows[1:]]


def test_a_batch_that_failed_as_a_whole_changes_nothing(tmp_path: Path) -> None:
    trainer = host(
        tmp_path, env=SearchVectorEnv(BrokenIndex(), QUESTIONS, ROWS, TINYWIKI_RULES), rate=0.1, num_generations=6
    )
    before = weights(trainer.model)
    trainer.train()
    log = next(row for row in trainer.state.log_history if "episodes_failed" in row)
    if log["episodes_failed"] == ROWS:
        assert same(before, weights(trainer.model))
    assert log["episodes_failed"] > 0
    assert torch.tensor(log["grad_norm"]).isfinite()


def test_evaluation_plays_its_own_groups_and_changes_nothing(tmp_path: Path) -> None:
    env = paid_env()
    asked = question_dataset(env, list(env.questions)[:3])
    trainer = host(tmp_path, env=env, eval_dataset=asked, num_generations_eval=2, per_device_eval_batch_size=4)
    before = weights(trainer.model)
    found = trainer.evaluate()
    assert same(before, weights(trainer.model))
    assert {"eval_em", "eval_info_gain", "eval_episodes_failed", "eval_policy_loss"} <= found.keys()
    assert trainer.hosted is not None
    assert [own.group for own in trainer.hosted.episodes] == [0, 0]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_continuous_batching_gives_the_same_kind_of_rows(tmp_path: Path) -> None:
    paged = {"num_blocks": 64, "max_batch_tokens": 512}
    trainer = host(tmp_path, use_transformers_continuous_batching=True, transformers_continuous_batching_config=paged)
    made = batch(trainer)
    assert trainer.hosted is not None
    assert "sampling_per_token_logps" not in made
    for row, episode in enumerate(trainer.hosted.episodes):
        assert made["completion_ids"][row][mask(made)[row]].tolist() == [
            token for turn in episode.turns for token in turn.action.token_ids
        ]
        for turn in episode.turns[:-1]:
            assert turn.action.text.count("</search>") <= 1  # cut behind the tag that ends a turn


def test_an_adapter_is_trained_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    chosen = replace(everything(), entropy=0.0)
    trainer = host(tmp_path, chosen, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, own in weights(trainer.model).items() if not torch.equal(own, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    one = shared(tmp_path, 1)
    one.train()
    run_in_two("tests.trl_hosts", tmp_path, 2, timeout=300)
    two, own = load_file(tmp_path / "weights.safetensors"), one.model.state_dict()
    for name, tensor in two.items():
        assert_close(own[name], tensor, atol=1e-5, rtol=0)
    logs = [one.state.log_history, json.loads((tmp_path / "log.json").read_text())]
    for mine, theirs in zip(*logs, strict=True):
        for name in ("policy_loss", "kl_loss", "entropy", "ratio", "em", "turns", "info_gain", "tokens_per_episode"):
            assert theirs.get(name) == pytest.approx(mine.get(name), abs=1e-4)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no column": ({"train_dataset": Dataset.from_dict({"prompt": ["What is it?"]})}, "no column question"),
    "a critic": ({"chosen": with_kl(recipe("ppo"), 0.0)}, "trains a critic"),
    "a penalty": ({"chosen": recipe("reinforce++")}, "reads the reference model"),
    "sampling again": ({"chosen": tiny_recipe("dapo")}, "draws groups without signal again"),
    "verdicts": ({"chosen": tiny_recipe("self-guide")}, "add_channel"),
    "a loss of TRL's": ({"loss_type": "dr_grpo", "epsilon": 0.1}, "loss_type='dr_grpo', epsilon=0.1 would have no"),
    "another distribution": ({"top_p": 0.9}, "top_p=0.9 would sample from another"),
    "truncation": ({"mask_truncated_completions": True}, "leave it out"),
    "another beta": ({"beta": 0.1}, "the recipe's kl is 0.0"),
    "half an update": ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, "no multiple"),
    "aliases": ({"aliases": "some"}, "aliases"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_together_is_refused(name: str, tmp_path: Path) -> None:
    settings, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        host(tmp_path, **settings)


def test_rows_that_are_no_groups_are_refused(trainer: SearchGRPOTrainer) -> None:
    rows = [trainer.train_dataset[row // EACH] for row in range(ROWS)]
    with pytest.raises(ValueError, match="7 rows, which are no whole groups; wanted each question 4 times"):
        trainer._generate_and_score_completions(rows[:7])
    with pytest.raises(ValueError, match="rows 0 to 3 are about"):
        trainer._generate_and_score_completions(rows[2:10])
    with pytest.raises(ValueError, match="no `question` but prompt"):
        trainer._generate_and_score_completions([{"prompt": "What?"}] * EACH)
    with pytest.raises(ValueError, match="no question 'nobody' among 40"):
        trainer._generate_and_score_completions([{"prompt": "What?", "question": "nobody"}] * EACH)


def test_a_process_with_half_a_group_is_refused(tmp_path: Path) -> None:
    args = config(tmp_path, tiny_recipe("grpo"), num_generations=3)
    args.num_generations = 5  # of 12 rows, as where TRL shares groups of 5 among processes
    with pytest.raises(ValueError, match="no whole groups of num_generations=5"):
        check_settings(args, tiny_recipe("grpo"))


def test_a_router_is_refused(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sparse = {"num_key_value_heads": 1, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer), head_dim=8, **size, **sparse)
    )
    with pytest.raises(ValueError, match=r"set router_aux_loss_coef=0\.0"):
        host(tmp_path, model=model, processing_class=tokenizer)


def test_rows_that_trl_has_changed_are_noticed(trainer: SearchGRPOTrainer) -> None:
    made = batch(trainer)
    assert trainer.hosted is not None
    check_same_rows(made, trainer.hosted.rows)
    turned = [*trainer.hosted.rows[1:], trainer.hosted.rows[0]]
    for rows in (turned, trainer.hosted.rows[:-1]):
        with pytest.raises(RuntimeError, match="does not hold the prompts of the"):
            check_same_rows(made, rows)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        host(tmp_path, processing_class=tokenizer)


def test_another_trl_is_refused() -> None:
    check_trl("1.16.0", GRPOTrainer)
    for version in ("1.15.2", "2.0.0"):
        with pytest.raises(ImportError, match=f"found trl {version}; wanted trl>=1.16,<2"):
            check_trl(version, GRPOTrainer)
    with pytest.raises(ImportError, match=r"SFTTrainer\.__init__ without reward_funcs, rollout_func"):
        check_trl("1.99.0", SFTTrainer)


def test_the_python_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "trl.md").read_text()
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "trl.md", "exec"), {})
    assert "train_loss" in capsys.readouterr().out


def test_settings_are_the_recipes() -> None:
    assert trl_settings(recipe("igpo")) == {"beta": 0.001, "learning_rate": 1e-6, "num_generations": 16}
