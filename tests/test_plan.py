"""The planner against real models: parameters and bytes exactly, peaks within a band, and what it says on a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from agentgym_ig.prompts import PROMPTS
from agentgym_ig.trainers import footprint
from agentgym_ig.trainers.adapters import with_lora
from agentgym_ig.trainers.footprint import Held, Sketch, activations, counts, reading, sketch
from agentgym_ig.trainers.learner import checkpoint_layers
from agentgym_ig.trainers.plan import (
    GPUS,
    Gpu,
    Job,
    gpu_of,
    longest_context,
    plan,
    step_flops,
    usable,
    what_to_lower,
    within_model,
)
from benchmarks.plan import SHAPES, Case, compared
from tests.conftest import Command
from tests.tiny import FAMILIES, untrained


def sketched(family: str, lora_rank: int | None = None) -> Sketch:
    return Sketch(untrained(family).config.to_json_string(use_diff=False), lora_rank)


def real(family: str, lora_rank: int | None = None) -> Any:
    model = type(untrained(family))(untrained(family).config)
    return model if lora_rank is None else with_lora(model, rank=lora_rank, alpha=2 * lora_rank)


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_real_model(family: str, lora_rank: int | None) -> None:
    found, model = counts(sketched(family, lora_rank)), real(family, lora_rank)
    assert found.parameters == sum(own.numel() for own in model.parameters())
    assert found.trained == sum(own.numel() for own in model.parameters() if own.requires_grad)
    assert found.outside + len(model.get_decoder().layers) * found.layer == found.parameters
    plain = untrained(family)
    trunk = sum(own.numel() for own in plain.get_decoder().parameters())
    assert found.trunk == trunk + plain.config.hidden_size + 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "lora_rank"), [("qwen3", None), ("llama", 4), ("gemma3_text", None)])
def test_activations_are_those_of_a_real_pass(family: str, lora_rank: int | None, checkpointing: bool) -> None:
    model = real(family, lora_rank).eval()
    if checkpointing:
        checkpoint_layers(model)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))
    ids = torch.zeros(3, 96, dtype=torch.long)
    with Held(model) as held:
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        kept = held.now
        hidden.backward(torch.empty_like(hidden))
    found = activations(sketched(family, lora_rank), 3, 96, checkpointing=checkpointing)
    # A fake tensor lives a little longer than a real one: until the dispatcher, too, has let go of it.
    assert held.peak <= found <= 1.0001 * held.peak, (found, held.peak)
    assert found >= kept > 0


@pytest.mark.parametrize("tokens", [16, 256])  # with few tokens the embedding's gradient is the highest point
@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"checkpointing": True}, {"bf16": True, "checkpointing": True}]
)
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_a_deep_model_is_known_from_a_shallow_one(
    lora_rank: int | None, options: dict[str, bool], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model("qwen3", **SHAPES["small"])
    deep = Sketch(config.to_json_string(use_diff=False), lora_rank)
    quick = activations.__wrapped__(deep, 2, tokens, **options)
    read = reading.__wrapped__(deep, 2, tokens, bf16=options.get("bf16", False), masked=True)
    monkeypatch.setattr(footprint, "_alike", lambda own: 0)  # all six layers
    assert activations.__wrapped__(deep, 2, tokens, **options) == quick
    assert reading.__wrapped__(deep, 2, tokens, bf16=options.get("bf16", False), masked=True) == read


def test_key_value_cache_by_hand() -> None:
    # untrained llama: 2 layers, 2 key-value heads of 8; keys and values
    assert reading(sketched("llama"), 3, 50, bf16=False, masked=False).cached == 2 * 2 * 2 * 8 * 3 * 50
    masked, plain = (reading(sketched("llama"), 3, 500, bf16=False, masked=own).beside for own in (True, False))
    assert masked - plain >= 3 * 500 * 500  # a byte for each pair of tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(shape="small"),
        Case(shape="small", checkpointing=True, reference=True),
        Case(shape="small", lora_rank=16, family="qwen2"),
        Case(shape="small", critic=True, family="llama"),
    ],
    ids=["full", "checkpointed-kl", "lora", "critic"],
)
def test_planned_memory_is_what_a_process_takes(case: Case) -> None:
    row = compared(case)
    assert row["bytes_equal"]
    assert all(0.8 <= own["ratio"] <= 1.3 for own in row["phases"].values()), row


JOB = Job(model=sketched("qwen2"), context=600, episodes=32, micro_batch=8, rollout_batch=16, reference=True)


def test_rows_of_a_plan_by_hand() -> None:
    own, found = counts(JOB.model), plan(JOB)
    assert found.weights == found.gradients == found.reference == 4 * own.parameters
    assert found.optimizer == 8 * own.parameters
    assert found.critic == found.gathered == found.rollout_copy == 0
    resident = 16 * own.parameters
    assert found.phases["update"] == resident + found.gradients + found.activations + found.logits
    assert found.phases["rollout"] == resident + found.cache + found.sampling
    assert found.tokens == 32 * 600
    adapted = plan(replace(JOB, model=sketched("qwen2", 4)))
    assert adapted.reference == 0
    assert adapted.gradients == 4 * adapted.counts.trained < found.gradients
    with_critic = plan(replace(JOB, critic=True))
    assert with_critic.critic == 12 * own.trunk
    assert with_critic.activations > found.activations


def test_what_the_sampler_keeps_by_hand() -> None:
    own, found = counts(JOB.model), plan(replace(JOB, turn=40))
    token = 2 * 2 * 2 * 8 * 4  # 2 layers, 2 key-value heads of 8, keys and values in float32
    sampled = (1.25 * 16 + 4) * 600 * token  # 16 at one time, of which four are copied out together
    assert found.cache == sampled + 32 * 600 * token
    full = plan(replace(JOB, turn=40, max_cached_tokens=1000))
    assert full.cache == sampled + 1000 * token
    assert full.sampling > found.sampling > 16 * own.vocabulary * 40  # whole conversations are read anew


def test_parts_and_copies_on_several_gpus() -> None:
    one, four = plan(JOB), plan(replace(JOB, gpus=4, shard="fsdp"))
    assert [four.weights, four.gradients, four.optimizer, four.reference] == [
        own // 4 for own in (one.weights, one.gradients, one.optimizer, one.reference)
    ]
    assert four.rollout_copy == one.weights
    assert four.gathered == 4 * (one.counts.outside + 2 * one.counts.layer)
    copies = plan(replace(JOB, gpus=4))
    assert (copies.weights, copies.gathered, copies.rollout_copy) == (one.weights, 0, 0)
    assert copies.job.sampled == 8  # of 32 episodes on 4 GPUs
    assert sum(copies.flops.values()) == sum(one.flops.values())


def test_flops_by_hand() -> None:
    own = counts(JOB.model)
    dense, attention = 2 * own.multiplied * 600, 2 * (2 * 4 * 8) * 600**2  # 2 layers, 4 heads of 8
    found = step_flops(JOB, own)
    assert found["rollout"] == 32 * (dense + attention)
    assert found["scoring"] == 2 * found["rollout"]  # the reference reads it too
    assert found["update"] == 3 * found["rollout"]
    assert step_flops(replace(JOB, checkpointing=True, passes=2), own)["update"] == 2 * 4 * found["rollout"]
    h100 = plan(JOB).seconds(GPUS["h100"])
    assert h100 == pytest.approx(6 * found["rollout"] / (0.4 * 989e12))
    assert plan(JOB).seconds(Gpu("24 GB", 24)) is None


def test_what_to_lower_is_enough_or_says_not() -> None:
    most = plan(JOB).peak[1]
    assert what_to_lower(JOB, Gpu("large", 2 * most / 1e9)) == []
    gpu = Gpu("small", 0.2 * most / 1e9)
    assert not plan(JOB).fits(gpu)
    said = what_to_lower(JOB, gpu)
    changes: dict[str, Any] = {"--bf16": {"bf16": True}, "--gradient-checkpointing": {"checkpointing": True}}
    milder = JOB
    for option in said:
        name, _, value = option.partition(" ")
        milder = replace(milder, **changes.get(name) or {name[2:].replace("-", "_"): int(value)})
    assert plan(milder).fits(gpu), said
    assert "still too much" in what_to_lower(JOB, Gpu("none", 1e-6))[-1]


def test_gpus_by_name_and_size() -> None:
    assert gpu_of("H200") == GPUS["h200"]
    assert usable(gpu_of("24")) == 0.9 * 24e9
    for wrong in ("h300", "0", "-3", ""):
        with pytest.raises(ValueError, match=r"a100-80, .*or give its memory in GB"):
            gpu_of(wrong)
    with pytest.raises(ValueError, match="micro_batch=0 must be 1 or more"):
        replace(JOB, micro_batch=0)
    with pytest.raises(ValueError, match="choose one of ddp, fsdp"):
        replace(JOB, shard="zero")


def test_longest_context_by_hand() -> None:
    texts = PROMPTS["search-r1"]
    opening = len(texts.opening("?" * 100, 5)[0].text) // 4
    rules = {"max_turns": 5, "top_k": 3, "max_new_tokens": 500}
    assert longest_context(texts, max_observation=None, **rules) == (opening + 5 * 500 + 4 * 3 * 200, 3 * 200)
    assert longest_context(texts, max_observation=500, **rules) == (opening + 5 * 500 + 500, max(opening, 500))
    # An action may have three queries.
    three, reply = longest_context(PROMPTS["igpo"], max_observation=None, **rules)
    assert three > 5 * 500 + 4 * 3 * 3 * 200
    assert reply == 3 * 3 * 200
    assert within_model(10**6, JOB.model) == 2048
    assert within_model(100, JOB.model) == 100


def test_dry_run_of_a_folder_without_weights(command: Command, indexed: Path) -> None:
    untrained("qwen2").config.save_pretrained(indexed / "bare")
    (indexed / "run").mkdir()
    (indexed / "run" / "metrics.jsonl").write_text(json.dumps({"tokens_per_episode": 41.0}) + "\n")
    arguments = ["train", "--dry-run", "--model", indexed / "bare", "--suite", "igpo", "--recipe", "igpo"]
    arguments += ["--max-turns", 2, "--micro-batch", 3, "--index", indexed / "index", "--out", indexed / "run"]
    code, printed = command(*arguments, "--gpu", "h100")
    assert code == 0, printed
    printed = " ".join(printed.split())  # wherever a narrow terminal breaks lines
    for wanted in ("h100: fits", "3 x", "keys and values", "reference copy", "TFLOP/s: arithmetic", "512 episodes"):
        assert wanted in printed
    assert "written per episode" in printed
    assert "41" in printed
    code, printed = command(*arguments, "--gpu", "0.01")
    assert "does not fit" in printed
    assert "--micro-batch 1" in printed
    code, printed = command(*arguments)
    assert "Give --gpu NAME" in printed
    assert sorted(path.name for path in (indexed / "run").iterdir()) == ["metrics.jsonl"]


def test_errors_of_a_dry_run(command: Command, tmp_path: Path) -> None:
    for arguments, wanted in (
        (["--dry-run", "--model", tmp_path / "none"], "config.json"),
        (["--dry-run", "--gpu", "h300"], "unknown GPU 'h300'"),
        (["--dry-run", "--index", tmp_path / "none"], "agentgym-ig index build"),
        ([], "give --out FOLDER"),
        (["--gpus", 2, "--out", tmp_path / "run"], "this run has 1 process"),
    ):
        code, printed = command("train", *arguments)
        assert code == 1
        assert wanted in printed
    with pytest.raises(FileNotFoundError, match="give a folder"):
        sketch(str(tmp_path))
