"""Beliefs: the packed pass against a forward pass for every single one, and what must not change them."""

import copy
import math
import random
import shutil
import warnings
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agentgym_ig import combine_aliases
from agentgym_ig.envs import InfoGain, SearchEnv, add_channel
from agentgym_ig.lm.attention import attending_by, kernel_of
from agentgym_ig.lm.encode import Branch, ConversationEncoder
from agentgym_ig.lm.tiny import tiny_tokenizer
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.trainers import OnlineScorer, Scorer, Stem, TokenBatch, pack, pad, token_logprobs
from agentgym_ig.trainers.scoring import _tree_masks
from agentgym_ig.types import Action, Conversation, Message, Question, Stop, Trajectory, Turn
from tests.largest import LargestLogits
from tests.tiny import FAMILIES, play, shipped_policy, tiny_env, untrained

ENCODER = ConversationEncoder(tiny_tokenizer())
ANSWERS = ["employer Amber Ashford", "Amber Ashford", "U.S.", "東京", "1984"]


def conversation(*texts: str) -> Conversation:
    """Texts in turn from the question, the agent and the environment."""
    roles = ["user", *(["assistant", "tool"] * len(texts))]
    return Conversation(tuple(Message(role, text) for role, text in zip(roles, texts, strict=False)))  # type: ignore[arg-type]


EPISODES = [
    conversation("Who?"),
    conversation(
        "Who is the star of the film Quiet Dunham?", "<search>film</search>", "<information>nothing</information>"
    ),
    conversation(
        "a",
        "<search>x</search>",
        "<information>Amber, with star Iron Belwick.</information>",
        "",
        "<information>b</information>",
    ),
]


MODELS = {
    **{family: (family,) for family in FAMILIES},
    "qwen2 with a window": ("qwen2", 16),
    "qwen2 with a window, eager": ("qwen2", 16, "eager"),
    "mistral with a window": ("mistral", 16),
    "gemma2 with a window": ("gemma2", 16),
    "gemma3 with a window": ("gemma3_text", 16),
    "gemma3 with a window, eager": ("gemma3_text", 16, "eager"),
    "llama, eager": ("llama", None, "eager"),
}


def check_against_reference(scorer: Scorer) -> None:
    encoded = [ENCODER.encode(own) for own in EPISODES]
    for own, scored in zip(EPISODES, scorer.score(encoded, [ANSWERS] * 3), strict=True):
        reference = torch.tensor(scorer.reference_beliefs(own, ANSWERS))
        assert reference.shape == (sum(m.role != "assistant" for m in own.messages), len(ANSWERS))
        assert reference.std() > 0.01  # the comparison is about something
        assert_close(torch.tensor(scored.beliefs), reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_packed_equals_one_forward_pass_each(model: str, prompt: str) -> None:
    check_against_reference(Scorer(untrained(*MODELS[model]), ENCODER, PROMPTS[prompt], temperature=0.7))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral", "qwen2"])
def test_a_window_matters(family: str) -> None:
    """Or the tests above would show nothing: the same weights without the window believe something else."""
    near, far = (
        Scorer(untrained(family, window), ENCODER, PROMPTS["search-r1"]).beliefs(EPISODES, [ANSWERS] * 3)
        for window in (16, 1000)
    )
    assert not torch.allclose(torch.tensor(near), torch.tensor(far), atol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention is compiled, and there is no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
def test_packed_with_flex_attention() -> None:
    by_sdpa, by_flex = (
        Scorer(untrained("gemma3_text", 16, kernel), ENCODER, PROMPTS["tinywiki"])
        for kernel in ("sdpa", "flex_attention")
    )
    encoded = [ENCODER.encode(own) for own in EPISODES]
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # torch 2.13 compiles no changing shapes here
        flexed = by_flex.score(encoded, [ANSWERS] * 3)
    for one, other in zip(flexed, by_sdpa.score(encoded, [ANSWERS] * 3), strict=True):
        assert_close(torch.tensor(one.beliefs), torch.tensor(other.beliefs), atol=1e-4, rtol=0)
        assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


def test_a_kernel_without_masks_leaves_the_tree_to_sdpa() -> None:
    def maskless(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **own: Any) -> Any:
        assert mask is None
        asked.append(query.shape[2])
        return sdpa_attention_forward(module, query, key, value, None, **own)

    asked: list[int] = []
    AttentionInterface.register("maskless", maskless)
    model = untrained("llama", None, "sdpa")
    encoded = [ENCODER.encode(own) for own in EPISODES]
    wanted = Scorer(model, ENCODER, PROMPTS["tinywiki"]).score(encoded, [ANSWERS] * 3)
    with attending_by(model, "maskless"):
        found = Scorer(model, ENCODER, PROMPTS["tinywiki"]).score(encoded, [ANSWERS] * 3)
        assert kernel_of(model) == "maskless"
    assert set(asked) == {max(len(own.ids) for own in encoded)}  # the trunk alone
    for one, other in zip(found, wanted, strict=True):
        assert_close(torch.tensor(one.beliefs), torch.tensor(other.beliefs), atol=1e-5, rtol=0)
        assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_what_cannot_follow_a_tree_is_refused() -> None:
    model = untrained("llama", None, "eager")
    scorer = Scorer(model, ENCODER, PROMPTS["tinywiki"])
    batch = pack([[Stem([1], 0)]], [scorer._branches(["x"])])
    changed = SimpleNamespace(layer_types=["chunked_attention"] * 2, _attn_implementation="sdpa")
    fake = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: changed))
    with pytest.raises(ValueError, match="plain attention"):
        _tree_masks(fake, batch, 0)
    with pytest.raises(ValueError, match="above 0"):
        Scorer(model, ENCODER, PROMPTS["tinywiki"], temperature=0)


