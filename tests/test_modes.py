"""Training mode without chance, checkpointed activations in it, and reading in batches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from agentgym_ig.lm.encode import Encoded
from agentgym_ig.lm.tiny import tiny_model
from agentgym_ig.trainers.adapters import with_lora
from agentgym_ig.trainers.batch import TokenBatch, pad
from agentgym_ig.trainers.modes import read_tokens, without_dropout
from agentgym_ig.trainers.scoring import token_logprobs

HALF = 0.5
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"attention_dropout": HALF},
    "llama": {"attention_dropout": HALF},
    "gemma2": {"attention_dropout": HALF},
    "gpt2": {"attn_pdrop": HALF, "resid_pdrop": HALF, "embd_pdrop": HALF},
    "opt": {"dropout": HALF, "attention_dropout": HALF, "layerdrop": HALF},
    "falcon": {"hidden_dropout": HALF, "attention_dropout": HALF},
    "gptj": {"attn_pdrop": HALF, "resid_pdrop": HALF, "embd_pdrop": HALF, "rotary_dim": 8},
    "mixtral": {"router_jitter_noise": HALF, "attention_dropout": HALF, "num_local_experts": 2},
}
"""Every way in which a family leaves something to chance in training mode: attributes, modules, its configuration."""

BATCH = pad([Encoded(list(range(10, 30)), [0] * 20, []), Encoded(list(range(40, 47)), [0] * 7, [])])


def random_model(family: str) -> Any:
    size = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "opt":
        size |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    if family in ("gpt2", "gptj", "falcon"):
        size.pop("num_key_value_heads")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size, **FAMILIES[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_without_dropout_is_evaluation_mode(family: str) -> None:
    model = random_model(family)
    with torch.no_grad():
        wanted = token_logprobs(model.eval(), BATCH)
        torch.manual_seed(1)
        assert (token_logprobs(model.train(), BATCH) - wanted).abs().max() > 0.01
        without_dropout(model)
        assert torch.equal(token_logprobs(model, BATCH), wanted)
    assert model.training


def test_an_adapter_of_another_hand_loses_its_dropout_too() -> None:
    model = with_lora(tiny_model())
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(HALF)
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    with torch.no_grad():
        wanted = token_logprobs(model.eval(), BATCH)
        assert not torch.equal(token_logprobs(model.train(), BATCH), wanted)
        without_dropout(model)
        assert torch.equal(token_logprobs(model, BATCH), wanted)


def gradient(model: Any) -> tuple[int, dict[str, Tensor]]:
    """How often the second layer was computed, and the gradients.

    Counted inside of it, since its own hooks run once, and before, since the second time ends when all is recomputed.
    """
    computed = []
    layer = model.get_decoder().layers[1]
    hook = layer.mlp.register_forward_pre_hook(lambda *_: computed.append(1))
    model.zero_grad()
    token_logprobs(model, BATCH).sum().backward()
    hook.remove()
    return len(computed), {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2"])
def test_activations_are_checkpointed_in_training_mode_alone_with_equal_gradients(family: str, adapted: bool) -> None:
    model = random_model(family)
    without_dropout(model)
    if adapted:
        model = with_lora(model, rank=2)
    count, wanted = gradient(model.train())
    assert count == 1
    model.activation_checkpointing_enable()
    count, found = gradient(model)
    assert count == 2
    assert found.keys() == wanted.keys()
    assert found
    for name, own in found.items():
        assert_close(own, wanted[name], atol=1e-6, rtol=1e-5)
    assert gradient(model.eval())[0] == 1


def numbered(*lengths: int) -> list[Encoded]:
    return [Encoded([row] * length, [0] * length, []) for row, length in enumerate(lengths)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 9])
def test_episodes_are_read_in_batches_of_like_length_and_returned_in_order(batch_size: int) -> None:
    widths, model = [], torch.nn.Dropout()
    model.register_parameter("any", torch.nn.Parameter(torch.zeros(1)))

    def read(batch: TokenBatch) -> Tensor:
        assert not model.training
        assert not torch.is_grad_enabled()
        assert len(batch.ids) <= batch_size
        widths.append(batch.ids.shape[1])
        return batch.ids * 10

    rows = read_tokens(model, read, numbered(5, 1, 3, 2), batch_size=batch_size)
    assert [row.tolist() for row in rows] == [[0] * 5, [10], [20] * 3, [30] * 2]
    assert widths == sorted(widths)
    assert model.training
    assert read_tokens(model, read, [], batch_size=batch_size) == []


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        read_tokens(tiny_model(), lambda batch: batch.ids, [], batch_size=0)
