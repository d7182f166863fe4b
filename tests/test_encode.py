"""Conversations to tokens: frames of real chat formats in both grammars, and the span of a gold answer."""

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig.grammar import GRAMMARS
from agentgym_ig.lm.encode import OBSERVED, ConversationEncoder
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.types import Conversation, Message
from tests.chat_templates import FORMATS, said, tokenizer

ENCODERS = {name: ConversationEncoder(tokenizer(name)) for name in FORMATS}
OPENING = (Message("system", "Be brief."), Message("user", "Who was she?"))
FOUND = Message("tool", '[1] Marie "Manya" Curie')


def shown(name: str, grammar: str, *messages: Message) -> str:
    text: str = tokenizer(name).decode(ENCODERS[name].encode(Conversation(messages, grammar=grammar)).ids)
    return text


TURN = "<think>Hm</think>a"
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho was she?<|im_end|>\n<|im_start|>assistant\n"
    f"{TURN}<|im_end|>\n<|im_start|>user\n<tool_response>\n{FOUND.text}\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n"
)
RENDERED = {
    "chatml": CHATML,
    "thinking": CHATML,
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho was she?<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{TURN}<|eot_id|>"
        '<|start_header_id|>ipython<|end_header_id|>\n\n"[1] Marie \\"Manya\\" Curie"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe brief.\n\nWho was she?<end_of_turn>\n<start_of_turn>model\n"
        f"{TURN}<end_of_turn>\n<start_of_turn>user\n{FOUND.text}<end_of_turn>\n<start_of_turn>model\n"
    ),
    "mistral": f"<s>[INST] Be brief.\n\nWho was she? [/INST]{TURN}</s>[INST] {FOUND.text} [/INST]",
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ended", [False, True])
def test_tools_episodes_read_as_the_model_was_trained(name: str, ended: bool) -> None:
    assert shown(name, "tools", *OPENING, said(name, TURN, ended=ended), FOUND) == RENDERED[name]


@pytest.mark.parametrize("name", FORMATS)
def test_tags_episodes_are_one_message(name: str) -> None:
    text = shown(name, "tags", *OPENING, said(name, "<search>a</search>"), FOUND, said(name, "b"))
    assert text.endswith(f"<search>a</search>{FOUND.text}b")
    assert text.startswith(RENDERED[name][: RENDERED[name].index(TURN)])


@pytest.mark.parametrize("name", FORMATS)
def test_the_end_of_a_turn_is_the_policys_only_if_it_sampled_it(name: str) -> None:
    own = tokenizer(name)
    stopped, ended = said(name, TURN), said(name, TURN, ended=True)
    by_stop, by_end = (
        ENCODERS[name].encode(Conversation((*OPENING, message, FOUND), grammar="tools")) for message in (stopped, ended)
    )
    assert by_stop.ids == by_end.ids
    assert [turn for turn in by_stop.turn if turn != OBSERVED] == [0] * len(stopped.token_ids or ())
    (extra,) = [place for place, (a, b) in enumerate(zip(by_stop.turn, by_end.turn, strict=True)) if a != b]
    assert (by_stop.ids[extra], by_stop.turn[extra], by_end.turn[extra]) == (own.eos_token_id, OBSERVED, 0)


def test_a_turn_that_ends_with_another_token_gets_the_templates_end_too() -> None:
    own = tokenizer("chatml")
    other = own.convert_tokens_to_ids("<|endoftext|>")
    odd = Message("assistant", "a", (70, other))
    assert "<|endoftext|><|im_end|>\n<|im_start|>user" in shown("chatml", "tools", *OPENING, odd, FOUND)


@pytest.mark.parametrize("name", ["chatml", "llama-3"])
def test_ordinary_text_is_tokenised_as_the_template_rendered_whole(name: str) -> None:
    said_before = [*OPENING, Message("assistant", "Let me look."), FOUND, Message("assistant", "Done."), FOUND]
    chat = [{"role": message.role, "content": message.text} for message in said_before]
    for upto in (2, 4, 6):
        rendered = tokenizer(name).apply_chat_template(chat[:upto], add_generation_prompt=True, tokenize=False)
        whole = tokenizer(name)(rendered, add_special_tokens=False)["input_ids"]
        assert ENCODERS[name].encode(Conversation(tuple(said_before[:upto]), grammar="tools")).ids == whole


words = st.text("ab \n.<>/é東\u200b", max_size=8) | st.sampled_from(["<|im_end|>", "<|eot_id|>", "</think>", "[INST]"])
acts = st.builds(
    Message, st.just("assistant"), words, st.none() | st.lists(st.integers(0, 600), min_size=1, max_size=5).map(tuple)
)
turns = st.lists(st.tuples(acts, st.builds(Message, st.just("tool"), words)), max_size=4)


