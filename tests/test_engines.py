"""Generation engines: the same actions from each, what dies is started again, and where they disagree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agentgym_ig.commands.parts import open_engine
from agentgym_ig.envs import Start, rollout
from agentgym_ig.errors import EngineFailed
from agentgym_ig.lm.continuous import ContinuousPolicy
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.trainers import pad, token_logprobs
from benchmarks.engines import bare, conversations, endless, engines
from tests.conftest import Command
from tests.runs import log
from tests.test_cache_reuse import adam, assert_same, longer, opening
from tests.tiny import shipped_policy, tiny_env, untrained


def continuous(model: object, temperature: float = 0.0, new: int = 16) -> ContinuousPolicy:
    return ContinuousPolicy(
        model,
        tiny_tokenizer(),
        temperature=temperature,
        max_new_tokens=new,
        max_cached_tokens=8192,
        max_batch_tokens=256,
    )


def transformers(model: object, temperature: float = 0.0) -> TransformersPolicy:
    return TransformersPolicy(model, tiny_tokenizer(), temperature=temperature, max_new_tokens=16)


@pytest.mark.parametrize("family", ["shipped", "llama", "qwen2"])
def test_continuous_batching_says_greedily_what_transformers_does(family: str) -> None:
    model = shipped_policy().model if family == "shipped" else untrained(family)
    kernel = model.config._attn_implementation
    ids = list(tiny_env().questions)
    starts = [Start(ids[number], number, number) for number in range(10)]
    episodes = rollout(tiny_env(6), continuous(model), starts)
    wanted = rollout(tiny_env(6), transformers(model), starts)
    for own, each in zip(episodes, wanted, strict=True):
        assert_same([turn.action for turn in own.turns], [turn.action for turn in each.turns])
        assert [turn.action.text for turn in own.turns] == [turn.action.text for turn in each.turns]
    assert model.config._attn_implementation == kernel
    assert not hasattr(model, "_cached_continuous_batching_manager")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_continuous_batching_samples_from_the_models_distribution_and_says_how_likely(temperature: float) -> None:
    model = untrained("llama")
    policy = continuous(model, temperature)
    one_token = continuous(model, temperature, new=1)
    talks = [replace(opening(3), seed=seed) for seed in range(600)]
    chosen = [own.token_ids[0] for own in one_token(talks) if own]
    context = policy.encoder.encode(talks[0]).ids
    expected = (model(torch.tensor([context])).logits[0, -1].detach() / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor(chosen), minlength=len(expected))
    common = expected * 600 >= 10
    chi2 = ((counts - 600 * expected).square() / (600 * expected))[common].sum()
    assert common.sum() >= 5
    assert chi2 < common.sum() + 5 * (2 * common.sum()).sqrt()
    talks = [opening(seed) for seed in range(4)]
    actions = policy(talks)
    played = [longer(own, action, 0) for own, action in zip(talks, actions, strict=True)]
    encoded = [policy.encoder.encode(own) for own in played]
    batch = pad(encoded)
    logprobs = token_logprobs(model, batch, temperature).detach()
    for row, action in enumerate(actions):
        assert action is not None
        assert logprobs[row][batch.sampled[row]].tolist() == pytest.approx(action.logprobs, abs=1e-4)


def test_a_running_engine_reads_with_new_weights_at_once() -> None:
    model = tiny_model(3).eval()
    policy = continuous(model)
    talks = [opening(seed) for seed in range(3)]
    state = torch.random.get_rng_state()
    with policy.session():
        after = [longer(own, action, 9) for own, action in zip(talks, policy(talks), strict=True)]
        before = policy(after)
        adam(model)
        later = policy(after)
    assert_same(later, transformers(model)(after))
    assert [own and own.logprobs for own in later] != [own and own.logprobs for own in before]
    assert torch.equal(state, torch.random.get_rng_state())


def test_continuous_batching_that_dies_can_be_started_again() -> None:
    model = untrained("llama")
    policy = continuous(model)
    talks = [opening(seed) for seed in range(3)]
    whole = policy(talks)

    def break_down(*_: object) -> None:
        raise RuntimeError("no memory left")

    with policy.session():
        policy(talks)
        hook = model.model.layers[0].register_forward_pre_hook(break_down)
        with pytest.raises(EngineFailed, match="no memory left"):
            policy(talks)
        hook.remove()
        policy.restart()
        assert_same(policy(talks), whole)
    with pytest.raises(ValueError, match="max_cached_tokens=10"):
        ContinuousPolicy(model, tiny_tokenizer(), max_cached_tokens=10)
    assert policy([]) == []


def test_the_benchmark_of_engines_runs() -> None:
    model = tiny_model(3).eval()
    figures = engines(model, 3, 5, continuous=True)
    assert figures["rollout_over_engine"] == pytest.approx(
        figures["rollout_tokens_per_s"] / figures["engine_tokens_per_s"], rel=0.02
    )
    assert figures["continuous_tokens_per_s"] > 0
    contexts = [shipped_policy().encoder.encode(own).ids for own in conversations(3)]
    assert len(set(map(len, contexts))) == 3
    assert bare(model, contexts, 5)().shape == (3, max(map(len, contexts)) + 5)
    assert [len(own.token_ids) for own in endless(transformers(model))(conversations(3)) if own] == [16] * 3


def test_training_takes_the_engine_that_is_asked_for(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ["train", "--recipe", "grpo", "--steps", 1, "--questions-per-step", 1, "--group-size", 2, "--out", out]
    code, printed = command(*train, "--engine", "server")
    assert code == 1
    assert "eval --server URL" in printed
    assert not out.exists()
    code, printed = command(*train, "--engine", "continuous", "--importance-cap", 2)
    assert code == 0, printed
    (metrics,) = log(out)
    assert metrics["engine_logprob_gap_max"] < 1e-4
    assert metrics["episodes"] == 2
    with pytest.raises(ValueError, match="unknown engine 'vllm'; choose transformers or continuous"):
        open_engine("vllm", None, None, temperature=1.0, max_new_tokens=1, batch_size=1, max_cached_tokens=1)
