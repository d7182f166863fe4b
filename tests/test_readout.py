"""Log-probabilities and entropies read in chunks equal the plain formula, and never hold all logits."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.trainers import TokenBatch, pad, readout, token_logprobs
from agentgym_ig.trainers.readout import Finish, read_tokens_at
from agentgym_ig.trainers.scoring import token_entropies
from tests.largest import LargestLogits
from tests.tiny import FAMILIES, untrained

FINISHES = {
    "plain": Finish(),
    "temperature": Finish(temperature=0.7),
    "scaled": Finish(scale=0.25, temperature=1.3),
    "capped": Finish(scale=2.0, cap=3.0, temperature=0.6),
}


def drawn(count: int = 23, width: int = 6, vocabulary: int = 17) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((count, width), (vocabulary, width), (vocabulary,))
    )
    return [hidden, weight, bias, torch.randint(vocabulary, (count,), generator=generator)]


def set_tile(monkeypatch: pytest.MonkeyPatch, rows: int, words: int) -> None:
    monkeypatch.setattr(readout, "TILE", rows * words)
    monkeypatch.setattr(readout, "ROWS", rows)


def plainly(hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, finish: Finish) -> tuple[Tensor, Tensor]:
    logits = (hidden.double() @ weight.double().T + bias.double()) * finish.scale
    if finish.cap is not None:
        logits = finish.cap * torch.tanh(logits / finish.cap)
    chance = torch.distributions.Categorical(logits=logits / finish.temperature)
    return chance.log_prob(tokens), chance.entropy()


@pytest.mark.parametrize("name", FINISHES)
@pytest.mark.parametrize(("rows", "words"), [(1, 1), (5, 4), (7, 17), (1000, 6), (1000, 1000)])
@pytest.mark.parametrize("about", ["logprobs", "entropies", "both"])
def test_values_and_gradients_are_those_of_the_formula(
    name: str, rows: int, words: int, about: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, rows, words)
    hidden, weight, bias, tokens = drawn()
    inputs = [hidden, weight, bias]
    pulls = torch.randn(2, len(tokens), generator=torch.Generator().manual_seed(1))
    pulls *= torch.tensor([[about != "entropies"], [about != "logprobs"]])
    found = readout.logprobs_and_entropies(hidden, weight, bias, tokens, FINISHES[name])
    wanted = plainly(hidden, weight, bias, tokens, FINISHES[name])
    for one, other in zip(found, wanted, strict=True):
        assert_close(one.double(), other, atol=2e-6, rtol=0)
    chosen = [about != "entropies", about != "logprobs"]
    gradients = [
        torch.autograd.grad(
            sum((own * pull).sum() for own, pull, wants in zip(each, pulls, chosen, strict=True) if wants), inputs
        )
        for each in (found, wanted)
    ]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    hidden, weight, _, tokens = drawn()
    logprobs, _ = readout.logprobs_and_entropies(hidden, weight.detach(), None, tokens, Finish())
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("words", [1, 3, 1000])
def test_a_logit_at_minus_infinity_has_no_share(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile(monkeypatch, 4, words)
    hidden, weight, bias, tokens = drawn()
    barred = [0, 3, 16]
    with torch.no_grad():
        bias[barred] = -torch.inf
    tokens = tokens.where(~torch.isin(tokens, torch.tensor(barred)), 4)
    logprobs, entropies = readout.logprobs_and_entropies(hidden, weight, bias, tokens, Finish())
    kept = [place for place in range(17) if place not in barred]
    at = torch.tensor([kept.index(int(token)) for token in tokens])
    wanted = plainly(hidden, weight[kept], bias[kept], at, Finish())
    assert_close(logprobs.double(), wanted[0], atol=2e-6, rtol=0)
    assert_close(entropies.double(), wanted[1], atol=2e-6, rtol=0)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_bfloat16_is_read_as_autocast_reads_it() -> None:
    hidden, weight, bias, tokens = drawn(400, 64, 300)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = readout.logprobs_and_entropies(hidden, weight, bias, tokens, Finish())
        own = nn.functional.linear(hidden, weight, bias).float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert_close(logprobs, own, atol=1e-5, rtol=0)
    exact = plainly(hidden, weight, bias, tokens, Finish())[0]
    for one, other in zip(
        torch.autograd.grad(logprobs.sum(), [hidden, weight]),
        torch.autograd.grad(exact.sum(), [hidden, weight]),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()


def batch_of(lengths: tuple[int, ...]) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 200, (length,), generator=generator).tolist() for length in lengths]
    return pad([Encoded(row, [OBSERVED] * 5 + [0] * (len(row) - 5), []) for row in rows])


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere"])
def test_a_whole_model_gets_the_gradient_of_its_own_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = untrained(family), batch_of((20, 12))
    vocabulary = model.config.vocab_size
    set_tile(monkeypatch, 7, vocabulary)
    logits = model(batch.ids[:, :-1]).logits / 0.7
    chance = torch.distributions.Categorical(logits=logits)
    columns = [chance.log_prob(batch.ids[:, 1:]), chance.entropy()]
    wanted = [torch.nn.functional.pad(own, (1, 0)) * batch.sampled for own in columns]
    largest = LargestLogits(vocabulary)
    gradients = []
    with largest:
        found = token_entropies(model, batch, 0.7, wanted=batch.sampled)
        gradients.append(gradient(found, model))
    gradients.append(gradient(wanted, model))
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, atol=2e-5, rtol=0)
    assert gradients[1].abs().max() > 0.1
    assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert largest.rows == 7
    assert int(batch.sampled.sum()) > 7


def gradient(columns: Sequence[Tensor], model: Any) -> Tensor:
    pull = torch.linspace(-1, 1, columns[0].shape[1])
    total = sum(((own * pull).sum() for own in columns), torch.zeros(()))
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return torch.cat([own.flatten() for own in found if own is not None])


def test_what_a_model_does_to_its_logits_unknown_to_us_is_an_error() -> None:
    model = deepcopy(untrained("llama"))

    def doubled(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(doubled)
    with pytest.raises(ValueError, match="llama does more to its logits"):
        token_logprobs(model, batch_of((9,)))


def test_the_output_layer_is_left_as_it_was() -> None:
    model = untrained("llama")
    ids = batch_of((9,)).ids
    before = model(ids).logits
    token_logprobs(model, batch_of((9,)))
    with pytest.raises(IndexError):
        read_tokens_at(model, (torch.tensor([5]), torch.tensor([0])), torch.tensor([1]), 1.0, {"input_ids": ids})
    assert torch.equal(model(ids).logits, before)
    assert "forward" not in vars(model.get_output_embeddings())
