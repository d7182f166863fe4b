"""Reward channels, one by one and together."""

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym_ig import Question, Stop
from agentgym_ig.envs import (
    Channel,
    ChannelWrapper,
    Episode,
    Evidence,
    Format,
    InfoGain,
    Judged,
    Outcome,
    RepeatQuery,
    Rules,
    SearchCost,
    SearchEnv,
    SearchVectorEnv,
    SelfGuide,
    VectorChannelWrapper,
    add_channel,
)
from agentgym_ig.guide import trust, verdict
from agentgym_ig.indexes import Bm25Index
from agentgym_ig.types import Conversation
from tests.fakes import PASSAGES, QUESTIONS, ListIndex, shown_words

RULES = Rules(max_turns=5, top_k=2)


def play(channel: Channel, *actions: str, question: str = "q1", rules: Rules = RULES) -> list[float | None]:
    """The channel's value in every turn."""
    env = add_channel(SearchEnv(ListIndex(), QUESTIONS, rules), channel)
    env.reset(options={"question": question})
    return [env.step(action)[4]["rewards"].get(channel.name) for action in actions]


def test_outcome_stands_on_the_last_turn_alone() -> None:
    actions = ("<search>Warsaw</search>", "<answer>the long river Vistula</answer>")
    assert play(Outcome("em"), *actions) == [None, 0.0]
    assert play(Outcome("cover_em"), *actions) == [None, 1.0]
    assert play(Outcome("f1"), *actions) == [None, pytest.approx(0.5)]  # bags {long river vistula} and {vistula}
    assert play(Outcome("f1_igpo"), *actions) == [None, pytest.approx(2 / 3)]  # sets of 4 and, for its alias, 2 words
    with pytest.raises(ValueError, match="em, f1, cover_em"):
        Outcome("best")


def test_an_outcome_can_take_the_place_of_the_environments_own() -> None:
    env = SearchEnv(ListIndex(), QUESTIONS, Rules(weights={}))
    own = add_channel(add_channel(env, Outcome("cover_em", name="outcome"), weight=2.0), Format(-2.0))
    own.reset(options={"question": "q1"})
    assert own.step("nonsense")[1] == -2.0
    _, reward, *_, info = own.step("<answer>it is the Vistula</answer>")
    assert (reward, info["rewards"]) == (2.0, {"outcome": 1.0, "format": 0.0})


