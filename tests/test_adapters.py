"""LoRA: an adapted model is sampled from, scored, saved and trained as the plain one that it amounts to."""

import copy
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig

from agentgym_ig.lm.encode import ConversationEncoder
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.trainers.adapters import (
    adapter_state,
    base_weights,
    is_adapted,
    load_adapter_state,
    merged,
    with_lora,
    without_adapter,
)
from agentgym_ig.trainers.batch import TokenBatch, pad
from agentgym_ig.trainers.scoring import Scorer, token_logprobs
from tests.tiny import FAMILIES, play, untrained

ENCODER = ConversationEncoder(tiny_tokenizer())
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}


def trained(model: Any, **settings: Any) -> Any:
    """The model with an adapter that changes it, as training would."""
    adapted = with_lora(model, **settings)
    draw = torch.Generator().manual_seed(1)
    load_adapter_state(
        adapted,
        {name: own + 0.1 * torch.randn(own.shape, generator=draw) for name, own in adapter_state(adapted).items()},
    )
    return adapted


def family(name: str) -> Any:
    return copy.deepcopy(untrained(name))


def episodes() -> TokenBatch:
    return pad([ENCODER.encode(own.conversation) for own in play(4)])


def everything(model: Any) -> dict[str, torch.Tensor]:
    return {name: own.clone() for name, own in model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapted_model_is_read_as_the_merged_one(name: str) -> None:
    base, adapted = family(name), trained(family(name), rank=4, alpha=8)
    plain, batch = merged(adapted), episodes()
    with torch.no_grad():
        before, own, other = (token_logprobs(model, batch, 0.7) for model in (base, adapted, plain))
    assert (own - before).abs().max() > 0.1  # the comparison is about something
    assert_close(own, other, **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapted_model_believes_what_the_merged_one_does(name: str) -> None:
    adapted = trained(family(name), rank=4, alpha=8)
    conversations = [own.conversation for own in play(2)]
    encoded, answers = [ENCODER.encode(own) for own in conversations], ["Amber Ashford", "1984"]
    own, other = (Scorer(model, ENCODER, PROMPTS["igpo"]) for model in (adapted, merged(adapted)))
    scored, plain = own.score(encoded, [answers] * 2), other.score(encoded, [answers] * 2)
    for conversation, one, two in zip(conversations, scored, plain, strict=True):
        assert_close(torch.tensor(one.beliefs), torch.tensor(two.beliefs), **CLOSE)
        assert_close(one.logprobs, two.logprobs, **CLOSE)
        forced = torch.tensor(own.reference_beliefs(conversation, answers))
        assert_close(torch.tensor(one.beliefs), forced, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapted_model_says_what_the_merged_one_does(name: str) -> None:
    adapted = trained(family(name), rank=4, alpha=8)
    own, other = (
        play(4, TransformersPolicy(model, tiny_tokenizer(), max_new_tokens=12)) for model in (adapted, merged(adapted))
    )
    base = play(4, TransformersPolicy(family(name), tiny_tokenizer(), max_new_tokens=12))
    assert [each.conversation for each in own] == [each.conversation for each in other]
    assert [each.conversation for each in own] != [each.conversation for each in base]
    for one, two in zip(own, other, strict=True):
        for mine, theirs in zip(one.turns, two.turns, strict=True):
            assert_close(torch.tensor(mine.action.logprobs), torch.tensor(theirs.action.logprobs), **CLOSE)


def test_what_an_adapted_model_sampled_is_read_back_as_it_was_sampled() -> None:
    adapted = trained(family("qwen3"))
    for episode in play(4, TransformersPolicy(adapted, tiny_tokenizer(), max_new_tokens=12)):
        batch = pad([ENCODER.encode(episode.conversation)])
        with torch.no_grad():
            read = token_logprobs(adapted, batch, wanted=batch.sampled)[batch.sampled]
        assert_close(torch.tensor([own for turn in episode.turns for own in turn.action.logprobs or ()]), read, **CLOSE)


def test_a_fresh_adapter_changes_nothing_in_either_mode() -> None:
    batch, model = episodes(), family("qwen3")
    with torch.no_grad():
        before = token_logprobs(model, batch)
        adapted = with_lora(model)
        assert not adapted.training
        assert torch.equal(token_logprobs(adapted, batch), before)
        assert torch.equal(token_logprobs(adapted.train(), batch), before)


def test_only_the_adapter_is_trained() -> None:
    adapted, batch = with_lora(family("qwen3"), rank=2), episodes()
    base, before = {name: own.clone() for name, own in base_weights(adapted).items()}, adapter_state(adapted)
    optimizer = torch.optim.AdamW(
        [weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2, weight_decay=0
    )
    token_logprobs(adapted, batch).sum().backward()
    optimizer.step()
    assert all(torch.equal(own, base[name]) for name, own in base_weights(adapted).items())
    moved = {name for name, own in adapter_state(adapted).items() if not torch.equal(own, before[name])}
    assert moved == {name for name in before if "lora_B" in name}  # A has no gradient while B is 0
    assert base.keys() == family("qwen3").state_dict().keys()


def test_the_gradient_is_that_of_the_merged_weights_projected() -> None:
    adapted = trained(family("qwen3"), rank=3, alpha=6).double()
    plain, batch, scale = merged(adapted), episodes(), 6 / 3
    for model in (adapted, plain):
        token_logprobs(model, batch).sum().backward()
    weights = dict(adapted.get_base_model().named_parameters())
    for name, weight in plain.named_parameters():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in weights:
            a, b = (weights[f"{stem}.lora_{side}.default.weight"] for side in "AB")
            assert weight.grad is not None
            assert_close(b.grad, scale * weight.grad @ a.T)
            assert_close(a.grad, scale * b.T @ weight.grad)


def test_merging_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = family("qwen3")
    model.generation_config = GenerationConfig(eos_token_id=[3, 4], repetition_penalty=1.1)
    adapted, batch = trained(model), episodes()
    play(2, TransformersPolicy(adapted, tiny_tokenizer(), max_new_tokens=2))  # sets the inner model's aside
    before = everything(adapted)
    plain = merged(adapted)
    after = everything(adapted)
    assert before.keys() == after.keys()
    assert all(torch.equal(own, after[name]) for name, own in before.items())
    assert not {own.data_ptr() for own in adapted.parameters()} & {own.data_ptr() for own in plain.parameters()}
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight  # tied as before

    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert loaded.state_dict().keys() == tiny_model().state_dict().keys()
    assert loaded.generation_config.eos_token_id == [3, 4]
    with torch.no_grad():
        assert_close(token_logprobs(loaded.eval(), batch), token_logprobs(adapted, batch), **CLOSE)


def test_without_its_adapter_a_model_is_what_it_was() -> None:
    base, adapted, batch = family("qwen3"), trained(family("qwen3")), episodes()
    with torch.no_grad():
        wanted, own = token_logprobs(base, batch), token_logprobs(adapted, batch)
        with without_adapter(adapted), without_adapter(adapted):
            assert torch.equal(token_logprobs(adapted, batch), wanted)
        assert torch.equal(token_logprobs(adapted, batch), own)
    assert not torch.equal(own, wanted)


def fail_without_adapter(model: Any) -> None:
    with without_adapter(model):
        raise KeyError("stopped")


def test_what_is_trainable_is_the_same_after_an_adapter_was_off() -> None:
    adapted = with_lora(family("qwen3"))
    next(weight for weight in adapted.parameters() if weight.requires_grad).requires_grad_(False)
    before = [weight.requires_grad for weight in adapted.parameters()]
    with pytest.raises(KeyError):
        fail_without_adapter(adapted)
    assert [weight.requires_grad for weight in adapted.parameters()] == before


def test_a_gradient_passes_over_a_reading_without_the_adapter() -> None:
    adapted, batch = trained(family("qwen3")), episodes()
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    wanted = torch.autograd.grad(token_logprobs(adapted, batch).sum(), weights)
    loss = token_logprobs(adapted, batch).sum()
    with torch.no_grad(), without_adapter(adapted):
        token_logprobs(adapted, batch)
    loss.backward()
    assert all(
        weight.grad is not None and torch.equal(weight.grad, own) for weight, own in zip(weights, wanted, strict=True)
    )


def test_another_thread_never_meets_the_model_without_its_adapter() -> None:
    adapted, batch, found = trained(family("qwen3")), episodes(), []
    with torch.no_grad():
        wanted = token_logprobs(adapted, batch)
    thread = threading.Thread(target=lambda: found.append(token_logprobs(adapted, batch).detach()))
    with without_adapter(adapted):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join()
    assert torch.equal(found[0], wanted)


def test_an_adapter_is_stored_alone_and_comes_back(tmp_path: Path) -> None:
    adapted, other, batch = trained(family("qwen3"), rank=2), with_lora(family("qwen3"), rank=2), episodes()
    save_file(adapter_state(adapted), tmp_path / "adapter.safetensors")
    stored = load_file(tmp_path / "adapter.safetensors")
    assert sum(own.numel() for own in stored.values()) == sum(
        w.numel() for w in adapted.parameters() if w.requires_grad
    )
    load_adapter_state(other, stored)
    with torch.no_grad():
        assert torch.equal(token_logprobs(other, batch), token_logprobs(adapted, batch))


def test_the_state_of_an_adapter_is_a_copy() -> None:
    adapted = with_lora(family("qwen3"), rank=2)
    state = adapter_state(adapted)
    for own in state.values():
        own += 1
    assert not any(torch.equal(own, state[name]) for name, own in adapter_state(adapted).items())


def test_the_weights_of_another_adapter_are_refused() -> None:
    adapted, before = with_lora(family("qwen3"), rank=2), with_lora(family("qwen3"), rank=2)
    state = adapter_state(adapted)
    name = next(iter(state))
    for wrong in (
        adapter_state(with_lora(family("qwen3"), rank=3)),
        state | {"other": state[name]},
        {name: state[name]},
    ):
        with pytest.raises(ValueError, match="of another adapter"):
            load_adapter_state(adapted, {key: own + 1 for key, own in wrong.items()})
    assert all(torch.equal(own, adapter_state(before)[key]) for key, own in adapter_state(adapted).items())


def test_an_adapter_is_drawn_from_its_seed_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = (adapter_state(with_lora(family("qwen3"), seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(own, two[name]) for name, own in one.items())
    assert not any(torch.equal(own, other[name]) for name, own in one.items() if "lora_A" in name)


def test_targets_can_be_named() -> None:
    adapted = with_lora(family("qwen3"), target=["q_proj", "v_proj"], rank=1)
    assert {name.split(".")[-3] for name in adapter_state(adapted)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_embedding_gets_no_adapter(target: str) -> None:
    model, batch = family("qwen3"), episodes()
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        before = token_logprobs(model, batch)
        with pytest.raises(ValueError, match="are one tensor"):
            with_lora(model, target=[target, "q_proj"])
        assert torch.equal(token_logprobs(model, batch), before)
    assert [name for name, _ in model.named_modules()] == names


def test_an_output_layer_of_its_own_can_have_an_adapter() -> None:
    model, batch = family("llama"), episodes()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    adapted = trained(model, target=["lm_head"], rank=4, alpha=8)
    with torch.no_grad():
        own = token_logprobs(adapted, batch)
        assert_close(own, token_logprobs(merged(adapted), batch), **CLOSE)
        with without_adapter(adapted):
            assert (own - token_logprobs(adapted, batch)).abs().max() > 0.1


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("qwen3")
    assert not is_adapted(model)
    for settings, wanted in (({"rank": 0}, "rank=0"), ({"alpha": 0}, "alpha=0"), ({"target": ["nope"]}, "nope")):
        with pytest.raises(ValueError, match=wanted):
            with_lora(model, **settings)
    for function in (merged, adapter_state, base_weights, fail_without_adapter):
        with pytest.raises(ValueError, match="Qwen3ForCausalLM has no adapter"):
            function(model)
    adapted = with_lora(model)
    assert is_adapted(adapted)
    with pytest.raises(ValueError, match="has an adapter already"):
        with_lora(adapted)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'agentgym_ig\[lora\]'"):
        with_lora(family("qwen3"))
