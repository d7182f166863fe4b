"""Beliefs: the packed pass against a forward pass for every single one, and what must not change them."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agentgym_ig import combine_aliases
from agentgym_ig.envs import InfoGain, SearchEnv
from agentgym_ig.lm.encode import ConversationEncoder
from agentgym_ig.lm.tiny import tiny_tokenizer
from agentgym_ig.text import PROMPTS
from agentgym_ig.trainers import Scorer, pad, token_logprobs
from agentgym_ig.types import Conversation, Message
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_packed_equals_one_forward_pass_each(family: str, prompt: str) -> None:
    scorer = Scorer(untrained(family), ENCODER, PROMPTS[prompt])
    encoded = [ENCODER.encode(own) for own in EPISODES]
    for own, scored in zip(EPISODES, scorer.score(encoded, [ANSWERS] * 3), strict=True):
        reference = torch.tensor(scorer.reference_beliefs(own, ANSWERS))
        assert reference.shape == (sum(m.role != "assistant" for m in own.messages), len(ANSWERS))
        assert reference.std() > 0.01  # the comparison is about something
        assert_close(torch.tensor(scored.beliefs), reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_pass_gives_the_tokens_own_log_probabilities(family: str) -> None:
    scorer = Scorer(untrained(family), ENCODER, PROMPTS["tinywiki"], temperature=0.7)
    encoded = [ENCODER.encode(own) for own in EPISODES]
    plain = token_logprobs(untrained(family), pad(encoded), temperature=0.7)
    for row, (own, scored) in enumerate(zip(encoded, scorer.score(encoded, [ANSWERS, [], ["x"]]), strict=True)):
        assert_close(scored.logprobs, plain[row, : len(own.ids)].detach(), atol=1e-4, rtol=0)


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


def test_the_wrapper_reads_the_same_gains_turn_by_turn() -> None:
    policy = shipped_policy()
    scorer = Scorer(policy.model, policy.encoder, PROMPTS["tinywiki"])
    vector = tiny_env()
    env = InfoGain(SearchEnv(vector.index, list(vector.questions.values()), vector.rules), scorer.beliefs)
    _, info = env.reset(seed=4)
    question = env.search.questions[info["question"]]
    words = question.text.rstrip("?").split()
    script = [f"<search>{' '.join(words[-3:])}</search>", "oops", f"<search>star {' '.join(words[-2:])}</search>"]
    gains = [env.step(action)[4]["rewards"]["info_gain"] for action in script]
    assert env.search.episode is not None
    reference = scorer.reference_beliefs(env.search.episode.conversation, question.answers[:1])
    steps = [after[0] - before[0] for before, after in pairwise(reference)]
    assert gains == pytest.approx(steps, abs=1e-4)
    assert max(map(abs, gains)) > 0.1
