"""The two action grammars: what is read, what is malformed, and that nothing raises or takes long."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig.grammar import GRAMMARS, MAX_CHARACTERS, MAX_QUERIES, Answer, Grammar, Malformed, Parsed, Search
from agentgym_ig.prompts import PROMPTS

TAGS, TOOLS = GRAMMARS["tags"], GRAMMARS["tools"]


def call(query: object, name: object = "search") -> str:
    return "<tool_call>" + json.dumps({"name": name, "arguments": {"query": query}}) + "</tool_call>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<search>Marie Curie</search>", Search(("Marie Curie",))),
        ("<think>hm</think>\n<search> a b </search>\n", Search(("a b",))),
        ("<think>x</think> <think>y</think><answer>42</answer>", Answer("42")),
        ("<guide>lost, negative</guide><think>x</think><answer>1 < 2</answer>", Answer("1 < 2")),
        ("<answer><tool_call>x</tool_call></answer>", Answer("<tool_call>x</tool_call>")),
    ],
)
def test_well_formed_tags(text: str, expected: Parsed) -> None:
    assert TAGS.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just words",
        "<search></search>",
        "<answer> </answer>",
        "<search>a</search><answer>b</answer>",
        "<search>a</search><search>b</search>",
        "<search>a</search><think>b</think>",
        "<think>b</think>",
        "<answer>b</answer> and then some",
        "first <answer>b</answer>",
        "<search>a",
        "</answer><answer>",
        "<think>no end<search>a</search>",
        "<think><guide>a</guide></think><answer>b</answer>",
        "<information>fake</information><answer>b</answer>",
        "<answer><search>a</search></answer>",
        "<search>a</answer>",
        "<SEARCH>a</SEARCH>",
        "<answer>a</answer\u200b>",
    ],
)
def test_malformed_tags(text: str) -> None:
    assert isinstance(TAGS.parse(text), Malformed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (call("Marie Curie"), Search(("Marie Curie",))),
        (call(["a", " b ", "c"]), Search(("a", "b", "c"))),
        ("<think>hm</think>\n" + call(["a"]) + "\n" + call("b"), Search(("a", "b"))),
        ('<tool_call>\n{"arguments": {"query": "\\u6771京"},\n"name": "search"}\n</tool_call>\n', Search(("東京",))),
        (
            '<tool_call>{"name": "x", "name": "search", "arguments": {"query": "a", "query": "b"}}</tool_call>',
            Search(("b",)),
        ),
        ("<answer>42</answer>", Answer("42")),
        ("<guide>fine, positive</guide><answer><search>a</search></answer>", Answer("<search>a</search>")),
    ],
)
def test_well_formed_tools(text: str, expected: Parsed) -> None:
    assert TOOLS.parse(text) == expected


NOT_SEARCH: list[object] = ["Search", "", None, ["search"], {}]
FAULTS = {
    "is no JSON": [
        "",
        "{",
        "search",
        "{'name': 'search'}",
        '{"name": "search", "arguments": {"query": "\\ud800"}}',
        '{"name": "search", "arguments": {"query": "\ud800"}}',
        '{"name": "search", "arguments": {"query": NaN}}',
        '{"name": "search", "arguments": {"query": "a"},}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 400,
    ],
    "a tool call is": [
        "[]",
        "null",
        "1",
        '"search"',
        "{}",
        '{"name": "search"}',
        '{"name": "search", "arguments": {"query": "a"}, "id": 1}',
    ],
    "the only tool is search": [json.dumps({"name": name, "arguments": {"query": "a"}}) for name in NOT_SEARCH],
    "takes the argument query": [
        json.dumps({"name": "search", "arguments": arguments})
        for arguments in ('{"query": "a"}', None, {}, {"queries": "a"}, {"query": "a", "k": 3}, ["a"])
    ],
    "query is a list of strings": [
        json.dumps({"name": "search", "arguments": {"query": query}})
        for query in ("", " ", [], [""], ["a", " "], ["a", 1], 1, True, None, 10**18, 1.5, {"a": 1}, [["a"]])
    ],
}


@pytest.mark.parametrize(("fault", "content"), [(fault, own) for fault, all_ in FAULTS.items() for own in all_])
def test_calls_that_are_no_search_say_why(fault: str, content: str) -> None:
    parsed = TOOLS.parse(f"<tool_call>{content}</tool_call>")
    assert isinstance(parsed, Malformed)
    assert fault in parsed.fault


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<search>a</search>",
        "<think>a</think>",
        call("a") + "<answer>b</answer>",
        "<answer>b</answer>" + call("a"),
        "<answer>b</answer><answer>b</answer>",
        call("a") + "<think>b</think>" + call("c"),
        call(list("abcd")),
        call(list("ab")) + call(list("cd")),
        call("a") + " I hope",
        "<tool_response>x</tool_response>" + call("a"),
        "<tool_response>x</tool_response>",
        "<answer> </answer>",
        "<tool_call>" + call("a") + "</tool_call>",
    ],
)
def test_malformed_tools(text: str) -> None:
    assert isinstance(TOOLS.parse(text), Malformed)


NAMES = ("search", "answer", "think", "guide", "information", "tool_call", "tool_response")
pieces = st.sampled_from(
    [f"<{slash}{tag}>" for tag in NAMES for slash in ("", "/")]
    + ["a", " ", "<", ">", "/", "\n", "\ud800", "\u202e", "\x00", "<|im_end|>", "{", '"', "[", ":", call("a")[11:-12]]
)


@settings(max_examples=500)
@given(st.lists(pieces, max_size=14).map("".join) | st.text(max_size=30), st.sampled_from(sorted(GRAMMARS)))
def test_any_string_is_read_without_an_exception(text: str, name: str) -> None:
    parsed = GRAMMARS[name].parse(text)
    if isinstance(parsed, Answer):
        assert text.count("<answer>") == text.count("</answer>") == 1
        assert parsed.text == text.split("<answer>")[1].split("</answer>")[0].strip() != ""
        assert ("<search>" if name == "tags" else "<tool_call>") not in text
    if isinstance(parsed, Search):
        assert 1 <= len(parsed.queries) <= (1 if name == "tags" else MAX_QUERIES)
        assert all(query == query.strip() != "" for query in parsed.queries)
        assert "<answer>" not in text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from(["name", "arguments", "id"]), json_values, max_size=3), json_values)
def test_any_json_is_read_without_an_exception(outer: dict[str, object], query: object) -> None:
    for own in (
        outer,
        query,
        {"name": "search", "arguments": {"query": query}},
        {"name": "search", "arguments": query},
    ):
        assert isinstance(TOOLS.parse(f"<tool_call>{json.dumps(own)}</tool_call>"), Search | Malformed)


sayable = st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip)


@given(sayable.filter(lambda text: "<" not in text), st.sampled_from(sorted(GRAMMARS)))
def test_what_is_written_is_read_again(text: str, name: str) -> None:
    grammar = GRAMMARS[name]
    assert grammar.parse(grammar.search(text)) == Search((text.strip(),))
    assert grammar.parse(f"<think>a</think>{grammar.answer(text)}\n") == Answer(text.strip())
    assert all(own(text).endswith(grammar.stop_strings) for own in (grammar.search, grammar.answer))


@given(st.lists(sayable | st.sampled_from(["</tool_call>", "<answer>x</answer>"]), min_size=1, max_size=MAX_QUERIES))
def test_a_call_may_ask_for_anything(queries: list[str]) -> None:
    assert TOOLS.parse(TOOLS.search(*queries)) == Search(tuple(query.strip() for query in queries))


def test_too_many_queries_cannot_be_written() -> None:
    for grammar, most in ((TAGS, 1), (TOOLS, MAX_QUERIES)):
        for count in (0, most + 1):
            with pytest.raises(ValueError, match=f"{count} queries"):
                grammar.search(*["a"] * count)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_forced_answer_is_an_answer(name: str) -> None:
    prompt = PROMPTS[name]
    assert GRAMMARS[prompt.grammar].parse(f"{prompt.answer_prefix}x{prompt.answer_suffix}") == Answer("x")


MEGABYTES = [
    "<think>" * 1_400_000,
    "<think></think>" * 700_000,
    "<search>" + "a" * 10_000_000,
    "<answer>" + "<" * 10_000_000 + "</answer>",
    "<answer>" + " " * 10_000_000 + "</answer>",
    "<think>a</think>" + " " * 10_000_000,
    "<answer></answer>" * 600_000,
    "<tool_call>" + "[" * 10_000_000 + "</tool_call>",
    '<tool_call>{"name":"search","arguments":{"query":"' + "a" * 10_000_000 + '"}}</tool_call>',
    '<tool_call>{"name":"search","arguments":{"query":[' + '"a",' * 2_500_000 + '"a"]}}</tool_call>',
    call("a") * 150_000,
    "<tool_call>" * 1_000_000,
]


@pytest.mark.parametrize("text", MEGABYTES, ids=range(len(MEGABYTES)))
@pytest.mark.parametrize("name", GRAMMARS)
def test_ten_megabytes_are_read_in_linear_time(text: str, name: str) -> None:
    started = time.perf_counter()
    GRAMMARS[name].parse(text)
    assert time.perf_counter() - started < 20  # seconds; quadratic time would be hours


@pytest.mark.parametrize(("grammar", "action"), [(TAGS, "<search>{}</search>"), (TOOLS, call(["a", "{}"]))])
def test_a_query_has_its_bounds(grammar: Grammar, action: str) -> None:
    assert isinstance(grammar.parse(action.replace("{}", "x" * MAX_CHARACTERS)), Search)
    parsed = grammar.parse(action.replace("{}", "x" * (MAX_CHARACTERS + 1)))
    assert parsed == Malformed("a query has 10001 characters; at most 10000")
