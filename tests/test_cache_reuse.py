"""Keys and values kept from turn to turn: the same tokens and log-probabilities, and fewer tokens read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from agentgym_ig.envs import Start, rollout
from agentgym_ig.lm.decoding import Decoding
from agentgym_ig.lm.kept import Kept, key_of, reasons_against
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.trainers.adapters import with_lora
from agentgym_ig.types import Action, Conversation, Message
from tests.tiny import FAMILIES, shipped_policy, tiny_env, untrained

WORDS = "What is the star of the film and of the city of the river, the capital of the country?".split()


def opening(seed: int) -> Conversation:
    return Conversation((Message("user", " ".join(WORDS[: 2 + seed % 5])),), seed)


def longer(own: Conversation, action: Action | None, reply: int) -> Conversation:
    assert action is not None
    text = f"<information> {' '.join(WORDS[:reply])} </information>"
    return own.plus(Message("assistant", action.text, action.token_ids), Message("tool", text))


def sampler(model: Any, cached: int = 100_000, **options: Any) -> TransformersPolicy:
    return TransformersPolicy(model, tiny_tokenizer(), max_cached_tokens=cached, **{"max_new_tokens": 6, **options})


def assert_same(one: Sequence[Action | None], other: Sequence[Action | None]) -> None:
    assert [own and own.token_ids for own in one] == [own and own.token_ids for own in other]
    for own, each in zip(one, other, strict=True):
        assert own is not None
        assert each is not None
        assert own.logprobs == pytest.approx(each.logprobs, abs=1e-5)


@contextmanager
def tokens_read(model: Any) -> Iterator[list[int]]:
    """How many tokens, padding included, each pass of the model is given."""
    counts: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: counts.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield counts
    finally:
        hook.remove()


def play(policy: TransformersPolicy, turns: int = 4, episodes: int = 5) -> list[list[Action | None]]:
    """Turns whose order, members and reply lengths change."""
    talks = [opening(seed) for seed in range(episodes)]
    found = []
    for turn in range(turns):
        found.append(policy(talks))
        talks = [
            longer(own, action, (7 * turn + 3 * place) % 12)
            for place, (own, action) in enumerate(zip(talks, found[-1], strict=True))
        ]
        talks = [*talks[::-1][: episodes - turn // 2], opening(90 + turn)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 128])
def test_what_is_kept_changes_no_token(family: str, batch_size: int) -> None:
    model = untrained(family)
    plain = play(sampler(model, 0))
    policy = sampler(model, batch_size=batch_size)
    with policy.session():
        kept = play(policy)
    for own, each in zip(kept, plain, strict=True):
        assert_same(own, each)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_only_new_tokens_are_read(kernel: str) -> None:
    model = untrained("llama", kernel=kernel)
    policy = sampler(model)
    talk = opening(4)
    with policy.session(), tokens_read(model) as counts:
        (action,) = policy([talk])
        after = longer(talk, action, 8)
        first = sum(counts)
        (again,) = policy([after])
    whole, before = len(policy.encoder.encode(after).ids), len(policy.encoder.encode(talk).ids)
    assert action is not None
    assert again is not None
    assert first == before + len(action.token_ids) - 1
    # What was not read of the action is its last token.
    assert sum(counts) - first == whole - before - len(action.token_ids) + 1 + len(again.token_ids) - 1
    assert_same([again], sampler(model, 0)([after]))


def test_equal_contexts_are_read_once() -> None:
    model = untrained("qwen3")
    talks = [Conversation(opening(1).messages, seed) for seed in range(6)]
    with tokens_read(model) as counts:
        actions = sampler(model)(talks)
    assert counts[0] == len(sampler(model).encoder.encode(talks[0]).ids)
    assert_same(actions, [sampler(model)([own])[0] for own in talks])
    assert len({own.token_ids for own in actions if own}) > 1


def test_rows_that_have_ended_are_not_gone_on_with() -> None:
    policy = shipped_policy()
    ids = list(tiny_env().questions)
    with tokens_read(policy.model) as counts:
        rollout(tiny_env(), policy, [Start(own, place, place) for place, own in enumerate(ids[:16])])
    assert 16 in counts
    assert counts.count(16) < sum(count < 16 for count in counts)


LAYOUT = st.lists(
    st.tuples(st.permutations(range(4)), st.integers(1, 4), st.integers(0, 11), st.booleans()), min_size=2, max_size=4
)


@settings(deadline=None, max_examples=25)
@given(LAYOUT, st.sampled_from([0, 40, 90, 100_000]), st.sampled_from([1, 3, 8]))
def test_any_order_and_any_bound(layout: list[tuple[list[int], int, int, bool]], cached: int, batch: int) -> None:
    model = untrained("qwen2")
    policy, plain = sampler(model, cached, batch_size=batch), sampler(model, 0)
    talks = {place: opening(place) for place in range(4)}
    with policy.session():
        for order, count, reply, anew in layout:
            some = order[:count]
            actions = policy([talks[place] for place in some])
            assert_same(actions, plain([talks[place] for place in some]))
            assert policy._kept is None or policy._kept.tokens <= cached
            for place, action in zip(some, actions, strict=True):
                talks[place] = opening(place + 50) if anew else longer(talks[place], action, reply)


def adam(model: Any, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
    for own in model.parameters():
        own.grad = torch.ones_like(own)
    optimizer.step()


@torch.no_grad()
def written(model: Any) -> None:
    for own in model.parameters():
        own.mul_(1.5)


def replaced(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight.detach() * 3)


CHANGES: dict[str, Callable[[Any], object]] = {
    "optimizer": adam,
    "fused": lambda model: adam(model, fused=True),
    "written": written,
    "replaced": replaced,
    "loaded": lambda model: model.load_state_dict(tiny_model(7).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_read_everything_anew(change: str) -> None:
    model = tiny_model(3).eval()
    policy = sampler(model)
    talks = [opening(seed) for seed in range(3)]
    with policy.session():
        after = [longer(own, action, 9) for own, action in zip(talks, policy(talks), strict=True)]
        assert policy._kept is not None
        assert policy._kept.tokens > 0
        before = policy(after)
        CHANGES[change](model)
        later = policy(after)
    assert_same(later, sampler(model, 0)(after))
    assert [own and own.logprobs for own in later] != [own and own.logprobs for own in before]


def test_an_adapter_switched_off_reads_everything_anew() -> None:
    model = with_lora(tiny_model(3), rank=4, alpha=8, seed=0).eval()
    with torch.no_grad():
        for name, own in model.named_parameters():
            own.add_(0.3 * ("lora_B" in name))  # a fresh adapter changes nothing
    policy = sampler(model)
    talks = [opening(seed) for seed in range(3)]
    with policy.session():
        after = [longer(own, action, 9) for own, action in zip(talks, policy(talks), strict=True)]
        with model.disable_adapter():
            off = policy(after)
            assert_same(off, sampler(model, 0)(after))
        on = policy(after)
    assert_same(on, sampler(model, 0)(after))
    assert [own and own.logprobs for own in on] != [own and own.logprobs for own in off]


def kept_by(policy: TransformersPolicy) -> int:
    """Tokens kept now."""
    return policy._kept.tokens if policy._kept else 0


def test_nothing_outlives_a_session() -> None:
    policy = sampler(untrained("llama"))
    policy([opening(0)])
    assert kept_by(policy) == 0
    with policy.session():
        with policy.session():
            policy([opening(0)])
        assert kept_by(policy) > 0
    assert kept_by(policy) == 0
    with pytest.raises(ValueError, match="max_cached_tokens=-1"):
        sampler(untrained("llama"), -1)


def test_a_full_store_keeps_the_conversations_that_are_asked_about() -> None:
    store = Kept(torch.nn.Linear(1, 1), 10)
    states = torch.zeros(2, 1, 4, 1)
    store.begin([])
    for key in (b"a", b"b", b"c"):
        store.add(key, states)
    assert (store.tokens, list(store._states)) == (8, [b"a", b"b"])  # c has no room, and drives out no one
    store.begin([b"b"])
    store.add(b"d", states)
    assert list(store._states) == [b"b", b"d"]  # a was not asked about
    assert store.take(b"b") is states
    assert store.take(b"b") is None
    assert store.tokens == 4
    store.add(b"e", torch.zeros(2, 1, 11, 1))
    assert store.take(b"e") is None
    store.close()
    assert key_of([1, 2]) != key_of([1, 2, 0])


WINDOWED = [("qwen2", 5), ("gemma2", 6), ("gemma3_text", 7)]


@pytest.mark.parametrize(("family", "window"), WINDOWED)
def test_a_sliding_window_is_read_from_the_beginning_and_says_so(
    family: str, window: int, caplog: pytest.LogCaptureFixture
) -> None:
    policy = sampler(untrained(family, window))
    with caplog.at_level(logging.WARNING), policy.session():
        kept = play(policy)
    assert "every turn is read from its beginning: the model has layers of sliding_attention" in caplog.text
    alone = sampler(untrained(family, window), batch_size=1)
    for own, each in zip(kept, play(alone), strict=True):
        assert_same(own, each)


def of_family(family: str, **size: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tiny_tokenizer()), initializer_range=0.2, **size)
    return AutoModelForCausalLM.from_config(config).eval()


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.mark.parametrize("family", [*FAMILIES, *SIZES])
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    model = of_family(family, **SIZES[family]) if family in SIZES else untrained(family)
    model.generation_config.eos_token_id = None
    policy = sampler(model, temperature=0)
    with policy.session():
        talks = [opening(seed) for seed in range(5)]
        talks = [longer(own, action, 6) for own, action in zip(talks, policy(talks), strict=True)]
        actions = policy(talks)
    for talk, action in zip(talks, actions, strict=True):
        context = torch.tensor([policy.encoder.encode(talk).ids])
        wanted = model.generate(context, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert action is not None
        assert action.token_ids == tuple(wanted[0, context.shape[1] :].tolist())[: len(action.token_ids)]
    assert bool(reasons_against(model.config)) == (family in ("bloom", "gemma2"))


@pytest.mark.parametrize("lanes", [1, 2])
def test_rollouts_are_the_same_with_and_without(lanes: int) -> None:
    shipped = shipped_policy()
    ids = list(tiny_env().questions)
    starts = [Start(ids[number % 7], number % 7, number) for number in range(24)]
    policies = [sampler(shipped.model, cached, max_new_tokens=16) for cached in (0, 300, 100_000)]
    plain, *others = [rollout(tiny_env(10), own, starts, lanes=lanes) for own in policies]
    for played in others:
        for own, each in zip(played, plain, strict=True):
            assert own.stop is each.stop
            assert_same([turn.action for turn in own.turns], [turn.action for turn in each.turns])


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_under_autocast_keys_and_values_are_held_in_its_type(family: str) -> None:
    model, contexts = untrained(family, None, "sdpa"), [[5, 9, 17, 4], [8, 3]]

    def read(reusable: bool) -> tuple[list[Tensor], Any]:
        batch = Decoding(model, contexts, [None, None], pad=0, reusable=reusable)
        return [batch.read(), *(batch.go_on(torch.tensor([7, token])) for token in (6, 11, 12))], batch.cache.layers

    with torch.autocast("cpu", torch.bfloat16):
        (found, held), (wanted, whole) = read(True), read(False)
    assert {part.dtype for layer in held for part in (layer.keys, layer.values)} == {torch.bfloat16}
    assert torch.float32 in {layer.keys.dtype for layer in whole}  # which attention casts, all of it, for each token
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
