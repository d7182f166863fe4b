"""The environments: Gymnasium's contract, ours, and both forms alike."""

from collections.abc import Callable, Sequence

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig import RandomPolicy, ScriptedPolicy, Stop, oracle, search_once
from agentgym_ig.envs import InfoGain, Rules, SearchEnv, SearchVectorEnv, Start, VectorInfoGain, prompts_of, rollout
from agentgym_ig.types import Conversation, Hit
from tests.fakes import PASSAGES, QUESTIONS, BrokenIndex, ListIndex

RULES = Rules(max_turns=4, top_k=2, weights={"outcome": 1.0, "format": 0.25})


def beliefs(conversations: list[Conversation], answers: list[list[str]]) -> list[list[float]]:
    """A scorer that believes in what has been shown: one nat for every word of the answer that stood somewhere."""
    shown = [" ".join(m.text for m in own.messages if m.role != "assistant").lower() for own in conversations]
    return [
        [-3.0 + sum(w in text for w in a.lower().split()) for a in own]
        for text, own in zip(shown, answers, strict=True)
    ]


def make_search() -> gymnasium.Env[str, str]:
    return SearchEnv(ListIndex(), QUESTIONS, RULES)


def make_tiny() -> gymnasium.Env[str, str]:
    import agentgym_ig.envs  # noqa: F401  # registers the ids

    return gymnasium.make("agentgym_ig/TinyWiki-v0", per_dataset=20)


def make_info_gain() -> gymnasium.Env[str, str]:
    return InfoGain(SearchEnv(ListIndex(), QUESTIONS, RULES), beliefs, weight=0.5)  # type: ignore[arg-type]


ENVS = [make_search, make_tiny, make_info_gain]
Make = Callable[[], gymnasium.Env[str, str]]


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")  # wrappers are meant to be checked too
@pytest.mark.parametrize("make", ENVS)
def test_gymnasium_accepts_it(make: Make) -> None:
    check_env(make(), skip_render_check=True)


@pytest.mark.parametrize("make", ENVS)
def test_seeds_decide_the_episode(make: Make) -> None:
    one, two = make(), make()
    for seed in (0, 1, 2):
        assert one.reset(seed=seed) == two.reset(seed=seed)
        for action in ("<search>Warsaw</search>", "nonsense", "<answer>Vistula</answer>"):
            assert one.step(action) == two.step(action)
    assert len({make().reset(seed=seed)[1]["question"] for seed in range(20)}) > 1


@pytest.mark.parametrize("make", ENVS)
def test_channels_add_up_and_nothing_follows_the_end(make: Make) -> None:
    env = make()
    weights = {"outcome": 1.0, "format": 0.25 if make is not make_tiny else 0.1, "info_gain": 0.5}
    for script in (
        ["<search>Warsaw</search>", "oops", "<answer>Warsaw</answer>"],
        ["oops"] * 9,
        ["<search>a</search>"] * 9,
    ):
        env.reset(seed=1)
        for action in script:
            _, reward, terminated, truncated, info = env.step(action)
            assert reward == pytest.approx(sum(weights[name] * value for name, value in info["rewards"].items()))
            assert (info["stop"] is None) == (not (terminated or truncated))
            if terminated or truncated:
                break
        assert terminated or truncated
        with pytest.raises(ResetNeeded):
            env.unwrapped.step("<answer>again</answer>")


def test_the_reply_shows_passages_and_the_answer_is_scored_over_all_aliases() -> None:
    env = SearchEnv(ListIndex(), QUESTIONS, RULES, render_mode="ansi")
    prompt, info = env.reset(options={"question": "q1"})
    assert "Marie Curie was born" in prompt
    assert info == {"question": "q1"}
    reply, reward, terminated, truncated, info = env.step("<think>?</think><search>capital Vistula</search>")
    assert "[1] Warsaw: Warsaw is the capital" in reply
    assert (reward, terminated, truncated, info["stop"]) == (0.0, False, False, None)
    assert info["retrieved"] == ("p2", "p3")
    _, reward, terminated, truncated, info = env.step("<answer>The Vistula.</answer>")
    assert (reward, terminated, truncated, info["stop"]) == (1.0, True, False, Stop.ANSWERED)
    rendered = env.render()
    assert rendered is not None
    assert rendered.index("[user]") < rendered.index("[tool]") < rendered.index("<answer>The")


def test_malformed_actions_cost_and_go_on_and_the_last_turn_must_answer() -> None:
    env = SearchEnv(ListIndex(), QUESTIONS, RULES)
    env.reset(seed=0)
    reply, reward, _, _, info = env.step("let me think")
    assert reward == -0.25
    assert info["rewards"] == {"format": -1.0}
    assert "wanted one <search>" not in reply  # the rule is quoted in neutral characters
    assert "‹search>" in reply
    env.step("<search>Curie</search>")
    env.step("<search>Curie</search>")
    reply, _, terminated, truncated, info = env.step("<search>Curie</search>")
    assert (reply, terminated, truncated, info["stop"]) == ("", False, True, Stop.MAX_TURNS)
    assert info["rewards"] == {"format": 0.0, "outcome": 0.0}