def test_a_judge_is_asked_once_about_all_that_ended() -> None:
    asked: list[Any] = []

    def judge(cases: Sequence[tuple[str, Sequence[str], str | None]]) -> list[float | None]:
        asked.append([(answers, prediction) for _, answers, prediction in cases])
        return [None if prediction == "?" else float(prediction == "the river") for _, _, prediction in cases]

    env = add_channel(SearchVectorEnv(ListIndex(), QUESTIONS, 4, RULES), Judged(judge))
    env.reset(options={"questions": ["q1", "q2", "q1", "q1"]})
    said = ["<answer>the river</answer>", "<search>a</search>", "<answer>?</answer>", "<answer>no</answer>"]
    infos = env.step(said)[4]
    both = QUESTIONS[0].answers
    assert asked == [[(both, "the river"), (both, "?"), (both, "no")]]
    assert infos["rewards"]["judge"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert infos["rewards"]["_judge"].tolist() == [True, False, False, True]
    assert list(infos["stop"]) == [Stop.ANSWERED, None, Stop.SCORING_FAILED, Stop.ANSWERED]


def test_searches_cost_and_repeats_are_seen_through_spelling() -> None:
    asked = ("<search>The Vistula</search>", "<search>vistula!</search>", "nonsense", "<search>radium</search>")
    assert play(SearchCost(), *asked) == [-1.0, -1.0, 0.0, -1.0]
    assert play(RepeatQuery(), *asked) == [0.0, -1.0, 0.0, 0.0]
    call = '<tool_call>{"name": "search", "arguments": {"query": ["Vistula", "vistula", "radium"]}}</tool_call>'
    tools = Rules(prompt="igpo")
    assert play(SearchCost(), call, call, rules=tools) == [-3.0, -3.0]
    assert play(RepeatQuery(), call, call, rules=tools) == [-1.0, -3.0]


def test_evidence_counts_each_gold_passage_once_and_sums_to_the_recall() -> None:
    values = play(
        Evidence(), "<search>Curie</search>", "<search>Curie</search>", "<search>Warsaw</search>", "<answer>x</answer>"
    )
    assert values == [0.5, 0.0, 0.5, 0.0]
    without = [Question("q", "Who?", ("he",), "toy")]
    env = add_channel(SearchEnv(ListIndex(), without), Evidence())
    env.reset(seed=0)
    assert "evidence" not in env.step("<search>Curie</search>")[4]["rewards"]


def test_evidence_that_cannot_be_found_is_named_at_once() -> None:
    add_channel(SearchEnv(Bm25Index.from_passages(PASSAGES), QUESTIONS), Evidence())
    with pytest.raises(ValueError, match="lacks 1 of 2 supporting passages, such as p2; build it from the corpus"):
        add_channel(SearchEnv(Bm25Index.from_passages(PASSAGES[:1]), QUESTIONS), Evidence())


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("<guide>On track. Positive</guide><search>a</search>", "positive"),
        ("<guide>looked negative, is NEUTRAL.</guide>", "neutral"),
        ("<guide>\nlost:\nnegative\n</guide><answer>x</answer>", "negative"),
        ("<search>positive</search>", None),
        ("<guide>fine</guide>", None),
        ("<guide>positivenegative</guide>", None),
        ("<guide>positive</guide><guide>negative</guide>", None),
        ("<guide>positive", None),
    ],
)
def test_verdicts(action: str, expected: str | None) -> None:
    assert verdict(action) == expected


def test_megabytes_of_guides_are_read_at_once() -> None:
    started = time.perf_counter()
    for text in ("<guide>" * 1_000_000, "</guide>" * 1_000_000, "<guide>" + "positive " * 1_000_000):
        assert verdict(text) is None
    assert time.perf_counter() - started < 20  # seconds; quadratic time would be hours


def test_self_guide_pays_the_verdict_and_counts_what_it_cannot_read() -> None:
    channel = SelfGuide()
    said = ["positive", "negative", "neutral", "none"]
    assert play(channel, *(f"<guide>x {v}</guide><search>a</search>" for v in said)) == [0.1, -0.1, 0.0, 0.0]
    assert channel.failures == 1


def test_trust_golden() -> None:
    steps = {
        0: 0,
        39: 0,
        40: 0,
        41: 0.1,
        45: 0.5,
        49: 0.9,
        50: 1,
        60: 1,
        69: 1,
        70: 1,
        71: 0.9,
        75: 0.5,
        79: 0.1,
        80: 0,
    }
    for step, expected in steps.items():
        assert trust(step / 80) == pytest.approx(expected, abs=1e-12)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress="):
            trust(wrong)


@given(st.floats(0, 1), st.floats(0, 1))
def test_trust_is_continuous_and_a_share(one: float, two: float) -> None:
    assert 0 <= trust(one) <= 1
    assert abs(trust(one) - trust(two)) <= abs(one - two) / 0.125 + 1e-12


def test_a_weight_may_change_with_training() -> None:
    done = [0.0]
    env = add_channel(SearchEnv(ListIndex(), QUESTIONS, RULES), SelfGuide(), weight=lambda: trust(done[0]))
    rewards = []
    for done[0] in (0.25, 0.5625, 0.75):
        env.reset(seed=0)
        rewards.append(env.step("<guide>positive</guide><search>a</search>")[1])
    assert rewards == pytest.approx([0.0, 0.05, 0.1])


