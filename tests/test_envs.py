"""The environments: what is shown, budgets, failures, and wrong use."""

import asyncio
import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from agentgym_ig import Stop
from agentgym_ig.envs import (
    Rules,
    SearchEnv,
    SearchVectorEnv,
)
from agentgym_ig.errors import SearchRefused
from agentgym_ig.prompts import PROMPTS, Prompt, with_guide
from agentgym_ig.types import Action, Hit
from tests.fakes import PASSAGES, QUESTIONS, BrokenIndex, ListIndex
from tests.test_contracts import wrapped

RULES = Rules(max_turns=4, top_k=2, weights={"outcome": 1.0, "format": 0.25})
TOOLS = Rules(prompt="igpo", max_turns=4, top_k=2)


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


def test_seeds_and_ids_may_come_from_numpy() -> None:
    env = SearchVectorEnv(ListIndex(), QUESTIONS, 3, RULES)
    expected = env.reset(seed=7)[0]
    assert env.reset(seed=np.int64(7))[0] == env.reset(seed=np.arange(7, 10))[0] == expected  # type: ignore[arg-type]
    assert env.reset(options={"questions": np.array(["q2", "q1"])})[1]["question"].tolist() == ["q2", "q1", None]
    assert not env.reset(options={"questions": []})[1]["_question"].any()


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


class Unlucky(ListIndex):
    """Breaks in ways that no index should; `asearch` never comes back."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        if "broken" in queries:
            raise ConnectionError("cable")
        return super().search(queries, k)[: 0 if "short" in queries else None]

    async def asearch(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        await asyncio.sleep(60)
        return []


@pytest.mark.parametrize("query", ["broken", "short", "slow"])
def test_a_step_that_breaks_or_is_cancelled_changes_nothing(query: str) -> None:
    env = SearchVectorEnv(Unlucky(), QUESTIONS, 2, Rules(max_turns=4, max_searches=1))
    env.reset(seed=0)
    actions = [f"<search>{query}</search>", "<answer>x</answer>"]
    if query == "slow":
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(env.astep(actions), 0.05))
    else:
        with pytest.raises(ConnectionError if query == "broken" else ValueError):
            env.step(actions)
    for episode in env.episodes:
        assert episode is not None
        assert (episode.turn, episode.queries, episode.retrieved) == (0, [], [])
        assert episode.conversation.messages == episode.opening
    assert env.step(["<search>Warsaw</search>", "<answer>x</answer>"])[4]["stop"].tolist() == [None, Stop.ANSWERED]


def test_no_more_passages_are_shown_than_asked_for() -> None:
    class Generous(ListIndex):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            return super().search(queries, k + 5)

    env = SearchEnv(Generous(), QUESTIONS, Rules(top_k=1))
    env.reset(seed=0)
    assert len(env.step("<search>Poland</search>")[4]["retrieved"]) == 1


def test_a_failed_search_says_why() -> None:
    env = SearchEnv(BrokenIndex(), QUESTIONS, RULES)
    env.reset(seed=0)
    assert env.step("<search>a</search>")[4]["error"] == "the server is gone"
    vector = SearchVectorEnv(BrokenIndex(), QUESTIONS, 2, RULES)
    vector.reset(seed=0)
    infos = vector.step(["<search>a</search>", "hm"])[4]
    assert (infos["error"].tolist(), infos["_error"].tolist()) == (["the server is gone", None], [True, False])


def test_copies_of_an_environment_go_on_by_themselves() -> None:
    env = wrapped(SearchEnv(ListIndex(), QUESTIONS, RULES))
    env.weight = 0.125  # a function cannot be pickled
    env.reset(options={"question": "q1"})
    first = env.step("<search>Curie</search>")
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert twin.step("<search>Warsaw</search>") == copy.deepcopy(env).step("<search>Warsaw</search>")
    assert first[4]["queries"] == ("Curie",)
    assert env.step("<answer>x</answer>")[4]["rewards"]["outcome"] == 0.0


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
    with pytest.raises(ValueError, match=r"cannot be filled in.*braces"):
        replace(own, question='Use {"name": "search"}. Q: {question}')
    assert '{"name": 1}' in replace(own, question='{{"name": 1}} {question}').opening("Who?", 1)[1].text
    with pytest.raises(ValueError, match=r"prompt's passage has no \{text\}"):
        replace(own, passage="x")


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
    for wrong in ({"max_searches": -1}, {"max_turns": None}, {"top_k": 2.5}, {"max_observation": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be a whole number"):
            Rules(**wrong)
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
    with pytest.raises(ValueError, match=r"unknown reset options \['question'\]; this form takes"):
        vector.reset(options={"question": "q1"})
    with pytest.raises(ValueError, match=r"unknown reset options \['questions'\]"):
        env.reset(options={"questions": ["q1"]})
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="2 actions for 1 environments"):
        vector.step(["a", "b"])
    several = SearchVectorEnv(ListIndex(), QUESTIONS, 2)
    several.reset(seed=0)
    with pytest.raises(TypeError, match="the action is a float"):
        several.step(["<search>a</search>", 0.5])  # type: ignore[list-item]
    assert [episode and episode.turn for episode in several.episodes] == [0, 0]