def test_gold_answers_and_supporting_ids_reach_neither_prompt_nor_index() -> None:
    class Recording(ListIndex):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            self.seen += queries
            return super().search(queries, k)

    index = Recording()
    env = SearchEnv(index, QUESTIONS, RULES)
    prompt, _ = env.reset(options={"question": "q1"})
    reply, *_, info = env.step("<search>Curie</search>")
    assert index.seen == ["Curie"]
    for secret in ("Vistula", "p1", "p2"):
        assert secret not in prompt
    assert "Vistula" not in reply
    assert set(info) == {"rewards", "retrieved", "stop", "question"}


def test_a_failed_search_ends_its_episode_alone() -> None:
    env = SearchVectorEnv(BrokenIndex(), QUESTIONS, 3, RULES)
    env.reset(options={"questions": ["q1", "q2", "q1"]})
    _, _, terminated, truncated, infos = env.step(["<search>a</search>", "<answer>Warsaw</answer>", "hm"])
    assert list(infos["stop"]) == [Stop.SEARCH_FAILED, Stop.ANSWERED, None]
    assert truncated.tolist() == [True, False, False]
    assert terminated.tolist() == [False, True, False]
    assert infos["rewards"]["_outcome"].tolist() == [False, True, False]
    assert env.active.tolist() == [False, False, True]


def test_one_search_call_a_step_and_finished_episodes_stay_still() -> None:
    index = ListIndex()
    env = SearchVectorEnv(index, QUESTIONS, 4, RULES)
    env.reset(options={"questions": ["q1", "q2", "q1"]})
    assert env.active.tolist() == [True, True, True, False]
    env.step(["<search>Curie</search>", "<search>Poland</search>", "<answer>x</answer>", ""])
    assert index.calls == 1
    observations, rewards, terminated, truncated, infos = env.step(["<answer>Vistula</answer>", "oops", "ignored", ""])
    assert index.calls == 1
    assert (observations[2], rewards[2], terminated[2], truncated[2]) == ("", 0.0, False, False)
    assert infos["rewards"]["_format"].tolist() == [True, True, False, False]


def test_vector_reset_draws_by_seed() -> None:
    env = SearchVectorEnv(ListIndex(), QUESTIONS, 6, RULES)
    assert env.reset(seed=3)[0] == env.reset(seed=3)[0]
    assert env.reset(seed=[1, 2, 3, 4, 5, 6])[0][:3] == env.reset(seed=[1, 2, 3, 9, 9, 9])[0][:3]
    assert env.observation_space.contains(env.reset(seed=3)[0])


scripts = st.lists(
    st.sampled_from(
        ["<search>Warsaw</search>", "<search>Curie Poland</search>", "oops", "", "<answer>Warsaw</answer>"]
    ),
    min_size=4,
    max_size=4,
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["q1", "q2"]), scripts), min_size=1, max_size=4))
def test_the_vector_form_plays_as_single_ones_do(plan: list[tuple[str, list[str]]]) -> None:
    single = InfoGain(SearchEnv(ListIndex(), QUESTIONS, RULES), beliefs, weight=0.5)  # type: ignore[arg-type]
    vector = VectorInfoGain(SearchVectorEnv(ListIndex(), QUESTIONS, len(plan), RULES), beliefs, weight=0.5)  # type: ignore[arg-type]
    vector.reset(options={"questions": [question for question, _ in plan]})
    singles = []
    for question, script in plan:
        single.reset(options={"question": question})
        steps = []
        for action in script:
            steps.append(single.step(action))
            if steps[-1][2] or steps[-1][3]:
                break
        singles.append(steps)
    for turn in range(max(map(len, singles))):
        observations, rewards, terminated, truncated, infos = vector.step([script[turn] for _, script in plan])
        for place, steps in enumerate(singles):
            if turn < len(steps):
                observation, reward, ended, cut, info = steps[turn]
                assert (observations[place], terminated[place], truncated[place]) == (observation, ended, cut)
                assert rewards[place] == pytest.approx(reward)
                channels = infos["rewards"]
                present = {name for name in channels if not name.startswith("_") and channels[f"_{name}"][place]}
                assert present == set(info["rewards"])


def test_gains_telescope_and_the_answering_turn_has_none() -> None:
    env = InfoGain(SearchEnv(ListIndex(), QUESTIONS, RULES), beliefs)  # type: ignore[arg-type]
    env.reset(options={"question": "q1"})
    gains = [env.step(f"<search>{query}</search>")[4]["rewards"]["info_gain"] for query in ("Curie", "Warsaw", "zzz")]
    assert gains == [0.0, 1.0, 0.0]
    assert "info_gain" not in env.step("<answer>Vistula</answer>")[4]["rewards"]
    probability = InfoGain(SearchEnv(ListIndex(), QUESTIONS, RULES), beliefs, log=False)  # type: ignore[arg-type]
    probability.reset(options={"question": "q1"})
    gain = probability.step("<search>Warsaw</search>")[4]["rewards"]["info_gain"]
    assert gain == pytest.approx(np.exp(-2.0) - np.exp(-3.0))