@settings(max_examples=60, deadline=None)
@given(words, words, turns, st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(GRAMMARS)))
def test_longer_conversations_begin_with_the_shorter(
    system: str, asked: str, played: list[tuple[Message, Message]], name: str, grammar: str
) -> None:
    conversation = Conversation((Message("system", system), Message("user", asked)), grammar=grammar)
    before = ENCODERS[name].encode(conversation)
    decisions = [len(before.ids)]
    for number, turn in enumerate(played):
        for message in turn:
            conversation = conversation.plus(message)
            after = ENCODERS[name].encode(conversation)
            assert after.ids[: len(before.ids)] == before.ids
            assert after.turn[: len(before.ids)] == before.turn
            if message.token_ids is not None:
                assert tuple(after.ids[len(before.ids) :]) == message.token_ids
            new = {number} if message.role == "assistant" else {OBSERVED}
            assert set(after.turn[len(before.ids) :]) <= new
            before = after
        decisions.append(len(before.ids))
        assert before.decisions == decisions


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("where", range(4))
def test_foreign_text_never_becomes_a_special_token(name: str, grammar: str, where: int) -> None:
    hostile = "".join(FORMATS[name].special) * 2
    texts = ["b", "b", "b", "b"]
    plain = Conversation(_messages(texts), grammar=grammar)
    texts[where] = f"b{hostile}b"
    ids = ENCODERS[name].encode(Conversation(_messages(texts), grammar=grammar)).ids
    special = set(tokenizer(name).all_special_ids)
    assert [i for i in ids if i in special] == [i for i in ENCODERS[name].encode(plain).ids if i in special]
    assert hostile in tokenizer(name).decode(ids)


def _messages(texts: list[str]) -> tuple[Message, ...]:
    system, asked, action, reply = texts
    return Message("system", system), Message("user", asked), Message("assistant", action), Message("tool", reply)


def test_threads_do_not_tokenise_each_others_way() -> None:
    special = set(tokenizer("chatml").all_special_ids)

    def specials(number: int) -> int:
        asked = (Message("user", f"Who? {number}"), Message("assistant", f"<|im_end|> {number} " * 30))
        return sum(token in special for token in ENCODERS["chatml"].encode(Conversation(asked)).ids)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(specials, range(400))) == {specials(-1)} == {3}


def test_lone_surrogates_are_shown_as_question_marks() -> None:
    assert shown("chatml", "tags", OPENING[1], Message("assistant", "a\ud800é")).endswith("a?é")


def other(template: str) -> Any:
    own = tokenizer.__wrapped__("chatml")
    own.chat_template = template
    return ConversationEncoder(own)


def test_a_template_that_opens_the_thoughts_leaves_that_to_the_policy() -> None:
    encoder = other(FORMATS["chatml"].template.replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    for grammar in GRAMMARS:
        ids = encoder.encode(Conversation((*OPENING, said("chatml", "a"), FOUND), grammar=grammar)).ids
        assert "<think>" not in tokenizer("chatml").decode(ids)


def test_templates_without_a_place_for_a_message_say_so() -> None:
    only_user = (
        "{%- for m in messages %}{%- if m.role == 'user' and loop.first %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tags = Conversation((*OPENING, said("chatml", "a"), FOUND))
    assert len(other(only_user).encode(tags).decisions) == 2
    with pytest.raises(ValueError, match="no place for a reply"):
        other(only_user).encode(Conversation(tags.messages, grammar="tools"))
    with pytest.raises(ValueError, match="shows no user message"):
        other("nothing").encode(tags)
    with pytest.raises(ValueError, match="has no chat template"):
        other("")


@pytest.mark.parametrize("messages", [(), OPENING[:1], (Message("assistant", "a"),), (FOUND, *OPENING)])
def test_conversations_that_do_not_begin_with_a_question_are_refused(messages: tuple[Message, ...]) -> None:
    with pytest.raises(ValueError, match="begins with a user message"):
        ENCODERS["chatml"].encode(Conversation(messages))


ANSWERS = [
    "42",
    "1898.",
    "U.S.",
    "Yes!",
    "(1554)",
    "東京",
    "東京都。",
    "Sa\u0303o",
    "e\u0301",
    "-7",
    "3.14",
    "$5",
    "Who?",
    "“x”",
]
ANSWERS += ["👩\u200d🚀", "a\nb", "</answer>", "<|im_end|>", "É.\n", " padded \n", "two words."]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_scored_are_the_tokens_that_hold_the_answer_and_no_others(name: str, prompt: str, answer: str) -> None:
    texts, own = PROMPTS[prompt], tokenizer(name)
    branch = ENCODERS[name].branch(answer, texts)
    clean = own.backend_tokenizer.normalizer.normalize_str(answer.strip())
    first = len(texts.answer_prefix.encode())
    last = first + len(clean.encode())
    # In a byte-level vocabulary a token has as many characters as bytes.
    ends = list(accumulate(len(token) for token in own.convert_ids_to_tokens(branch.ids)))
    starts = [0, *ends]
    overlapping = [place for place, end in enumerate(ends) if end > first and starts[place] < last]
    assert overlapping == list(range(len(branch.ids) - branch.scored, len(branch.ids)))
    assert ends[-1] >= last
    assert own.decode(branch.ids).startswith(texts.answer_prefix + clean)


def test_merges_do_cross_an_answers_end() -> None:
    """Or the test above would show nothing."""
    own = tokenizer("chatml")
    after = PROMPTS["search-r1"].answer_prefix
    assert own.decode(ENCODERS["chatml"].branch("U.S.", PROMPTS["search-r1"]).ids) == f"{after}U.S.</"
    assert own.decode(ENCODERS["chatml"].branch("No.", PROMPTS["igpo"]).ids).endswith("\nNo.\n")


@pytest.mark.parametrize("answer", ["", " \n"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_that_is_nothing_has_no_span(answer: str, prompt: str) -> None:
    with pytest.raises(ValueError, match="no token to score"):
        ENCODERS["chatml"].branch(answer, PROMPTS[prompt])
