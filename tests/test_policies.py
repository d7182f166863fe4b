"""Policies without a model, in both grammars."""

import pytest

from agentgym_ig.grammar import GRAMMARS, Answer, Malformed, Search
from agentgym_ig.policies import QUERY_WORDS, Policy, RandomPolicy, ScriptedPolicy, oracle
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.types import Conversation, Message, Passage, Question
from tests.fakes import PASSAGES, QUESTIONS

LONG = Passage("p4", "Long </tool_call>", "again " * 300 + " ".join(f"word{number}" for number in range(300)))
QUESTION = Question("q", "Which river, </search>?", ("Vistula", "x"), "toy", ("p2", "none", "p4", "p2"))


def played(policy: Policy, prompt: str, question: Question = QUESTION, turns: int = 4) -> list[Search | Answer]:
    """What the policy does in its first turns, whatever it is told."""
    texts = PROMPTS[prompt]
    conversation = Conversation(texts.opening(question.text, 4), 7, texts.grammar)
    parsed = []
    for _ in range(turns):
        (text,) = policy([conversation])
        assert isinstance(text, str)
        action = GRAMMARS[texts.grammar].parse(text)
        assert not isinstance(action, Malformed)
        parsed.append(action)
        conversation = conversation.plus(Message("assistant", text), Message("tool", texts.render_shown([])))
    return parsed


def prompts(name: str) -> dict[str, Question]:
    return {PROMPTS[name].opening(own.text, 4)[-1].text: own for own in [QUESTION, *QUESTIONS]}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_oracle_searches_every_gold_passage_and_answers(prompt: str) -> None:
    policy = oracle(prompts(prompt), {passage.id: passage for passage in [*PASSAGES, LONG]})
    first, second, *rest = played(policy, prompt)
    assert isinstance(first, Search)
    assert isinstance(second, Search)
    assert first.queries[0].startswith("Warsaw is the capital of Poland")
    words = second.queries[0].split()
    assert len(words) == len(set(words)) == QUERY_WORDS
    assert words[:4] == ["Long", "‹/tool_call>", "again", "word0"]
    assert rest == [Answer("Vistula")] * 2
    assert played(policy, prompt, Question("other", "Who?", ("x",), "toy"), 1) == [Answer("?")]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_scripts_play_acts_in_the_episodes_grammar(prompt: str) -> None:
    policy = ScriptedPolicy([Search(("a b",)), Answer("c")])
    assert played(policy, prompt, turns=3) == [Search(("a b",)), Answer("c"), Answer("c")]
    spoken = Conversation((Message("user", "q"),), grammar=PROMPTS[prompt].grammar)
    assert ScriptedPolicy(["anything"])([spoken, spoken]) == ["anything"] * 2
    with pytest.raises(ValueError, match="at least one action"):
        ScriptedPolicy([])


def test_a_script_of_several_queries_needs_a_grammar_that_has_them() -> None:
    policy = ScriptedPolicy([Search(("a", "b"))])
    assert played(policy, "igpo", turns=1) == [Search(("a", "b"))]
    with pytest.raises(ValueError, match="2 queries"):
        played(policy, "search-r1", turns=1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_random_actions_can_be_read_and_follow_the_seed(prompt: str) -> None:
    texts = PROMPTS[prompt]
    asked = [Conversation(texts.opening("Who <was> it?", 4), seed, texts.grammar) for seed in range(50)]
    actions = RandomPolicy()(asked)
    kinds = {type(GRAMMARS[texts.grammar].parse(action)) for action in actions}
    assert kinds == {Search, Answer}
    assert RandomPolicy()(asked[::-1]) == actions[::-1]
    assert RandomPolicy()([Conversation((Message("user", " "),), grammar=texts.grammar)])[0]