@pytest.mark.parametrize("model", MODELS)
def test_the_same_pass_gives_the_tokens_own_log_probabilities(model: str) -> None:
    policy = untrained(*MODELS[model])
    scorer = Scorer(policy, ENCODER, PROMPTS["tinywiki"], temperature=0.7)
    encoded = [ENCODER.encode(own) for own in EPISODES]
    batch = pad(encoded)
    plain = masked_logprobs(policy, batch, 0.7)
    assert_close(token_logprobs(policy, batch, 0.7), plain * batch.real, atol=1e-4, rtol=0)
    for row, (own, scored) in enumerate(zip(encoded, scorer.score(encoded, [ANSWERS, [], ["x"]]), strict=True)):
        expected = (plain * batch.sampled)[row, : len(own.ids)].detach()
        assert_close(scored.logprobs, expected, atol=1e-4, rtol=0)


def masked_logprobs(model: Any, batch: TokenBatch, temperature: float) -> torch.Tensor:
    """The plain way: an attention mask, and logits for everything."""
    logits = model(input_ids=batch.ids, attention_mask=batch.real.long()).logits.float() / temperature
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logprobs, (1, 0))


def test_gradients_are_those_of_the_plain_way() -> None:
    model = untrained("gemma2", 16)
    batch = pad([ENCODER.encode(own) for own in EPISODES])
    gradients = []
    for logprobs in (
        masked_logprobs(model, batch, 0.7) * batch.sampled,
        token_logprobs(model, batch, 0.7, wanted=batch.sampled),
    ):
        (logprobs * torch.linspace(-1, 1, logprobs.shape[1])).sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        model.zero_grad()
    assert gradients[0].abs().max() > 0.1
    assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_logits_are_made_where_they_are_read_alone() -> None:
    model = untrained("gemma2")
    encoded = [ENCODER.encode(own) for own in EPISODES]
    with LargestLogits(model.config.vocab_size) as largest:
        Scorer(model, ENCODER, PROMPTS["tinywiki"]).score(encoded, [["a"]] * 3)
    assert largest.rows == max(
        sum(turn >= 0 for own in encoded for turn in own.turn),
        ENCODER.branch("a", PROMPTS["tinywiki"]).scored * sum(len(own.decisions) for own in encoded),
    )


def test_answers_share_the_tokens_that_they_begin_with() -> None:
    # the tree of a b d, a b, a c and a is the root, a, ab: what ends an answer needs no column
    branches = [Branch((1, 2, 4), 2), Branch((1, 2), 1), Branch((1, 3), 2), Branch((1,), 1)]
    packed = pack([[Stem([8, 9], 4), Stem([7], 9)], []], [branches, branches])
    assert packed.ids.tolist() == [[8, 9, 1, 2, 7, 1, 2], [0] * 7]
    assert packed.positions[0].tolist() == [4, 5, 6, 7, 9, 10, 11]
    assert packed.cached[0].tolist() == [4, 4, 4, 4, 9, 9, 9]
    assert packed.scored.tolist() == [2, 1, 2, 1] * 2
    assert packed.column.tolist() == [2, 3, 2, 1, 2, 1, 5, 6, 5, 4, 5, 4]
    assert packed.token.tolist() == [2, 4, 2, 1, 3, 1] * 2
    branches = [Branch((1, 2, 4), 1), Branch((1, 3, 5), 1)]
    forked = pack([[Stem([9], 2)]], [branches])
    assert forked.ids.tolist() == [[9, 1, 2, 3]]
    seen = [[1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 0, 1]]
    assert forked.allowed(3)[0].int().tolist() == seen
    assert forked.allowed(3, window=2)[0, 3].int().tolist() == [0, 0, 0, 0, 1, 0, 1]


