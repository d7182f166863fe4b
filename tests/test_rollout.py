"""Episodes played and recorded: order, places, lanes, files, and policies that misbehave."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig import Action, Conversation, CorpusError, RandomPolicy, ScriptedPolicy, Stop, Trajectory, retrieve_once
from agentgym_ig.envs import (
    Evidence,
    InfoGain,
    Outcome,
    Rules,
    SearchCost,
    SearchEnv,
    SearchVectorEnv,
    Start,
    add_channel,
    prompts_of,
    rollout,
)
from agentgym_ig.envs.rollout import VectorSearch
from agentgym_ig.records import read_episodes, write_episodes
from agentgym_ig.types import Hit, Question
from tests.fakes import PASSAGES, QUESTIONS, ListIndex, shown_words

RULES = Rules(max_turns=4, top_k=2)


def starts(*questions: str) -> list[Start]:
    return [Start(question, group, seed) for seed, (group, question) in enumerate(enumerate(questions))]


def make(num_envs: int, rules: Rules = RULES) -> VectorSearch:
    env = add_channel(SearchVectorEnv(ListIndex(), QUESTIONS, num_envs, rules), InfoGain(shown_words))
    return add_channel(add_channel(env, Evidence()), SearchCost(), weight=0.1)


MANY = starts(*["q1", "q2", "q2"] * 7)


@pytest.mark.parametrize("prompt", ["search-r1", "igpo"])
@pytest.mark.parametrize(("num_envs", "lanes"), [(1, 1), (2, 1), (5, 2), (5, 5), (3, 4), (64, 3)])
def test_neither_places_nor_lanes_change_an_episode(prompt: str, num_envs: int, lanes: int) -> None:
    rules = Rules(prompt=prompt, max_turns=4, top_k=2)
    expected = rollout(make(1, rules), RandomPolicy(), MANY)
    assert rollout(make(num_envs, rules), RandomPolicy(), MANY, lanes=lanes) == expected
    assert len({len(episode.turns) for episode in expected}) > 1


def test_records_are_whole_and_in_order() -> None:
    for episode, start in zip(rollout(make(4), RandomPolicy(), MANY), MANY, strict=True):
        assert (episode.question.id, episode.group, episode.seed) == (start.question, start.group, start.seed)
        assert episode.turns[-1].observation == ""
        assert all(turn.observation for turn in episode.turns[:-1])
        assert "outcome" in episode.turns[-1].rewards
        assert episode.conversation.turn == len(episode.turns)
        assert episode.conversation.messages[:1] == episode.opening
        assert [turn.rewards.get("info_gain") is None for turn in episode.turns][-1]
        assert all("info_gain" in turn.rewards for turn in episode.turns[:-1])


def test_the_vector_form_records_what_single_environments_play() -> None:
    for episode in rollout(make(8), RandomPolicy(), MANY):
        env = SearchEnv(ListIndex(), QUESTIONS, RULES)
        env.reset(seed=episode.seed, options={"question": episode.question.id})
        assert env.episode is not None
        for turn in episode.turns:
            (action,) = RandomPolicy()([env.episode.conversation])
            assert action == turn.action.text
            observation, *_, info = env.step(action)
            assert (observation, info["queries"], info["retrieved"]) == (turn.observation, turn.queries, turn.retrieved)
        assert env.episode.stop is episode.stop


def test_questions_and_ids_will_do() -> None:
    named = rollout(make(2), RandomPolicy(), ["q1", "q2"], seed=5)
    assert named == rollout(make(2), RandomPolicy(), QUESTIONS, seed=5)
    assert [(episode.group, episode.seed) for episode in named] == [(0, 5), (1, 6)]
    assert rollout(make(2), RandomPolicy(), []) == []


def test_a_finished_episode_gives_its_place_away_at_once() -> None:
    def policy(conversations: Sequence[Conversation]) -> list[str]:
        sizes.append(len(conversations))
        long = "longest"
        return [
            "<search>a</search>" if "born" in own.messages[0].text else f"<answer>{long}</answer>"
            for own in conversations
        ]

    sizes: list[int] = []
    rollout(make(2), policy, starts("q1", "q2", "q2", "q2", "q2"))
    assert sizes == [2, 2, 2, 2]  # q1 takes four turns, the four others one each


def test_progress_is_told_and_can_be_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[int] = []
    rollout(make(2), RandomPolicy(), MANY[:5], progress=told.append)
    assert told[0] == 0
    assert told[-1] == 5
    assert told == sorted(told)
    rollout(make(2), RandomPolicy(), MANY[:5], progress=True)
    assert "5/5" in capsys.readouterr().out


def test_lanes_act_while_others_search() -> None:
    class Waiting(ListIndex):
        """Comes back only when the policy has acted again."""

        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            overlaps.append(acted_again.wait(timeout=20))
            return super().search(queries, k)

    def policy(conversations: Sequence[Conversation]) -> list[str]:
        threads.append(threading.get_ident())
        if len(threads) == 2:
            acted_again.set()
        return ["<search>a</search>"] * len(conversations)

    threads: list[int] = []
    overlaps: list[bool] = []
    acted_again = threading.Event()
    rollout(SearchVectorEnv(Waiting(), QUESTIONS, 4, RULES), policy, MANY[:4], lanes=2)
    assert all(overlaps)
    assert set(threads) == {threading.get_ident()}, "a policy is called from one thread alone"


def test_a_file_keeps_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "episodes.jsonl"
    expected = rollout(make(3), RandomPolicy(), MANY)
    assert rollout(make(3), RandomPolicy(), MANY[:10], out=path) == expected[:10]
    content = path.read_bytes()
    path.write_bytes(content + b'{"question": {"id": "q1", "te')  # a crash in the middle of a line
    played: list[int] = []

    def counting(conversations: Sequence[Conversation]) -> list[str]:
        played.extend(own.seed for own in conversations)
        return RandomPolicy()(conversations)

    assert rollout(make(3), counting, MANY, out=path) == expected
    assert min(played) == 10, "what the file holds is not played again"
    assert path.read_bytes().startswith(content)
    assert sorted(read_episodes(path), key=lambda own: own.group) == expected
    assert rollout(make(3), counting, MANY, out=path) == expected


def test_files_of_something_else_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for content in (
        '{"question": "Who?", "answer": "x"}',
        "my notes",
        "my notes\n",
        '{"a": 1}\n',
        '{"question": {"id": "q1"}}\n',
    ):
        path.write_text(content)
        with pytest.raises(CorpusError, match=r"notes\.txt"):
            rollout(make(3), RandomPolicy(), MANY, out=path)
        assert path.read_text() == content
    other = tmp_path / "other.jsonl"
    rollout(make(3), RandomPolicy(), MANY[:2], out=other)
    with pytest.raises(CorpusError, match=r"an episode of 'q1'.*not asked for now"):
        rollout(make(3), RandomPolicy(), MANY[1:], out=other)
    with pytest.raises(CorpusError, match="whose question or prompt was another"):
        rollout(make(3, Rules(max_turns=3)), RandomPolicy(), MANY, out=other)


def test_numbers_of_numpy_can_be_written(tmp_path: Path) -> None:
    action = Action("<answer>x</answer>", (1,), (np.float32(-0.5),))  # type: ignore[arg-type]
    asked = [Start("q1", 0, np.int64(3))]  # type: ignore[arg-type]
    (episode,) = rollout(make(1), lambda conversations: [action], asked, out=tmp_path / "a.jsonl")
    assert read_episodes(tmp_path / "a.jsonl") == [episode]


PROGRAM = """
import sys, time
from pathlib import Path
from agentgym_ig import RandomPolicy
from tests.test_rollout import MANY, make
from agentgym_ig.envs import rollout

