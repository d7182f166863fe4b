"""Policies behind real servers on loopback: what is sent, what becomes of the answer, and what may go wrong."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentgym_ig.envs import rollout
from agentgym_ig.errors import ServerFailed
from agentgym_ig.grammar import GRAMMARS, Answer, Search
from agentgym_ig.lm.encode import ConversationEncoder
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.remote import OpenAIPolicy
from agentgym_ig.remote.policy import request_seed
from agentgym_ig.trainers.tinywiki import warm_start_folder
from agentgym_ig.types import Action, Conversation, Message
from tests.openai_server import (
    ANSWER,
    CALL,
    CALLS,
    FOUND,
    INFORMATION,
    SEARCH,
    TAGS,
    byte_tokenizer,
    client,
    one,
    plan,
    reply,
    seen,
    transformers_serve,
)  # fmt: skip
from tests.tiny import shipped_policy, tiny_env


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(tmp_path_factory.mktemp("logs") / "serve.log") as url:
        yield url


def play(policy: OpenAIPolicy, start: Conversation, found: str, episodes: int = 6) -> None:
    """Two turns of several episodes at once, as a rollout plays them."""
    starts = [Conversation(start.messages, seed, start.grammar) for seed in range(episodes)]
    grammar = GRAMMARS[start.grammar]
    first = policy(starts)
    later = []
    for conversation, action in zip(starts, first, strict=True):
        assert action is not None
        assert isinstance(grammar.parse(action.text), Search), action.text
        later.append(conversation.plus(Message("assistant", action.text), Message("tool", found)))
    for action in policy(later):
        assert action is not None
        assert grammar.parse(action.text) == Answer("Warsaw"), action.text


@pytest.mark.parametrize(("start", "found"), [(TAGS, INFORMATION), (CALLS, FOUND)], ids=["tags", "tools"])
def test_transformers_serve_plays_by_chat(real: str, taught: Path, start: Conversation, found: str) -> None:
    with client(real, str(taught)) as server:
        play(OpenAIPolicy(server, temperature=0.0, max_tokens=200, cuts_stops=False), start, found)


def test_transformers_serve_plays_by_completions(real: str, taught: Path) -> None:
    with client(real, str(taught)) as server:
        policy = OpenAIPolicy(server, endpoint="completions", temperature=0.0, max_tokens=200, cuts_stops=False)
        play(policy, TAGS, INFORMATION)


def test_transformers_serve_plays_tinywiki_as_the_local_model_does(real: str) -> None:
    """Whole episodes in the real environment; at temperature 0 the way to the model makes no difference."""
    local, questions = shipped_policy(), list(tiny_env().questions)[::5]
    greedy = TransformersPolicy(local.model, local.encoder.tokenizer, temperature=0.0, max_new_tokens=16)
    with client(real, str(warm_start_folder())) as server:
        away = OpenAIPolicy(server, endpoint="completions", temperature=0.0, max_tokens=16, cuts_stops=False)
        episodes = rollout(tiny_env(), away, questions)
    for mine, theirs in zip(episodes, rollout(tiny_env(), greedy, questions), strict=True):
        assert [turn.action.text for turn in mine.turns] == [turn.action.text for turn in theirs.turns]
        assert (mine.stop, mine.answer) == (theirs.stop, theirs.answer)
    assert any(len(episode.turns) > 1 for episode in episodes)


def test_transformers_serve_repeats_itself_on_equal_seeds(real: str, taught: Path) -> None:
    with client(real, str(taught), concurrency=1) as server:
        policy = OpenAIPolicy(server, temperature=2.5, max_tokens=20, cuts_stops=False)
        batch = [Conversation(TAGS.messages, seed) for seed in (1, 2, 1)]
        texts = [action.text for action in policy(batch) if action]
        assert texts[0] == texts[2] != texts[1]


def test_transformers_serve_takes_no_token_ids(real: str, taught: Path) -> None:
    with client(real, str(taught)) as server:
        policy = OpenAIPolicy(server, endpoint="completions", encoder=ConversationEncoder(byte_tokenizer()))
        with pytest.raises(ServerFailed, match=r"1 of 1 requests failed.*answered 400.*must be a string"):
            policy([TAGS])


@pytest.mark.parametrize(("start", "found"), [(TAGS, INFORMATION), (CALLS, FOUND)], ids=["tags", "tools"])
def test_stop_strings_that_were_cut_off_come_back(model_server: str, start: Conversation, found: str) -> None:
    plan(model_server)
    with client(model_server) as server:
        play(OpenAIPolicy(server, temperature=0.0, max_tokens=200), start, found)
    assert seen(model_server)[0]["stop"] == list(GRAMMARS[start.grammar].stop_strings)


def test_a_turn_that_just_ended_gets_no_closing_tag(model_server: str) -> None:
    plan(model_server)
    early = Conversation((Message("user", "End early."),))
    with client(model_server) as server:
        assert one(OpenAIPolicy(server, temperature=0.0), early).text == "<search>Warsaw"


@pytest.mark.parametrize(
    ("text", "fields", "wanted"),
    [
        ("<think>x</think><search>y", {}, "<think>x</think><search>y</search>"),
        ("<think>x</think><answer>y", {}, "<think>x</think><answer>y</answer>"),
        ("<search>y", {"finish_reason": "length"}, "<search>y"),
        ("<search>y", {"stop_reason": None}, "<search>y"),
        ("<search>y", {"stop_reason": "</search>"}, "<search>y</search>"),
        ("<search>y", {"matched_stop": 151645}, "<search>y"),
        ("<search>y", {"matched_stop": "</search>"}, "<search>y</search>"),
        ("I do not know", {}, "I do not know"),
        ("<search>y</search>\n<information>made up", {}, "<search>y</search>"),
        ("<answer>y</answer>", {}, "<answer>y</answer>"),
        (None, {}, ""),
        ("<answer>y</answer>", {"message": {"reasoning_content": "hm"}}, "<think>hm</think>\n<answer>y</answer>"),
    ],
)
def test_what_becomes_of_an_answer(model_server: str, text: str | None, fields: dict[str, Any], wanted: str) -> None:
    plan(model_server, reply(text, **fields))
    with client(model_server) as server:
        assert one(OpenAIPolicy(server)).text == wanted


@pytest.mark.parametrize("arguments", ['{"query": ["a", "b < c"]}', {"query": ["a", "b < c"]}])
def test_structured_calls_become_text(model_server: str, arguments: Any) -> None:
    call = {"type": "function", "id": "1", "function": {"name": "search", "arguments": arguments}}
    plan(model_server, reply("<think>x</think>\n\n", finish_reason="tool_calls", message={"tool_calls": [call]}))
    with client(model_server) as server:
        action = one(OpenAIPolicy(server), CALLS)
    assert GRAMMARS["tools"].parse(action.text) == Search(("a", "b < c"))
    assert action.text.startswith("<think>x</think>\n<tool_call>")


def test_several_calls_are_one_action(model_server: str) -> None:
    calls = [{"function": {"name": "search", "arguments": f'{{"query": ["{query}"]}}'}} for query in "ab"]
    plan(model_server, reply(None, finish_reason="tool_calls", message={"tool_calls": calls}))
    with client(model_server) as server:
        assert GRAMMARS["tools"].parse(one(OpenAIPolicy(server), CALLS).text) == Search(("a", "b"))


def test_arguments_that_are_no_json_are_malformed_and_no_error(model_server: str) -> None:
    call = {"function": {"name": "search", "arguments": '{"query": ["a"'}}
    plan(model_server, reply(None, message={"tool_calls": [call]}))
    with client(model_server) as server:
        assert "no JSON" in str(GRAMMARS["tools"].parse(one(OpenAIPolicy(server), CALLS).text))


def test_roles_as_every_template_can_take_them(model_server: str) -> None:
    longer = CALLS.plus(Message("assistant", CALL), Message("tool", FOUND))
    plan(model_server, reply(ANSWER))
    with client(model_server) as server:
        policy = OpenAIPolicy(server, extra={"top_p": 0.9, "seed": None})
        policy([longer])
    (sent,) = seen(model_server)
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["messages"][-1]["content"] == f"<tool_response>\n{FOUND}\n</tool_response>"
    assert sent["top_p"] == 0.9
    assert "seed" not in sent


def test_each_request_has_the_seed_of_its_episode_and_turn(model_server: str) -> None:
    batch = [Conversation(TAGS.messages, seed) for seed in (0, 1, 2**62)]
    batch.append(batch[0].plus(Message("assistant", SEARCH), Message("tool", INFORMATION)))
    plan(model_server)
    with client(model_server) as server:
        policy = OpenAIPolicy(server, max_tokens=12, temperature=2.0)
        once, again = policy(batch), policy(batch[::-1])[::-1]
    assert once == again
    seeds = {sent["seed"] for sent in seen(model_server)}
    assert seeds == {request_seed(conversation) for conversation in batch}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_token_ids_go_out_and_come_back_exact(model_server: str) -> None:
    encoder = ConversationEncoder(byte_tokenizer())
    plan(model_server)
    with client(model_server) as server:
        extra = {"logprobs": 0, "return_token_ids": True}
        policy = OpenAIPolicy(server, endpoint="completions", encoder=encoder, extra=extra)
        action = one(policy)
        assert seen(model_server)[0]["prompt"] == encoder.encode(TAGS).ids
        assert encoder.tokenizer.decode(action.token_ids, skip_special_tokens=True) == action.text
        assert len(action.logprobs) == len(action.token_ids) > 0
        policy.temperature = 0.5  # the server's log-probabilities are not those of what was sampled from
        assert one(policy).token_ids == ()
        plain = OpenAIPolicy(server, endpoint="completions", encoder=encoder)
        assert one(plain).token_ids == ()


@pytest.mark.parametrize(
    "error",
    [
        {"message": "This model's maximum context length is 4096 tokens.", "code": 400},
        {"message": "Please shorten", "code": "context_length_exceeded"},
        {"message": "request (9 tokens) exceeds the available context size", "type": "exceed_context_size_error"},
    ],
)
def test_a_conversation_that_is_too_long_ends_and_the_others_go_on(model_server: str, error: dict[str, Any]) -> None:
    long = Conversation((Message("user", "very long"),))
    plan(model_server, {"status": 400, "body": {"error": error}, "when": "very long"})
    with client(model_server) as server:
        actions = OpenAIPolicy(server, temperature=0.0)([TAGS, long])
        assert actions == [Action(SEARCH), None]


@pytest.mark.parametrize(
    "options",
    [{"endpoint": "tell"}, {"temperature": -1}, {"temperature": float("nan")}, {"max_tokens": 0}, {"encoder": "x"}],
)
def test_bad_settings(options: Any) -> None:
    with client("http://h") as server, pytest.raises(ValueError, match=r"endpoint|temperature"):
        OpenAIPolicy(server, **options)


def test_the_examples_of_the_documentation_run(model_server: str, taught: Path) -> None:
    plan(model_server)
    page = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
    page = page.replace("http://127.0.0.1:8000", model_server).replace("Qwen/Qwen3-8B", str(taught))
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "policies.md", "exec"), names)
    assert names["judge"].failures == 1  # the small model has other things to say
    names["server"].close()
