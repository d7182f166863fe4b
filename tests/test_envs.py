"""The environments: Gymnasium's contract, ours, budgets, and what goes wrong."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import VectorEnv

from agentgym_ig import AgentGymError, Stop
from agentgym_ig.envs import (
    DATASET_IDS,
    Evidence,
    InfoGain,
    Outcome,
    RepeatQuery,
    Rules,
    SearchCost,
    SearchEnv,
    SearchVectorEnv,
    SelfGuide,
    add_channel,
)
from agentgym_ig.envs.testing import EnvContract, VectorEnvContract
from agentgym_ig.errors import SearchRefused
from agentgym_ig.indexes import Bm25Index
from agentgym_ig.prompts import PROMPTS, Prompt, with_guide
from agentgym_ig.types import Action, Hit
from tests.fakes import PASSAGES, QUESTIONS, BrokenIndex, ListIndex, shown_words

RULES = Rules(max_turns=4, top_k=2, weights={"outcome": 1.0, "format": 0.25})
TOOLS = Rules(prompt="igpo", max_turns=4, top_k=2)


class TestTags(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        return SearchEnv(ListIndex(), QUESTIONS, RULES)


class TestTools(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        return SearchEnv(ListIndex(), QUESTIONS, TOOLS)


class TestTinyWiki(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        return gymnasium.make("agentgym_ig/TinyWiki-v0", per_dataset=20)


class TestBudgets(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        return SearchEnv(ListIndex(), QUESTIONS, Rules(max_turns=4, max_searches=1, max_observation=20))


def wrapped(env: Any) -> Any:
    """Every channel that needs no model, and one that has a made-up one."""
    for channel in (Outcome("cover_em"), SearchCost(), RepeatQuery(), Evidence(), SelfGuide()):
        env = add_channel(env, channel, weight=0.5)
    return add_channel(env, InfoGain(shown_words), weight=lambda: 0.125)


class TestAllChannels(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        made: gymnasium.Env[str, str] = wrapped(SearchEnv(ListIndex(), QUESTIONS, RULES))
        return made


class TestVectorTags(VectorEnvContract):
    def make(self, num_envs: int) -> VectorEnv[Any, Any, Any]:
        return SearchVectorEnv(ListIndex(), QUESTIONS, num_envs, RULES)

    def make_single(self) -> gymnasium.Env[str, str]:
        return SearchEnv(ListIndex(), QUESTIONS, RULES)


class TestVectorAllChannels(VectorEnvContract):
    def make(self, num_envs: int) -> VectorEnv[Any, Any, Any]:
        made: VectorEnv[Any, Any, Any] = wrapped(SearchVectorEnv(ListIndex(), QUESTIONS, num_envs, TOOLS))
        return made

    def make_single(self) -> gymnasium.Env[str, str]:
        made: gymnasium.Env[str, str] = wrapped(SearchEnv(ListIndex(), QUESTIONS, TOOLS))
        return made


@pytest.fixture
def toy_index(toy: Path) -> Path:
    Bm25Index.build(PASSAGES, toy / "index")
    return toy / "index"


@pytest.mark.parametrize("name", ["agentgym_ig/Search-v0", *DATASET_IDS])
def test_every_registered_id_is_made_from_paths(name: str, toy: Path, toy_index: Path) -> None:
    dataset = DATASET_IDS.get(name, "hotpotqa")
    (toy / "questions" / f"{dataset}.jsonl").write_text((toy / "questions" / "hotpotqa.jsonl").read_text())
    questions = toy / "questions" / f"{dataset}.jsonl" if name == "agentgym_ig/Search-v0" else toy / "questions"

    class Contract(EnvContract):
        def make(self) -> gymnasium.Env[str, str]:
            return gymnasium.make(name, index=toy_index, questions=questions, rules=RULES)

    Contract().test_gymnasium_accepts_it()
    Contract().test_channels_add_up_to_the_reward()
    vector = gymnasium.make_vec(
        name, num_envs=3, index=toy_index, questions=questions, vectorization_mode="vector_entry_point"
    )
    assert len(vector.reset(seed=0)[0]) == 3


def test_gymnasiums_own_vectors_take_it_too() -> None:
    vector = gymnasium.make_vec("agentgym_ig/TinyWiki-v0", num_envs=2, vectorization_mode="sync", per_dataset=5)
    prompts, _ = vector.reset(seed=0)
    replies, rewards, *_ = vector.step(("<search>film</search>", "<answer>x</answer>"))
    assert len(prompts) == len(replies) == len(rewards) == 2


def test_paths_that_lead_nowhere_are_named(toy: Path, toy_index: Path) -> None:
    def make(questions: Path, name: str = "agentgym_ig/NQ-v0") -> None:
        gymnasium.make(name, index=toy_index, questions=questions)

    with pytest.raises(AgentGymError, match=r"it holds no nq\.jsonl"):
        make(toy / "questions")
    with pytest.raises(AgentGymError, match="name one of its question files"):
        make(toy / "questions", "agentgym_ig/Search-v0")
    (toy / "empty.jsonl").write_text("")
    with pytest.raises(AgentGymError, match=r"empty\.jsonl holds no question"):
        make(toy / "empty.jsonl")
    (toy / "none.jsonl").write_text(json.dumps({"id": "1", "question": "Who?", "answers": []}))
    with pytest.raises(AgentGymError, match=r"none\.jsonl:1: question '1' has no answer"):
        make(toy / "none.jsonl")
    with pytest.raises(AgentGymError, match="no index in"):
        gymnasium.make("agentgym_ig/NQ-v0", index=toy / "nothing", questions=QUESTIONS)


def test_the_reply_shows_passages_and_the_answer_is_scored_over_all_aliases() -> None:
    env = SearchEnv(ListIndex(), QUESTIONS, RULES, render_mode="ansi")
    prompt, info = env.reset(options={"question": "q1"})
    assert "Marie Curie was born" in prompt
    assert info == {"question": "q1"}
    reply, reward, terminated, truncated, info = env.step("<think>?</think><search>capital Vistula</search>")
    assert "[1] Warsaw: Warsaw is the capital" in reply
    assert (reward, terminated, truncated, info["stop"]) == (0.0, False, False, None)
    assert info["retrieved"] == ("p2", "p3")
    assert info["queries"] == ("capital Vistula",)
    _, reward, terminated, truncated, info = env.step("<answer>The Vistula.</answer>")
    assert (reward, terminated, truncated, info["stop"]) == (1.0, True, False, Stop.ANSWERED)


def test_it_draws_itself_for_a_terminal() -> None:
    env = SearchEnv(ListIndex(), QUESTIONS, RULES, render_mode="ansi")
    assert "call reset()" in str(env.render())
    env.reset(options={"question": "q1"})
    env.step("<think>\x1b[2J\u202e</think><search>capital Vistula</search>")
    env.step("<answer>the Vistula</answer>")
    drawn = str(env.render())
    order = ["On which river", "turn 1 of 4", "capital Vistula", "[1] Warsaw", "turn 2 of 4", "answered after 2"]
    places = [drawn.find(part) for part in order]
    assert -1 not in places
    assert places == sorted(places)
    assert "\x1b[2J" not in drawn, "what a policy writes must not steer the terminal"
    assert "\u202e" not in drawn
    assert SearchEnv(ListIndex(), QUESTIONS, RULES).render() is None


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


def test_several_queries_are_one_search_and_their_passages_one_list() -> None:
    index = ListIndex()
    env = SearchEnv(index, QUESTIONS, TOOLS)
    env.reset(seed=0)
    call = '<tool_call>{"name": "search", "arguments": {"query": ["radium", "Vistula", "Curie"]}}</tool_call>'
    reply, *_, info = env.step(call)
    assert index.calls == 1
    assert info["queries"] == ("radium", "Vistula", "Curie")
    assert info["retrieved"] == ("p1", "p2", "p3")
    assert "<information>" not in reply


def test_searches_are_limited() -> None:
    rules = Rules(prompt="igpo", max_turns=9, max_searches=3)
    call = '<tool_call>{"name": "search", "arguments": {"query": ["radium", "Vistula"]}}</tool_call>'
    index = ListIndex()
    env = SearchEnv(index, QUESTIONS, rules)
    env.reset(seed=0)
    assert env.step(call)[4]["stop"] is None
    reply, _, terminated, truncated, info = env.step(call)
    assert (reply, terminated, truncated, info["stop"]) == ("", False, True, Stop.MAX_SEARCHES)
    assert info["queries"] == ()
    assert index.calls == 1


def test_observation_tokens_are_limited_and_counted_as_asked() -> None:
    def episode(budget: int, **options: Any) -> tuple[tuple[str, ...], Stop | None]:
        env = SearchEnv(ListIndex(), QUESTIONS, Rules(max_observation=budget), **options)
        env.reset(seed=0)
        info = env.step("<search>Poland Vistula</search>")[4]
        return info["retrieved"], info["stop"]

    # p2 is shown with 13 words, p3 with 10, around them stand <information> and </information>
    assert episode(25) == (("p2", "p3"), None)
    assert episode(24) == (("p2",), None)
    assert episode(15) == (("p2",), None)
    assert episode(14) == ((), Stop.MAX_OBSERVATION)
    assert episode(10_000, count_tokens=len) == (("p2", "p3"), None)
    assert episode(25, count_tokens=len) == ((), Stop.MAX_OBSERVATION)
    env = SearchEnv(ListIndex(), QUESTIONS, Rules(max_observation=26))
    env.reset(seed=0)
    assert env.step("<search>Poland Vistula</search>")[4]["stop"] is None
    assert env.step("nonsense")[4]["stop"] is Stop.MAX_OBSERVATION


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
    assert set(info) == {"rewards", "queries", "retrieved", "stop", "question"}


def test_a_failed_search_ends_its_episode_alone() -> None:
    env = SearchVectorEnv(BrokenIndex(), QUESTIONS, 3, RULES)
    env.reset(options={"questions": ["q1", "q2", "q1"]})
    _, _, terminated, truncated, infos = env.step(["<search>a</search>", "<answer>Warsaw</answer>", "hm"])
    assert list(infos["stop"]) == [Stop.SEARCH_FAILED, Stop.ANSWERED, None]
    assert truncated.tolist() == [True, False, False]
    assert terminated.tolist() == [False, True, False]
    assert infos["rewards"]["_outcome"].tolist() == [False, True, False]
    assert env.active.tolist() == [False, False, True]


class FussyIndex(ListIndex):
    """Refuses a whole request for one query in it, as a server with bounds does."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        if "forbidden" in queries:
            raise SearchRefused("no")
        return super().search(queries, k)

    async def asearch(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return self.search(queries, k)


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_a_refused_query_does_not_cost_the_others_theirs(in_a_loop: bool) -> None:
    env = SearchVectorEnv(FussyIndex(), QUESTIONS, 3, RULES)
    env.reset(seed=0)
    actions = ["<search>Warsaw</search>", "<search>forbidden</search>", "<search>Vistula</search>"]
    infos = asyncio.run(env.astep(actions))[4] if in_a_loop else env.step(actions)[4]
    assert list(infos["stop"]) == [None, Stop.SEARCH_FAILED, None]
    assert infos["retrieved"][2] == ("p2", "p3")


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


def test_event_loops_search_side_by_side() -> None:
    class Slow(ListIndex):
        def __init__(self) -> None:
            super().__init__()
            self.under_way = self.most = 0

        async def asearch(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await asyncio.sleep(0.01)
            self.under_way -= 1
            return self.search(queries, k)

    async def both(env: SearchVectorEnv) -> Any:
        search = "<search>Warsaw</search>"
        return await asyncio.gather(env.astep([search, None]), env.astep([None, search]))

    index = Slow()
    env = SearchVectorEnv(index, QUESTIONS, 2, RULES)
    env.reset(seed=0)
    (_, _, _, _, first), (_, _, _, _, second) = asyncio.run(both(env))
    assert index.most == 2
    assert (first["_stop"].tolist(), second["_stop"].tolist()) == ([True, False], [False, True])


def test_tokens_of_an_action_stay_with_it() -> None:
    env = SearchEnv(ListIndex(), QUESTIONS, RULES)
    env.reset(seed=0)
    env.step(Action("<search>Warsaw</search>", (5, 6, 7), (-0.1, -0.2, -0.3)))
    assert env.episode is not None
    assert [message.token_ids for message in env.episode.conversation.messages] == [None, (5, 6, 7), None]


def test_prompts_are_data() -> None:
    own = Prompt(
        system="Be brief.",
        question="Q: {question}",
        passage="* {text}",
        reply="<information>{passages}</information>",
        nothing_found="-",
        malformed="?",
        answer_prefix="<answer>",
        answer_suffix="</answer>",
    )
    env = SearchEnv(ListIndex(), QUESTIONS, Rules(prompt=own))
    assert env.reset(options={"question": "q2"})[0] == "Be brief.\n\nQ: What is the capital of Poland?"
    assert env.step("<search>radium</search>")[0] == f"<information>* {PASSAGES[0].text}</information>"
    guided = SearchEnv(ListIndex(), QUESTIONS, Rules(prompt=with_guide(PROMPTS["search-r1"])))
    assert "<guide>" in guided.reset(seed=0)[0]
    with pytest.raises(ValueError, match=r"prompt's passage has no \{text\}"):
        Prompt(**{name: getattr(own, name) for name in own.__slots__} | {"passage": "x"})


def test_wrong_use_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        SearchEnv(ListIndex(), [])
    with pytest.raises(ValueError, match="stand twice"):
        SearchEnv(ListIndex(), [QUESTIONS[0]] * 2)
    with pytest.raises(ValueError, match="igpo, search-r1, tinywiki"):
        Rules(prompt="none")
    with pytest.raises(ValueError, match="em, f1"):
        Rules(metric="none")
    with pytest.raises(ValueError, match="max_turns=0"):
        Rules(max_turns=0)
    with pytest.raises(ValueError, match="max_searches=-1"):
        Rules(max_searches=-1)
    with pytest.raises(ValueError, match="weights"):
        Rules(weights={"outcomes": 1.0})
    env = SearchEnv(ListIndex(), QUESTIONS)
    with pytest.raises(ResetNeeded):
        env.step("x")
    with pytest.raises(ValueError, match="no question 'q9'"):
        env.reset(options={"question": "q9"})
    vector = SearchVectorEnv(ListIndex(), QUESTIONS, 1)
    with pytest.raises(ValueError, match="2 questions for 1 places"):
        vector.reset(options={"questions": ["q1", "q2"]})
    with pytest.raises(ValueError, match=r"reset_mask is int64 \(1,\), wanted bool \(1,\)"):
        vector.reset(options={"reset_mask": np.array([1])})
    with pytest.raises(ValueError, match="0 seeds for 1 episodes"):
        vector.reset(seed=[])
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="2 actions for 1 environments"):
        vector.step(["a", "b"])
    several = SearchVectorEnv(ListIndex(), QUESTIONS, 2)
    several.reset(seed=0)
    with pytest.raises(TypeError, match="the action is a float"):
        several.step(["<search>a</search>", 0.5])  # type: ignore[list-item]
    assert [episode and episode.turn for episode in several.episodes] == [0, 0]
