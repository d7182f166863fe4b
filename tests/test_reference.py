"""The reference policy: it stays what the model was, is read like any policy, and is known by its weights' values."""

import copy
import hashlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from agentgym_ig.lm.encode import ConversationEncoder, Encoded
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.trainers.adapters import with_lora
from agentgym_ig.trainers.batch import pad
from agentgym_ig.trainers.reference import SAMPLE, Reference, reference_of, weights_digest
from agentgym_ig.trainers.scoring import Scorer, token_logprobs
from tests.tiny import FAMILIES, play, untrained

ENCODER = ConversationEncoder(tiny_tokenizer())
KINDS = {"copied": lambda model: model, "adapted": with_lora}


def episodes() -> list[Encoded]:
    return [ENCODER.encode(own.conversation) for own in play(6)]


def train_a_little(model: Any) -> None:
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(2):  # the first moves but half of an adapter
        optimizer.zero_grad()
        token_logprobs(model, pad(episodes())).mean().backward()
        optimizer.step()


def plainly(model: Any, encoded: Encoded, temperature: float) -> Tensor:
    """One forward pass over all logits, one episode at a time."""
    logits = model(torch.tensor([encoded.ids])).logits[0, :-1] / temperature
    own = torch.log_softmax(logits, -1)[range(len(encoded.ids) - 1), encoded.ids[1:]]
    return torch.cat([own.new_zeros(1), own]) * torch.tensor([turn >= 0 for turn in encoded.turn])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_reference_is_read_as_the_model_was(family: str, kind: str) -> None:
    base, encoded = untrained(family), episodes()
    reference = reference_of(KINDS[kind](copy.deepcopy(base)))
    for batch_size in (1, 4, 64):
        found = reference.logprobs(encoded, temperature=0.7, batch_size=batch_size)
        for own, row in zip(encoded, found, strict=True):
            assert_close(row, plainly(base, own, 0.7), atol=1e-5, rtol=0.0)


def test_it_reads_what_the_scorer_does() -> None:
    model, encoded = tiny_model(), episodes()
    scored = Scorer(model, ENCODER, PROMPTS["igpo"], temperature=0.5, batch_size=4).score(encoded, [[]] * len(encoded))
    found = reference_of(model).logprobs(encoded, temperature=0.5, batch_size=4)
    assert all(torch.equal(row, own.logprobs) for row, own in zip(found, scored, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_stays_when_the_model_is_trained(kind: str) -> None:
    model, encoded = KINDS[kind](tiny_model()), episodes()
    reference, digest = reference_of(model), weights_digest(model)
    before = reference.logprobs(encoded, temperature=1.0)
    train_a_little(model)
    after, own = (each.logprobs(encoded, temperature=1.0) for each in (reference, Scored(model)))
    assert all(map(torch.equal, before, after))
    assert not any(map(torch.equal, before, own))
    assert weights_digest(reference.model) == digest
    assert not any(row.requires_grad for row in after)
    assert (reference.model is model) == (kind == "adapted")
    assert kind == "adapted" or not any(weight.requires_grad for weight in reference.model.parameters())


class Scored:
    """The model itself, read through the scorer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logprobs(self, encoded: list[Encoded], *, temperature: float) -> list[Tensor]:
        scorer = Scorer(self.model, ENCODER, PROMPTS["igpo"], temperature=temperature)
        return [own.logprobs for own in scorer.score(encoded, [[]] * len(encoded))]


def test_a_reference_knows_no_dropout_and_leaves_the_mode() -> None:
    model = with_lora(tiny_model().eval())
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    wanted = reference_of(model).logprobs(episodes(), temperature=1.0)
    assert all(map(torch.equal, wanted, reference_of(model.train()).logprobs(episodes(), temperature=1.0)))
    assert model.training


def test_mistakes_are_named() -> None:
    reference = Reference(tiny_model())
    with pytest.raises(ValueError, match="temperature=0"):
        reference.logprobs(episodes(), temperature=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        reference.logprobs(episodes(), temperature=1, batch_size=0)


def test_a_digest_is_of_names_shapes_types_and_bytes() -> None:
    layer = nn.Linear(3, 2)
    digest = hashlib.sha256()
    for name, own in (("bias", layer.bias), ("weight", layer.weight)):
        digest.update(json.dumps([name, list(own.shape), "torch.float32"]).encode())
        digest.update(own.detach().numpy().tobytes())
    assert weights_digest(layer) == digest.hexdigest()


def test_a_digest_tells_models_apart() -> None:
    model = tiny_model()
    digest = weights_digest(model)
    assert weights_digest(copy.deepcopy(model)) == digest == weights_digest(tiny_model())
    others = [tiny_model(1), tiny_model().bfloat16(), untrained("llama")]
    trained = tiny_model()
    train_a_little(trained)
    assert len({digest, weights_digest(trained), *map(weights_digest, others)}) == 5


def test_every_value_of_a_small_tensor_counts() -> None:
    layer = nn.Linear(4, 4)
    digests = {weights_digest(layer)}
    for place in range(16):
        with torch.no_grad():
            layer.weight.view(-1)[place] += 1
        digests.add(weights_digest(layer))
    assert len(digests) == 17


def test_how_a_tensor_lies_in_memory_does_not_count() -> None:
    one, two = nn.Linear(3, 5), nn.Linear(3, 5)
    two.load_state_dict(one.state_dict())
    two.weight.data = one.weight.data.T.contiguous().T
    assert not two.weight.is_contiguous()
    assert weights_digest(one) == weights_digest(two)


@pytest.mark.parametrize("shape", [(256, 256), (1, 2 * SAMPLE - 1), (1024, 512), (4096, 1024), (3000, 1111)])
def test_of_a_large_tensor_a_sample_over_all_columns_counts(shape: tuple[int, int]) -> None:
    class Big(nn.Module):
        def __init__(self, column: int | None = None) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)
            if column is not None:
                self.weight[:, column] = 1

    columns = {0, 1, shape[1] // 2 + 1, shape[1] - 1} if shape[0] > 1 else {0}
    assert len({weights_digest(Big())} | {weights_digest(Big(column)) for column in columns}) == 1 + len(columns)
    step = shape[0] * shape[1] // SAMPLE | 1
    assert SAMPLE / 2 <= -(-shape[0] * shape[1] // step) < 2 * SAMPLE


def test_the_digest_of_an_adapted_model_is_of_its_base() -> None:
    digest, adapted = weights_digest(tiny_model()), with_lora(tiny_model())
    assert weights_digest(adapted) == digest
    train_a_little(adapted)
    assert weights_digest(adapted) == digest
    with torch.no_grad():
        adapted.get_decoder().layers[0].mlp.up_proj.base_layer.weight[0, 0] += 1
    assert weights_digest(adapted) != digest