def test_what_is_not_finite_is_passed_on() -> None:
    model = copy.deepcopy(untrained("qwen2"))
    model.get_output_embeddings().weight.data[5] = math.nan
    scorer = Scorer(model, ENCODER, PROMPTS["tinywiki"])
    (scored,) = scorer.score([ENCODER.encode(EPISODES[1])], [["a"]])
    assert all(math.isnan(own) for (own,) in scored.beliefs)
    assert scored.logprobs.isnan().sum() == sum(turn >= 0 for turn in ENCODER.encode(EPISODES[1]).turn)


@pytest.mark.parametrize("seed", range(6))
def test_random_episodes(seed: int) -> None:
    rng = random.Random(seed)
    scorer = Scorer(untrained("gemma3_text", 16), ENCODER, PROMPTS["tinywiki"], batch_size=rng.randint(1, 4))

    def words() -> str:
        return " ".join(rng.choices(["Amber", "Ashford", "the film", "of", "<search>", "x"], k=rng.randint(0, 20)))

    episodes = [conversation("Who?", *(words() for _ in range(rng.randint(0, 9)))) for _ in range(6)]
    answers = [rng.sample(ANSWERS, rng.randint(0, len(ANSWERS))) for _ in episodes]
    scored = scorer.score([ENCODER.encode(own) for own in episodes], answers)
    for own, wanted, found in zip(episodes, answers, scored, strict=True):
        reference = torch.tensor(scorer.reference_beliefs(own, wanted))
        assert_close(torch.tensor(found.beliefs), reference, atol=1e-4, rtol=0)


def test_no_answers_give_no_beliefs() -> None:
    (scored,) = Scorer(untrained("qwen3"), ENCODER, PROMPTS["tinywiki"]).score([ENCODER.encode(EPISODES[1])], [[]])
    assert scored.beliefs == [[], []]


def test_neighbours_padding_and_order_change_nothing() -> None:
    scorer = Scorer(untrained("qwen3"), ENCODER, PROMPTS["search-r1"])
    encoded = [ENCODER.encode(own) for own in EPISODES]
    together = scorer.score(encoded, [ANSWERS] * 3)
    for order in ([2, 0, 1], [1]):
        for place, scored in zip(order, scorer.score([encoded[i] for i in order], [ANSWERS] * len(order)), strict=True):
            assert_close(torch.tensor(scored.beliefs), torch.tensor(together[place].beliefs), atol=1e-5, rtol=0)
    small = Scorer(untrained("qwen3"), ENCODER, PROMPTS["search-r1"], batch_size=1).score(encoded, [ANSWERS] * 3)
    assert_close(torch.tensor(small[1].beliefs), torch.tensor(together[1].beliefs), atol=1e-5, rtol=0)


def test_a_belief_knows_nothing_of_what_comes_later() -> None:
    scorer = Scorer(untrained("llama"), ENCODER, PROMPTS["search-r1"])
    shorter = scorer.score([ENCODER.encode(EPISODES[2])], [ANSWERS])[0].beliefs
    longer_episode = EPISODES[2].plus(Message("assistant", "<search>more</search>"), Message("tool", "Amber Ashford"))
    longer = scorer.score([ENCODER.encode(longer_episode)], [ANSWERS])[0].beliefs
    assert_close(torch.tensor(longer[:3]), torch.tensor(shorter), atol=1e-5, rtol=0)
    assert abs(longer[3][1] - shorter[2][1]) > 1e-3


def test_beliefs_at_the_end_are_the_last_of_all() -> None:
    scorer = Scorer(untrained("qwen2"), ENCODER, PROMPTS["search-r1"])
    last = scorer.beliefs(EPISODES, [ANSWERS] * 3)
    every = scorer.score([ENCODER.encode(own) for own in EPISODES], [ANSWERS] * 3)
    assert_close(torch.tensor(last), torch.tensor([scored.beliefs[-1] for scored in every]), atol=1e-5, rtol=0)


def test_sampled_episodes_of_the_shipped_policy() -> None:
    policy = shipped_policy()
    scorer = Scorer(policy.model, policy.encoder, PROMPTS["tinywiki"])
    for episode in play(8):
        (scored,) = scorer.score([policy.encoder.encode(episode.conversation)], [episode.question.answers])
        reference = scorer.reference_beliefs(episode.conversation, episode.question.answers)
        assert len(reference) == len(episode.turns)
        assert_close(torch.tensor(scored.beliefs), torch.tensor(reference), atol=1e-4, rtol=0)