def test_gains_telescope_and_the_answering_turn_has_none() -> None:
    searches = [f"<search>{query}</search>" for query in ("Curie", "Warsaw", "zzz")]
    assert play(InfoGain(shown_words), *searches, "<answer>Vistula</answer>") == [0.0, 1.0, 0.0, None]
    (gain,) = play(InfoGain(shown_words, log=False), "<search>Warsaw</search>")
    assert gain == pytest.approx(np.exp(-2.0) - np.exp(-3.0))


def test_truncated_episodes_keep_the_gains_they_have() -> None:
    rules = Rules(max_turns=3, top_k=2)
    asked = ["<search>Warsaw</search>", "oops", "<search>Warsaw</search>"]
    assert play(InfoGain(shown_words), *asked, rules=rules) == [1.0, 0.0, None]


def test_aliases_are_combined_before_the_difference_golden() -> None:
    # two aliases, before (-2.5, -3.0), after (-1.0, -0.4)
    def beliefs(conversations: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        assert len(answers[0]) == count
        return [([-1.0, -0.4] if conversation.turn else [-2.5, -3.0])[:count] for conversation in conversations]

    expected = {"first": 1.5, "max": 2.1, "mean": 2.05, "logsumexp": 2.063411}
    for aliases, gain in expected.items():
        count = 1 if aliases == "first" else 2
        assert play(InfoGain(beliefs, aliases=aliases), "oops") == [pytest.approx(gain, abs=2e-6)]
    with pytest.raises(ValueError, match="first, max, mean, logsumexp"):
        InfoGain(beliefs, aliases="best")


def test_gains_golden() -> None:
    values = iter([-2.5, -1.0, -1.1, -0.15] * 2)
    steps = ["<search>a</search>"] * 3

    def beliefs(conversations: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[next(values)]]

    assert play(InfoGain(beliefs), *steps) == pytest.approx([1.5, -0.1, 0.95])
    assert play(InfoGain(beliefs, log=False), *steps) == pytest.approx([0.285794, -0.035008, 0.527837], abs=2e-6)


def one_bad(bad: float) -> Any:
    """A scorer that gives no number for what stands in the conversation of the second question."""

    def beliefs(conversations: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[bad if "capital of Poland" in own.messages[0].text else -1.0] for own in conversations]

    return beliefs


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reading_that_is_no_number_ends_its_episode_alone(bad: float) -> None:
    env = add_channel(SearchVectorEnv(ListIndex(), QUESTIONS, 3, RULES), InfoGain(one_bad(bad)), weight=0.5)
    env = add_channel(env, SearchCost())
    env.reset(options={"questions": ["q1", "q2", "q1"]})
    _, rewards, terminated, truncated, infos = env.step(["<search>radium</search>"] * 3)
    assert list(infos["stop"]) == [None, Stop.SCORING_FAILED, None]
    assert (truncated.tolist(), terminated.any()) == ([False, True, False], False)
    assert np.isfinite(rewards).all()
    assert infos["rewards"]["_info_gain"].tolist() == [True, False, True]
    assert infos["rewards"]["_search_cost"].tolist() == [True, False, True]
    assert "channel 'info_gain' gave nan for turn 1 of question 'q2'" in infos["error"][1]
    assert infos["_error"].tolist() == [False, True, False]
    assert env.step(["<answer>Vistula</answer>"] * 3)[2].tolist() == [True, False, True]


def test_a_single_environment_says_what_failed() -> None:
    env = add_channel(SearchEnv(ListIndex(), QUESTIONS, RULES), InfoGain(one_bad(math.nan)))
    env.reset(options={"question": "q2"})
    _, reward, terminated, truncated, info = env.step("<search>radium</search>")
    assert (reward, terminated, truncated, info["stop"]) == (0.0, False, True, Stop.SCORING_FAILED)
    assert "mend the scorer" in info["error"]


def test_a_channel_of_ones_own_is_a_few_lines() -> None:
    class Brevity(Channel):
        name = "brevity"

        def value(self, episode: Episode) -> float | None:
            return None if episode.answer is None else -float(len(episode.answer.split()))

    assert play(Brevity(), "<search>a</search>", "<answer>one two three</answer>") == [None, -3.0]


def test_wrappers_forward_everything_else() -> None:
    single = gymnasium.make("agentgym_ig/TinyWiki-v0", per_dataset=5, render_mode="ansi")
    env = add_channel(add_channel(single, SearchCost()), RepeatQuery())
    assert isinstance(env, ChannelWrapper)
    assert isinstance(env, gymnasium.Wrapper)
    assert env.unwrapped is single.unwrapped
    assert (env.action_space, env.observation_space) == (single.action_space, single.observation_space)
    prompt, _ = env.reset(seed=1)
    assert prompt in str(env.render())
    vector = SearchVectorEnv(ListIndex(), QUESTIONS, 2, RULES)
    wrapped = add_channel(vector, SearchCost())
    assert isinstance(wrapped, VectorChannelWrapper)
    assert isinstance(wrapped, gymnasium.vector.VectorWrapper)
    assert (wrapped.unwrapped, wrapped.num_envs) == (vector, 2)


@pytest.mark.parametrize("given", [[[]], [[None]], [["-1"]], [[1e9]]])
def test_a_scorer_that_gives_something_else_is_named(given: Any) -> None:
    env = add_channel(SearchEnv(ListIndex(), QUESTIONS, RULES), InfoGain(lambda *_: given, log=False))
    if given == [[]]:
        with pytest.raises(ValueError, match="gave 0 beliefs for the 1 answers of 'q1'"):
            env.reset(options={"question": "q1"})
        return
    env.reset(options={"question": "q1"})
    info = env.step("<search>Warsaw</search>")[4]
    assert (info["stop"] is Stop.SCORING_FAILED) == (given != [["-1"]])  # a number, if in words


def test_a_value_that_is_no_number_is_named() -> None:
    class Wordy(SearchCost):
        def value(self, episode: Episode) -> Any:
            return "3"

    env = add_channel(SearchEnv(ListIndex(), QUESTIONS, RULES), Wordy())
    env.reset(seed=0)
    assert "gave 3 for turn 1" in env.step("<search>a</search>")[4]["error"]


def test_what_is_inside_can_be_reached_through_channels() -> None:
    env = add_channel(add_channel(SearchVectorEnv(ListIndex(), QUESTIONS, 2, RULES), SearchCost()), Evidence())
    assert (list(env.questions), env.rules) == (["q1", "q2"], RULES)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = env.nothing_of_the_kind


def test_channels_that_cannot_be_added_say_why() -> None:
    env = SearchEnv(ListIndex(), QUESTIONS, RULES)
    with pytest.raises(ValueError, match="there is a channel 'format' already"):
        add_channel(env, Format())
    with pytest.raises(ValueError, match="there is a channel 'em' already"):
        add_channel(add_channel(env, Outcome("em")), Outcome("em"))
    with pytest.raises(TypeError, match="goes around a SearchEnv, not a CartPoleEnv"):
        add_channel(gymnasium.make("CartPole-v1"), SearchCost())

    limited: Any = gymnasium.wrappers.TimeLimit(env, 2)
    with pytest.raises(TypeError, match="TimeLimit hides where an episode ends"):
        add_channel(limited, SearchCost())
    with pytest.raises(ValueError, match="Channel has no name"):
        add_channel(env, Channel())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="added in the middle of an episode"):
        add_channel(env, InfoGain(shown_words)).step("<search>a</search>")

    class Short(SearchCost):
        def values(self, episodes: Sequence[Episode]) -> list[float]:
            return []

    short = add_channel(env, Short())
    short.reset(seed=0)
    with pytest.raises(ValueError, match="gave 0 values for 1 episodes"):
        short.step("<search>a</search>")


def test_the_sum_of_gains_is_last_belief_less_first() -> None:
    read: list[float] = []

    def beliefs(conversations: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        (values,) = shown_words(conversations, answers)
        read.append(values[0])
        return [values]

    gains = play(InfoGain(beliefs), *["<search>Warsaw radium</search>"] * 3)
    assert [gain for gain in gains if gain is not None] == [after - before for before, after in pairwise(read)]