def slow(conversations):
    time.sleep(0.05)
    return RandomPolicy()(conversations)

rollout(make(2), slow, MANY, out=Path(sys.argv[1]))
"""


def test_a_killed_process_loses_only_what_was_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], env=environment)
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = path.read_bytes().count(b"\n")
    assert 5 <= done < len(MANY)
    assert rollout(make(2), RandomPolicy(), MANY, out=path) == rollout(make(2), RandomPolicy(), MANY)


def test_strange_characters_survive_a_file(tmp_path: Path) -> None:
    policy = ScriptedPolicy(["<search>東京 \ud800 \u2028</search>", "<answer>\ud800\n\x00</answer>"])
    episodes = rollout(make(1), policy, MANY[:2])
    write_episodes(tmp_path / "a.jsonl", episodes)
    assert read_episodes(tmp_path / "a.jsonl") == episodes
    assert rollout(make(1), policy, MANY[:2], out=tmp_path / "b.jsonl") == episodes
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("turns", [1, 3])
def test_an_episode_that_no_longer_fits_the_policy_ends(turns: int) -> None:
    def policy(conversations: Sequence[Conversation]) -> list[Action | None]:
        return [
            None if own.turn >= turns and "born" in own.messages[0].text else Action("<search>Warsaw</search>")
            for own in conversations
        ]

    env = add_channel(make(2, Rules(max_turns=4, top_k=2, weights={})), Outcome("em", name="outcome"))
    first, second = rollout(env, policy, starts("q1", "q2"))
    assert (first.stop, second.stop) == (Stop.CONTEXT_FULL, Stop.MAX_TURNS)
    assert (len(first.turns), len(second.turns)) == (turns, 4)
    assert (first.turns[-1].observation, first.turns[-1].retrieved) == ("", ())
    assert first.turns[-1].rewards["outcome"] == 0.0
    assert set(first.turns[-1].rewards) == {"outcome", "search_cost"}, "what was about the reply is gone"
    assert first.conversation.messages[-1].role == "assistant"


def test_policies_that_misbehave_are_named() -> None:
    with pytest.raises(ValueError, match="gave 1 actions for 2 conversations"):
        rollout(make(2), lambda conversations: ["<answer>x</answer>"], starts("q1", "q2"))
    with pytest.raises(ValueError, match="question 'q1' alone does not fit the policy"):
        rollout(make(2), lambda conversations: [None] * len(conversations), starts("q1"))
    numbers: Any = lambda conversations: [3] * len(conversations)  # noqa: E731
    with pytest.raises(TypeError, match="the action is a int"):
        rollout(make(2), numbers, starts("q1"))
    with pytest.raises(ValueError, match="lanes=0"):
        rollout(make(2), RandomPolicy(), MANY, lanes=0)
    with pytest.raises(ValueError, match="no question 'q9' among 2"):
        rollout(make(2), lambda conversations: pytest.fail("it must not begin"), ["q1", "q9"])


TAGS = [f"<{slash}{tag}>" for tag in ("search", "answer", "think", "guide", "tool_call") for slash in ("", "/")]
tags = st.sampled_from([*TAGS, "a", "Warsaw", " ", "\ud800", '{"name": "search", "arguments": {"query": ["a"]}}'])


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(tags, max_size=8).map("".join), min_size=4, max_size=4), st.sampled_from(["search-r1", "igpo"])
)
def test_no_action_breaks_the_environment_or_its_budget(script: list[str], prompt: str) -> None:
    episode: Trajectory
    (episode,) = rollout(make(1, Rules(prompt=prompt, max_turns=4)), ScriptedPolicy(script), starts("q1"))
    assert 1 <= len(episode.turns) <= 4
    assert episode.stop in (Stop.ANSWERED, Stop.MAX_TURNS)
    assert 0 <= episode.total("outcome") <= 1
    json.dumps(episode.turns[0].rewards)


def test_openings_with_a_system_message_are_told_apart_by_the_question() -> None:
    env = make(2, Rules(prompt="igpo"))
    assert {own.id for own in prompts_of(env).values()} == {"q1", "q2"}
    once: list[Trajectory] = rollout(env, retrieve_once(prompts_of(env)), starts("q1", "q2"))
    assert all(episode.opening[0].role == "system" for episode in once)
    assert all(isinstance(episode.question, Question) for episode in once)
    assert len(PASSAGES) == 3
