"""PPO's critic: where a value is read, what it is trained by, and that the policy does not feel it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from agentgym_ig.lm.encode import OBSERVED, ConversationEncoder, Encoded
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.trainers.adapters import with_lora
from agentgym_ig.trainers.batch import pad
from agentgym_ig.trainers.critic import Critic, read_values, value_loss
from agentgym_ig.trainers.token_advantages import gae_advantages
from tests.groups import EIGHTHS, f64
from tests.tiny import FAMILIES, play, untrained

ENCODER = ConversationEncoder(tiny_tokenizer())
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def episodes(count: int = 4) -> list[Encoded]:
    return [ENCODER.encode(own.conversation) for own in play(count)]


def critic_of(model: Any) -> Critic:
    """A critic whose values differ from token to token."""
    critic = Critic(model)
    nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    nn.init.constant_(critic.head.bias, 0.5)
    return critic


def plainly(critic: Critic, encoded: Encoded) -> Tensor:
    """Each value from a forward pass over nothing but the tokens before it."""
    values = torch.zeros(len(encoded.ids))
    for place, turn in enumerate(encoded.turn):
        if turn != OBSERVED and place:
            hidden = critic.trunk(torch.tensor([encoded.ids[:place]])).last_hidden_state[0, -1]
            values[place] = hidden @ critic.head.weight[0] + critic.head.bias[0]
    return values


def test_a_fresh_critic_expects_nothing() -> None:
    values = Critic(tiny_model())(pad(episodes()))
    assert values.shape == pad(episodes()).ids.shape
    assert not values.any()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_value_is_read_from_the_tokens_before_it_alone(family: str) -> None:
    critic = critic_of(untrained(family))
    encoded = [Encoded(own.ids[:40], own.turn[:40], []) for own in episodes(2)]
    for own, found in zip(encoded, read_values(critic, encoded), strict=True):
        assert_close(found, plainly(critic, own), **CLOSE)
        assert found[torch.tensor(own.turn) != OBSERVED].std() > 0.01


@torch.no_grad()
def test_the_first_token_has_no_value_and_later_tokens_change_none_before() -> None:
    critic, ids = critic_of(tiny_model()), list(range(20, 32))
    before = critic(pad([Encoded(ids, [0] * 12, [])]))[0]
    assert before[0] == 0
    assert before[1:].all()
    ids[5] = 99
    after = critic(pad([Encoded(ids, [0] * 12, [])]))[0]
    assert_close(after[:6], before[:6], **CLOSE)
    assert not torch.isclose(after[6:], before[6:], atol=1e-4).any()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_neither_padding_nor_company_changes_a_value(family: str) -> None:
    critic, encoded = critic_of(untrained(family)), episodes(6)
    alone = read_values(critic, encoded, batch_size=1)
    for batch_size in (2, 64):
        for one, other in zip(alone, read_values(critic, encoded, batch_size=batch_size), strict=True):
            assert_close(one, other, **CLOSE)
    shorter = min(encoded, key=lambda own: len(own.ids))
    batch = pad([shorter, Encoded([1] * 500, [0] * 500, [])])
    assert_close(critic(batch)[0, : len(shorter.ids)], read_values(critic, [shorter])[0], **CLOSE)
    assert not critic(batch)[0, len(shorter.ids) :].any()


def test_the_head_learns_from_the_hidden_states_before_each_token() -> None:
    critic, batch = critic_of(tiny_model()).double(), pad(episodes())
    critic.head.float()  # as it is made
    error = torch.randn(batch.ids.shape, generator=torch.Generator().manual_seed(2))
    (critic(batch) * error).sum().backward()
    hidden = critic.trunk(input_ids=batch.ids).last_hidden_state[:, :-1].float()
    share = (error * batch.sampled)[:, 1:]
    assert critic.head.weight.grad is not None
    assert critic.head.bias.grad is not None
    assert_close(critic.head.weight.grad[0], torch.einsum("bt,bth->h", share, hidden), atol=1e-4, rtol=1e-4)
    assert_close(critic.head.bias.grad[0], share.sum(), atol=1e-4, rtol=1e-4)


def test_nothing_of_a_critic_reaches_the_policy() -> None:
    model = tiny_model()
    model.requires_grad_(False)
    before, critic = copy.deepcopy(model.state_dict()), critic_of(model)
    assert all(weight.requires_grad for weight in critic.parameters())
    assert not {own.data_ptr() for own in model.parameters()} & {own.data_ptr() for own in critic.parameters()}
    critic(pad(episodes())).square().sum().backward()
    torch.optim.SGD(critic.parameters(), lr=0.1).step()
    assert all(own.grad is None for own in model.parameters())
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    moved = [not torch.equal(own, before[f"model.{name}"]) for name, own in critic.trunk.state_dict().items()]
    assert all(moved)


def test_a_critic_fits_what_each_episode_brings() -> None:
    """Six episodes, told apart by their first token alone, bring 0, 1 or 2."""
    batch = pad([Encoded([20 + row, *range(40, 50 + row)], [OBSERVED] * 3 + [0] * (8 + row), []) for row in range(6)])
    wanted = torch.arange(6).float()[:, None].remainder(3).expand(batch.ids.shape)
    critic = Critic(tiny_model())
    optimizer = torch.optim.AdamW(critic.parameters(), lr=3e-3)
    losses: list[float] = []
    for _ in range(80):
        values = critic(batch)
        loss = value_loss(values, wanted, values.detach(), mask=batch.sampled)[batch.sampled].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(float(wanted[batch.sampled].square().mean() / 2))
    assert losses[-1] < losses[0] / 100


def test_the_critic_of_a_bfloat16_policy_values_in_float32() -> None:
    critic = Critic(tiny_model().bfloat16())
    assert critic(pad(episodes())).dtype == torch.float32
    assert {own.dtype for own in critic.parameters()} == {torch.float32}


def test_the_head_is_read_in_float32_under_autocast_too() -> None:
    critic, batch = critic_of(tiny_model()), pad(episodes())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        values = critic(batch)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_a_critic_is_saved_and_loaded(tmp_path: Path) -> None:
    critic, other = critic_of(tiny_model()), Critic(tiny_model(1))
    save_file(critic.state_dict(), tmp_path / "critic.safetensors")
    other.load_state_dict(load_file(tmp_path / "critic.safetensors"))
    encoded = episodes()
    assert all(map(torch.equal, read_values(critic, encoded), read_values(other, encoded)))


def test_values_are_read_without_a_gradient_in_evaluation_mode() -> None:
    critic, encoded = critic_of(tiny_model()), episodes()
    wanted = read_values(critic, encoded)
    for layer in critic.trunk.layers:
        layer.self_attn.attention_dropout = 0.5
    assert all(map(torch.equal, wanted, read_values(critic.train(), encoded)))
    assert critic.training
    assert not any(row.requires_grad for row in wanted)


def test_the_critic_of_a_model_with_an_adapter_is_that_of_the_model_below() -> None:
    adapted, base = with_lora(tiny_model(), rank=2), Critic(tiny_model())
    with torch.no_grad():
        for name, own in adapted.named_parameters():
            own += "lora" in name
    before = {name: own.clone() for name, own in adapted.state_dict().items()}
    critic = Critic(adapted)
    assert critic.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(own, base.state_dict()[name]) for name, own in critic.state_dict().items())
    assert all(own.requires_grad for own in critic.parameters())
    assert adapted.state_dict().keys() == before.keys()
    assert all(torch.equal(own, before[name]) for name, own in adapted.state_dict().items())
    assert not {own.data_ptr() for own in adapted.parameters()} & {own.data_ptr() for own in critic.parameters()}
    assert not Critic(adapted.train()).trunk.training


# value, return, old, then the loss and its gradient with a clip of 0.2, worked by hand
GOLDEN = [
    (1.0, 2.0, 0.5, 0.845, 0.0),  # past the clip towards the return: (0.7 - 2)² / 2 stands
    (1.0, 0.0, 0.5, 0.5, 1.0),  # past it away from the return: pulled back by its own error
    (0.6, 2.0, 0.5, 0.98, -1.4),  # within it
    (0.0, -1.0, 0.5, 0.845, 0.0),  # the same downwards: the clip's edge is 0.3
    (0.0, 2.0, 0.5, 2.0, -2.0),
    (0.75, 0.7, 0.5, 0.00125, 0.05),  # the edge is the return: no error there
]


def test_golden_value_losses() -> None:
    value, target, old, loss, gradient = f64(GOLDEN).T
    value.requires_grad_()
    found = value_loss(value, target, old)
    assert_close(found, loss)
    assert_close(torch.autograd.grad(found.sum(), value)[0], gradient)
    assert_close(value_loss(value, target, old, clip=None), f64([0.5, 0.5, 0.98, 0.5, 2.0, 0.00125]))


@given(
    st.lists(st.tuples(EIGHTHS, EIGHTHS, EIGHTHS, st.booleans()), min_size=1, max_size=12),
    st.sampled_from([0.25, 1.0, 3.0]),
)
@settings(deadline=None)
def test_value_loss_against_one_token_at_a_time(tokens: list[tuple[float, float, float, bool]], clip: float) -> None:
    value, target, old, on = (torch.tensor(column) for column in zip(*tokens, strict=True))
    value = value.double().requires_grad_()
    found = value_loss(value, target.double(), old.double(), mask=on, clip=clip)
    (gradient,) = torch.autograd.grad(found.sum(), value)
    for place, (v, r, o, use) in enumerate(tokens):
        edge = min(max(v, o - clip), o + clip)
        assert found[place].item() == (max((v - r) ** 2, (edge - r) ** 2) / 2 if use else 0)
        if use and abs(v - r) == abs(edge - r) and v != edge:
            continue  # on either side of the return: a kink
        free = use and (v == edge or abs(v - r) > abs(edge - r))
        assert gradient[place].item() == (v - r if free else 0)


def test_what_stands_off_the_mask_changes_nothing_and_only_the_value_has_a_gradient() -> None:
    mask = torch.tensor([[True, False]])
    value, target, old = (f64([[one, torch.nan]]).requires_grad_() for one in (1.0, 0.0, 0.9))
    loss = value_loss(value, target, old, mask=mask)
    loss.sum().backward()
    assert loss.tolist() == [[0.5, 0.0]]
    assert value.grad is not None
    assert value.grad.tolist() == [[1.0, 0.0]]
    assert target.grad is None
    assert old.grad is None


def test_mistakes_are_named() -> None:
    one, nan = torch.ones(1, 2), torch.full((1, 2), torch.nan)
    for clip in (0.0, -1.0, torch.nan):
        with pytest.raises(ValueError, match="clip="):
            value_loss(one, one, one, clip=clip)
    with pytest.raises(ValueError, match="shapes are"):
        value_loss(one, one, one[:, :1])
    with pytest.raises(FloatingPointError, match="returns"):
        value_loss(one, nan, one)


def test_the_returns_of_gae_are_what_a_critic_learns() -> None:
    mask = torch.tensor([[False, True, True, False, True]])
    rewards, values = torch.tensor([[0.0, 0, 0, 0, 1]]), torch.tensor([[9.0, 0.5, 0.5, 9, 0.5]], requires_grad=True)
    _, returns = gae_advantages(rewards, values.detach(), mask)
    loss = value_loss(values, returns, values.detach(), mask=mask)
    assert_close(loss, f64([[0, 0.125, 0.125, 0, 0.125]]))
    loss.sum().backward()
    assert_close(values.grad, torch.tensor([[0, -0.5, -0.5, 0, -0.5]]))