def test_a_scorer_that_gives_nan_is_named() -> None:
    env = InfoGain(SearchEnv(ListIndex(), QUESTIONS, RULES), lambda conversations, answers: [[float("nan")]])
    with pytest.raises(ValueError, match=r"gave nan for the answer 'Vistula'"):
        env.reset(options={"question": "q1"})


def test_wrong_use_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        SearchEnv(ListIndex(), [])
    with pytest.raises(ValueError, match="stand twice"):
        SearchEnv(ListIndex(), [QUESTIONS[0]] * 2)
    with pytest.raises(ValueError, match="search-r1, tinywiki"):
        Rules(prompt="none")
    with pytest.raises(ValueError, match="em, f1"):
        Rules(metric="none")
    with pytest.raises(ValueError, match="max_turns=0"):
        Rules(max_turns=0)
    with pytest.raises(ValueError, match="weights"):
        Rules(weights={"outcome": 1.0})
    env = SearchEnv(ListIndex(), QUESTIONS)
    with pytest.raises(ResetNeeded):
        env.step("x")
    with pytest.raises(ValueError, match="no question 'q9'"):
        env.reset(options={"question": "q9"})
    env.reset()
    with pytest.raises(TypeError, match="the action is a int"):
        env.step(3)  # type: ignore[arg-type]
    vector = SearchVectorEnv(ListIndex(), QUESTIONS, 1)
    with pytest.raises(ValueError, match="2 questions for 1 places"):
        vector.reset(options={"questions": ["q1", "q2"]})
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="2 actions for 1 environments"):
        vector.step(["a", "b"])
    several = SearchVectorEnv(ListIndex(), QUESTIONS, 2)
    several.reset(seed=0)
    with pytest.raises(TypeError, match="the action is a NoneType"):
        several.step(["<search>a</search>", None])  # type: ignore[list-item]
    assert [episode.conversation.turn for episode in several.episodes] == [0, 0]
    with pytest.raises(TypeError, match="wraps a SearchEnv"):
        InfoGain(gymnasium.Env(), beliefs)  # type: ignore[arg-type]


def starts(*questions: str) -> list[Start]:
    return [Start(question, group, seed) for seed, (group, question) in enumerate(enumerate(questions))]


def test_rollout_records_whole_episodes_in_order_however_they_are_batched() -> None:
    asked = starts("q1", "q2", "q1", "q2", "q2")
    records = []
    for num_envs in (1, 2, 5):
        env = SearchVectorEnv(ListIndex(), QUESTIONS, num_envs, RULES)
        records.append(rollout(env, RandomPolicy(), asked))
    assert records[0] == records[1] == records[2]
    for episode, start in zip(records[0], asked, strict=True):
        assert (episode.question.id, episode.group, episode.seed) == (start.question, start.group, start.seed)
        assert episode.turns[-1].observation == ""
        assert all(turn.observation for turn in episode.turns[:-1])
        assert "outcome" in episode.turns[-1].rewards
        assert episode.conversation.turn == len(episode.turns)


def test_the_oracle_finds_all_and_the_others_less() -> None:
    env = SearchVectorEnv(ListIndex(), QUESTIONS, 2, RULES)
    titles = {passage.id: passage.title for passage in PASSAGES}
    won = rollout(env, oracle(prompts_of(env), titles), starts("q1", "q2"))
    assert [episode.total("outcome") for episode in won] == [1.0, 1.0]
    assert all(set(e.question.supporting) <= {p for t in e.turns for p in t.retrieved} for e in won)
    once = rollout(env, search_once(prompts_of(env)), starts("q1", "q2"))
    assert [episode.total("outcome") for episode in once] == [0.0, 0.0]
    assert all(episode.turns[0].retrieved for episode in once)


def test_a_policy_with_the_wrong_number_of_actions_is_named() -> None:
    env = SearchVectorEnv(ListIndex(), QUESTIONS, 2, RULES)
    with pytest.raises(ValueError, match="gave 1 actions for 2 conversations"):
        rollout(env, lambda conversations: ["<answer>x</answer>"], starts("q1", "q2"))
    with pytest.raises(ValueError, match="at least one action"):
        ScriptedPolicy([])


tags = st.sampled_from(
    ["<search>", "</search>", "<answer>", "</answer>", "<think>", "</think>", "a", "Warsaw", " ", "\ud800", "\n"]
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(tags, max_size=8).map("".join), min_size=4, max_size=4))
def test_no_action_breaks_the_environment_or_its_budget(script: list[str]) -> None:
    env = SearchVectorEnv(ListIndex(), QUESTIONS, 1, RULES)
    (episode,) = rollout(env, ScriptedPolicy(script), starts("q1"))
    assert 1 <= len(episode.turns) <= RULES.max_turns
    assert episode.stop in (Stop.ANSWERED, Stop.MAX_TURNS)
    assert 0 <= episode.total("outcome") <= 1
