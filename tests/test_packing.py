"""Reading episodes in one row changes nothing but the padding that is not computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agentgym_ig.lm.attention import attending_by
from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.trainers import TokenBatch, TrainConfig, pad
from agentgym_ig.trainers.adapters import with_lora
from agentgym_ig.trainers.critic import Critic
from agentgym_ig.trainers.learner import make_learner
from agentgym_ig.trainers.packing import Layout, _bounds, can_pack, packing
from agentgym_ig.trainers.scoring import token_entropies, token_logprobs
from tests.tiny import untrained

LENGTHS = (3, 17, 9, 30)


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 200, (length,), generator=generator).tolist() for length in lengths]
    return pad([Encoded(row, [OBSERVED] * 2 + [0] * (len(row) - 2), []) for row in rows])


def read(model: Any, batch: TokenBatch) -> list[Tensor]:
    """Log-probabilities, entropies, and the gradient of a mixture of them by all weights that want one."""
    columns = token_entropies(model, batch, 0.7, wanted=batch.sampled)
    pull = torch.linspace(-1, 1, columns[0].shape[1])
    loss = (columns[0] * pull).sum() - 0.3 * columns[1].sum()
    found = torch.autograd.grad(loss, [own for own in model.parameters() if own.requires_grad], allow_unused=True)
    return [*columns, torch.cat([own.flatten() for own in found if own is not None])]


def assert_same_packed(model: Any, batch: TokenBatch) -> None:
    wanted = read(model, batch)
    assert wanted[2].abs().max() > 0.1
    with packing(model):
        found = read(model, batch)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, atol=2e-5, rtol=2e-5)


def tokens_computed(model: Any, call: Callable[[], object]) -> int:
    """How many tokens go through the first layer."""
    seen: list[int] = []
    decoder = model.get_decoder()
    hook = decoder.layers[0].mlp.register_forward_hook(lambda *own: seen.append(own[2].shape[:2].numel()))
    call()
    hook.remove()
    return sum(seen)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "gemma3_text", "mistral", "granite", "olmo2"])
def test_values_and_gradients_are_the_same(family: str, window: int | None) -> None:
    model = untrained(family, window, "sdpa")
    assert can_pack(model)
    assert_same_packed(model, batch_of())


def test_only_real_tokens_are_computed() -> None:
    model, batch = untrained("llama"), batch_of()
    assert tokens_computed(model, lambda: token_logprobs(model, batch)) == len(LENGTHS) * max(LENGTHS)
    with packing(model):
        assert tokens_computed(model, lambda: token_logprobs(model, batch)) == sum(LENGTHS)


def test_layers_run_again_for_checkpoints_see_the_same_layout() -> None:
    model = deepcopy(untrained("llama"))
    wanted = read(model, batch_of())
    make_learner(model, None, TrainConfig(gradient_checkpointing=True))
    with packing(model):
        found = read(model, batch_of())
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_an_adapter_and_a_critic_are_read_packed() -> None:
    model, batch = deepcopy(untrained("llama")), batch_of()
    critic = Critic(model)
    with torch.no_grad():
        critic.head.weight.normal_()
    adapted = with_lora(model, rank=2, alpha=4)
    with torch.no_grad():
        for own in adapted.parameters():
            if own.requires_grad:
                own += 0.1
    assert_same_packed(adapted, batch)
    wanted = critic(batch)
    with packing(critic.trunk):
        assert_close(critic(batch), wanted, atol=2e-5, rtol=0)
        assert critic.trunk.config._attn_implementation != "sdpa"
    assert critic.trunk.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "gemma3_text", "mistral"])
def test_a_kernel_that_takes_the_row_as_it_is(family: str, window: int | None) -> None:
    model = untrained(family, window, "eager")
    assert_same_packed(model, batch_of((1, *LENGTHS, 1)))
    with packing(model):
        assert tokens_computed(model, lambda: token_logprobs(model, batch_of())) == sum(LENGTHS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention is compiled, and there is no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
@torch.no_grad()  # on a CPU it has no backward pass
def test_flex_attention_takes_the_row_as_it_is() -> None:
    model, batch = untrained("gemma3_text", 8, "flex_attention"), batch_of()
    wanted = token_logprobs(untrained("gemma3_text", 8, "sdpa"), batch)
    with packing(model), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        assert_close(token_logprobs(model, batch), wanted, atol=2e-5, rtol=0)
        assert tokens_computed(model, lambda: token_logprobs(model, batch)) == sum(LENGTHS)


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="needs FlashAttention")
def test_flash_attention_takes_the_row_as_it_is() -> None:
    model, batch = deepcopy(untrained("llama", None, "sdpa")).cuda(), batch_of()
    batch = TokenBatch(batch.ids.cuda(), batch.real.cuda(), batch.turn.cuda())
    with torch.autocast("cuda", torch.bfloat16):
        wanted = read(model, batch)
        model.set_attn_implementation("flash_attention_2")
        with packing(model):
            found = read(model, batch)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 0.03 * other.norm()


def test_bounds_of_episodes_by_hand() -> None:
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    found = _bounds(real)
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 4, 8]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 4


def test_a_model_that_cannot_is_read_padded() -> None:
    model, batch = untrained("llama"), batch_of()
    AttentionInterface.register("unknown", sdpa_attention_forward)
    with attending_by(model, "unknown"):
        assert not can_pack(model)
        with packing(model):
            assert tokens_computed(model, lambda: token_logprobs(model, batch)) == len(LENGTHS) * max(LENGTHS)


def test_the_kernel_is_put_back_whatever_happens() -> None:
    model, batch = untrained("llama"), batch_of()
    before = token_logprobs(model, batch)
    with pytest.raises(KeyError), packing(model), packing(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(token_logprobs(model, batch), before)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(deadline=None)
def test_a_layout_and_back(lengths: list[int]) -> None:
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    layout, tokens = Layout.of(real), torch.arange(sum(lengths) * 6.0).view(1, 2, -1, 3)
    spread = layout.side_by_side(tokens)
    assert spread.shape == (len(lengths), 2, max(lengths), 3)
    for row, (own, length) in enumerate(zip(spread, lengths, strict=True)):
        first = sum(lengths[:row])
        assert torch.equal(own[:, :length], tokens[0, :, first : first + length])
    assert torch.equal(layout.packed(spread.transpose(1, 2)), tokens.transpose(1, 2))


def test_a_kernel_of_half_precision_wants_bfloat16() -> None:
    model = deepcopy(untrained("llama"))
    AttentionInterface.register("flash_of_a_test", sdpa_attention_forward)
    model.config._attn_implementation_internal = "flash_of_a_test"
    with pytest.raises(ValueError, match="flash_of_a_test computes in half precision alone: set bf16"):
        make_learner(model, None, TrainConfig())
    make_learner(model, None, TrainConfig(bf16=True))
