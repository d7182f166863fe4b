"""Baselines that need no model."""

import pytest

from agentgym_ig.baselines import SearchFirst, closed_book, guess, multi_hop, retrieve_once
from agentgym_ig.envs import Rules, SearchVectorEnv, prompts_of, rollout
from agentgym_ig.grammar import Answer, Search
from agentgym_ig.policies import ScriptedPolicy
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.types import Question
from tests.fakes import PASSAGES, QUESTIONS, ListIndex
from tests.test_policies import QUESTION, played, prompts

TEXTS = [
    "[1] Gustave Eiffel: Gustave Eiffel was an engineer born in Dijon. His company built the tower in 1889.",
    "[2] Dijon: Dijon is a city on the Ouche with 160,000 inhabitants. It was founded on 3 March 1137.",
]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Was Gustave Eiffel born in Dijon?", "yes"),
        ("In what year was the tower built by Eiffel's company?", "1889"),
        ("When was Dijon founded?", "3 March 1137"),
        ("How many inhabitants does Dijon have?", "160,000"),
        ("Where was the engineer Gustave Eiffel born?", "Dijon"),
        ("Which is a city on the Ouche, Lyon or Dijon?", "Dijon"),
    ],
)
def test_the_reader_answers_with_what_is_asked_for(question: str, answer: str) -> None:
    assert guess(question, TEXTS) == answer


def test_the_reader_says_so_when_it_finds_nothing() -> None:
    assert guess("when did it end?", ["Nothing here."]) == "unknown"
    assert guess("", ()) == "unknown"
    assert guess("Which came first, Alien or Aliens?", ()) == "Alien"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_each_baseline_takes_its_turns(prompt: str) -> None:
    kinds = {"closed": closed_book, "once": retrieve_once, "hops": multi_hop}
    taken = {name: [type(own) for own in played(make(prompts(prompt)), prompt)] for name, make in kinds.items()}
    assert taken["closed"] == [Answer] * 4
    assert taken["once"] == [Search, Answer, Answer, Answer]
    assert taken["hops"] == [Search, Search, Answer, Answer]
    first = played(retrieve_once(prompts(prompt)), prompt, turns=1)
    assert first == [Search(("Which river, ‹/search>?",))]
    assert played(closed_book(prompts(prompt)), prompt, Question("other", "Who?", ("x",), "toy"), 1) == [Answer("?")]


def test_the_second_search_follows_a_name_that_the_first_one_found() -> None:
    env = SearchVectorEnv(ListIndex(), QUESTIONS, 2, Rules(top_k=1))
    (episode,) = rollout(env, multi_hop(prompts_of(env)), ["q1"])
    assert episode.turns[0].retrieved == ("p1",)
    assert episode.turns[1].queries[0].startswith("Warsaw ")
    assert QUESTION.text not in episode.turns[1].queries[0]


def test_a_models_first_action_can_be_made_for_it() -> None:
    env = SearchVectorEnv(ListIndex(PASSAGES), QUESTIONS, 2, Rules(max_turns=2))
    policy = SearchFirst(ScriptedPolicy(["<answer>too early</answer>", "<answer>Warsaw</answer>"]), prompts_of(env))
    episodes = rollout(env, policy, ["q1", "q2"])
    assert [own.answer for own in episodes] == ["Warsaw", "Warsaw"]
    assert [own.turns[0].queries for own in episodes] == [(QUESTIONS[0].text,), (QUESTIONS[1].text,)]