@pytest.mark.parametrize("answer", ["Amber Ashford", "U.S.", "why!", "two\nlines", "東京", "1984 AD", " padded ", "a"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_exactly_the_answers_tokens_are_scored(answer: str, prompt: str) -> None:
    branch = ENCODER.branch(answer, PROMPTS[prompt])
    text = ENCODER.tokenizer.decode(branch.ids[-branch.scored :])
    assert text.split() == answer.split()
    before = ENCODER.tokenizer.decode(branch.ids[: -branch.scored])
    assert before.strip().endswith("<answer>")


def test_an_answer_without_a_token_is_named() -> None:
    with pytest.raises(ValueError, match="no token to score"):
        ENCODER.branch("", PROMPTS["tinywiki"])


def test_aliases_golden() -> None:
    before, after = [-2.5, -3.0], [-1.0, -0.4]
    gains = {
        name: combine_aliases(after, name) - combine_aliases(before, name)
        for name in ("first", "max", "mean", "logsumexp")
    }
    assert gains == pytest.approx({"first": 1.5, "max": 2.1, "mean": 2.05, "logsumexp": 2.063411}, abs=2e-6)
    with pytest.raises(ValueError, match="first, max, mean"):
        combine_aliases([0.0], "best")


@settings(deadline=None)
@given(st.lists(st.floats(-50, 0), min_size=1, max_size=5))
def test_logsumexp_lies_between_the_best_and_all_of_them_as_good(beliefs: list[float]) -> None:
    value = combine_aliases(beliefs, "logsumexp")
    assert max(beliefs) - 1e-9 <= value <= max(beliefs) + math.log(len(beliefs)) + 1e-9


@pytest.mark.parametrize("kind", [Scorer, OnlineScorer])
def test_the_wrapper_reads_the_same_gains_turn_by_turn(kind: type[Scorer]) -> None:
    policy = shipped_policy()
    scorer = kind(policy.model, policy.encoder, PROMPTS["tinywiki"])
    vector = tiny_env()
    plain = SearchEnv(vector.index, list(vector.questions.values()), vector.rules)
    env = add_channel(plain, InfoGain(scorer.beliefs))
    _, info = env.reset(seed=4)
    question = plain.questions[info["question"]]
    words = question.text.rstrip("?").split()
    script = [f"<search>{' '.join(words[-3:])}</search>", "oops", f"<search>star {' '.join(words[-2:])}</search>"]
    gains = [env.step(action)[4]["rewards"]["info_gain"] for action in script]
    assert plain.episode is not None
    reference = scorer.reference_beliefs(plain.episode.conversation, question.answers[:1])
    steps = [after[0] - before[0] for before, after in pairwise(reference)]
    assert gains == pytest.approx(steps, abs=1e-4)
    assert max(map(abs, gains)) > 0.1


def test_a_model_in_training_mode_is_read_as_it_samples() -> None:
    model = copy.deepcopy(untrained("llama"))
    model.config.attention_dropout = 0.5
    expected = Scorer(untrained("llama"), ENCODER, PROMPTS["tinywiki"]).beliefs(EPISODES, [ANSWERS] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 has another name for it, 5.17 has not
        model.gradient_checkpointing_enable()
    model.train()
    for kind in (Scorer, OnlineScorer):
        found = kind(model, ENCODER, PROMPTS["tinywiki"]).beliefs(EPISODES, [ANSWERS] * 3)
        assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_whole_text_are_refused(kind: str) -> None:
    model = copy.deepcopy(untrained("llama"))
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0}
    with pytest.raises(ValueError, match=f"RoPE of type {kind} cannot be scored"):
        Scorer(model, ENCODER, PROMPTS["tinywiki"]).beliefs(EPISODES[:1], [["a"]])


def test_empty_replies_are_replies() -> None:
    asked = Message("user", "Who?")
    said = [Action(f"<search>{query}</search>", (7, 8)) for query in "ab"]
    turns = (Turn(said[0], "", {"info_gain": 9.0}), Turn(said[1], "x", {}), Turn(said[1], "", {"info_gain": 9.0}))
    episode = Trajectory(Question("q", "Who?", ("a",), "toy"), (asked,), turns, Stop.MAX_TURNS, 0, 0)
    roles = [message.role for message in episode.conversation.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    (scored,) = Scorer(untrained("llama"), ENCODER, PROMPTS["tinywiki"]).with_beliefs([episode])
    assert len(scored.belief) == 3
    assert ["info_gain" in turn.rewards for turn in scored.turns] == [True, True, False]
