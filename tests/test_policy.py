"""The transformers policy: exact tokens, exact log-probabilities, and draws that belong to the episode."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from agentgym_ig.grammar import GRAMMARS
from agentgym_ig.lm.encode import OBSERVED, ConversationEncoder
from agentgym_ig.lm.policy import TransformersPolicy, load_model
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.trainers import pad, token_logprobs
from agentgym_ig.types import Action, Conversation, Message
from tests.chat_templates import parrot, said, tokenizer
from tests.tiny import play, shipped_policy, untrained

STOP_STRINGS = GRAMMARS["tags"].stop_strings
QUESTION = Conversation((Message("user", "What is the star of the film Quiet Dunham?"),), seed=5)


def taken(actions: Sequence[Action | None]) -> list[Action]:
    assert all(action is not None for action in actions)
    return [action for action in actions if action is not None]


def ids(actions: Sequence[Action | None]) -> list[tuple[int, ...]]:
    return [action.token_ids for action in taken(actions)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_training_pass(temperature: float) -> None:
    shipped = shipped_policy()
    policy = TransformersPolicy(shipped.model, shipped.encoder.tokenizer, temperature=temperature, max_new_tokens=16)
    episodes = play(8, policy)
    encoded = [policy.encoder.encode(episode.conversation) for episode in episodes]
    batch = pad(encoded)
    again = token_logprobs(policy.model, batch, temperature).detach()
    for row, episode in enumerate(episodes):
        sampled = torch.tensor([value for turn in episode.turns for value in turn.action.logprobs])
        assert_close(again[row][batch.sampled[row]], sampled, atol=1e-4, rtol=0)


def test_the_models_own_generation_settings_do_not_bend_the_samples(tmp_path: Path) -> None:
    plain = TransformersPolicy(untrained("llama"), tiny_tokenizer(), max_new_tokens=12)
    untrained("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = {"repetition_penalty": 5.0, "temperature": 0.1, "top_k": 1, "do_sample": True, "no_repeat_ngram_size": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = load_model(str(tmp_path))
    assert model.generation_config.repetition_penalty == 5.0
    bent = TransformersPolicy(model, tokenizer, max_new_tokens=12)
    conversations = [Conversation(QUESTION.messages, seed) for seed in range(8)]
    assert ids(bent(conversations)) == ids(plain(conversations))
    assert model.generation_config.repetition_penalty == 5.0


def test_tokens_are_kept_as_sampled_and_the_mask_touches_nothing_else() -> None:
    policy = shipped_policy()
    for episode in play(8):
        encoded = policy.encoder.encode(episode.conversation)
        sampled = [token for token, turn in zip(encoded.ids, encoded.turn, strict=True) if turn != OBSERVED]
        assert sampled == [token for turn in episode.turns for token in turn.action.token_ids]
        for number, turn in enumerate(episode.turns):
            own = [token for token, k in zip(encoded.ids, encoded.turn, strict=True) if k == number]
            assert tuple(own) == turn.action.token_ids
        observed = policy.encoder.tokenizer.decode(
            [t for t, k in zip(encoded.ids, encoded.turn, strict=True) if k == OBSERVED]
        )
        assert observed.count("<information>") == sum(bool(turn.observation) for turn in episode.turns)
        assert "<search>" not in observed


def test_ids_that_no_text_would_give_survive() -> None:
    odd = Action("<answer>x</answer>", token_ids=(300, 7, 300))
    conversation = QUESTION.plus(Message("assistant", odd.text, odd.token_ids))
    encoded = ConversationEncoder(tiny_tokenizer()).encode(conversation)
    assert encoded.ids[-3:] == [300, 7, 300]
    assert encoded.turn[-3:] == [0, 0, 0]


def test_neither_batch_nor_order_changes_what_an_episode_says() -> None:
    policy = TransformersPolicy(untrained("llama"), tiny_tokenizer(), max_new_tokens=8)
    conversations = [Conversation(episode.conversation.messages[:1], seed) for seed, episode in enumerate(play(6))]
    together = policy(conversations)
    assert [ids(policy([own])) for own in conversations] == [[own] for own in ids(together)]
    assert ids(policy(conversations[::-1]))[::-1] == ids(together)
    assert len({ids(policy([Conversation(QUESTION.messages, seed)]))[0] for seed in range(40)}) > 1


def test_temperature_zero_is_greedy() -> None:
    shipped = shipped_policy()
    greedy = TransformersPolicy(shipped.model, shipped.encoder.tokenizer, temperature=0, max_new_tokens=16)
    texts = {taken(greedy([Conversation(QUESTION.messages, seed)]))[0].text for seed in range(5)}
    assert len(texts) == 1
    assert next(iter(texts)).endswith(STOP_STRINGS)


def test_an_action_ends_with_its_first_stop_string_or_the_budget() -> None:
    for episode in play(16):
        for turn in episode.turns:
            closed = sum(turn.action.text.count(stop) for stop in STOP_STRINGS)
            assert closed == turn.action.text.strip().endswith(STOP_STRINGS)
            assert closed == 1 or len(turn.action.token_ids) == 16
            assert len(turn.action.token_ids) == len(turn.action.logprobs)


def test_sampling_follows_the_models_distribution() -> None:
    policy = TransformersPolicy(untrained("llama"), tiny_tokenizer(), max_new_tokens=1, batch_size=2000)
    actions = policy([Conversation(QUESTION.messages, seed) for seed in range(2000)])
    context = policy.encoder.encode(QUESTION).ids
    expected = untrained("llama")(torch.tensor([context])).logits[0, -1].detach().softmax(-1)
    counts = torch.bincount(torch.tensor([own[0] for own in ids(actions)]), minlength=len(expected))
    common = expected * 2000 >= 20
    chi2 = ((counts - 2000 * expected).square() / (2000 * expected))[common].sum()
    assert common.sum() >= 5
    assert chi2 < common.sum() + 5 * (2 * common.sum()).sqrt()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_any_chat_model_saved_to_disk_plays(family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    untrained(family).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_model(str(tmp_path))
    policy = TransformersPolicy(model, loaded, max_new_tokens=4)
    shown = policy.encoder.tokenizer.decode(policy.encoder.encode(QUESTION).ids)
    assert shown.strip().startswith("<|user|>")
    assert shown.strip().endswith("<|assistant|>")
    (action,) = taken(policy([QUESTION]))
    assert 1 <= len(action.token_ids) <= 4
    assert all(value <= 0 for value in action.logprobs)


def test_foreign_text_never_becomes_a_special_token() -> None:
    tokenizer = tiny_tokenizer()
    encoder = ConversationEncoder(tokenizer)
    hostile = QUESTION.plus(Message("assistant", "<search>x</search>"), Message("tool", "a <eos> <pad> b"))
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(encoder.encode(hostile).ids)


def test_models_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder here"):
        load_model(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no usable model"):
        load_model(str(tmp_path / "empty"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tiny_model().save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no chat template"):
        load_model(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="temperature=-1"):
        TransformersPolicy(untrained("llama"), tiny_tokenizer(), temperature=-1)


def test_a_conversation_that_no_longer_fits_gets_no_action_and_the_others_go_on() -> None:
    policy = TransformersPolicy(untrained("llama"), tiny_tokenizer(), max_new_tokens=8, batch_size=2)
    long = QUESTION.plus(Message("assistant", "a", (7,)), Message("tool", "x" * 3000))
    full, fuller = (Conversation((Message("user", "a" * length),)) for length in (2040, 2041))  # tokens: 2048 less 8
    asked = [QUESTION, long, full, Conversation(QUESTION.messages, 9), long, fuller]
    actions = policy(asked)
    assert [action is None for action in actions] == [False, True, False, False, True, True]
    fitting = [own for own, action in zip(asked, actions, strict=True) if action is not None]
    assert ids([action for action in actions if action is not None]) == ids(policy(fitting))
    assert TransformersPolicy(untrained("llama"), tiny_tokenizer(), max_new_tokens=2040)([QUESTION]) == [None]
    assert policy([]) == []


def asked(text: str, grammar: str) -> Conversation:
    return Conversation((Message("user", text),), grammar=grammar)


def test_each_conversation_stops_at_the_strings_of_its_own_grammar() -> None:
    lines = {"tags": "a</tool_call> b</search> c", "tools": "a</search> b</tool_call> c"}
    lessons = [asked(f"q {name}", name).plus(said("chatml", text)) for name, text in lines.items()]
    policy = parrot("chatml", tuple(lessons), max_new_tokens=40)
    tags, tools = taken(policy([asked("q tags", "tags"), asked("q tools", "tools")]))
    assert (tags.text, tools.text) == ("a</tool_call> b</search>", "a</search> b</tool_call>")
    for action in (tags, tools):
        assert action.token_ids == said("chatml", action.text).token_ids
        assert len(action.logprobs) == len(action.token_ids)


def test_a_token_may_hold_more_than_the_end_of_a_stop_string() -> None:
    own = tokenizer("chatml")
    spoken = own("<search>a</search>, and so on", add_special_tokens=False)["input_ids"]
    comma = own.convert_tokens_to_ids(">,")
    assert comma in spoken
    policy = parrot("chatml", (asked("q", "tags").plus(Message("assistant", "", tuple(spoken))),), max_new_tokens=40)
    (action,) = taken(policy([asked("q", "tags")]))
    assert action.text == "<search>a</search>,"
    assert action.token_ids == tuple(spoken[: spoken.index(comma) + 1])


def test_the_end_token_is_sampled_but_is_no_text() -> None:
    policy = parrot("chatml", (asked("q", "tools").plus(said("chatml", "wow ! b", ended=True)),), max_new_tokens=20)
    (action,) = taken(policy([asked("q", "tools")]))
    assert action.text == "wow ! b"
    assert action.token_ids[-1] == tokenizer("chatml").eos_token_id
    policy.model.generation_config.eos_token_id = tokenizer("chatml").convert_tokens_to_ids("!")  # not a special token
    (action,) = taken(TransformersPolicy(policy.model, tokenizer("chatml"), temperature=0)([asked("q", "tools")]))
    assert action.text == "wow "
    assert tokenizer("chatml").decode(action.token_ids) == "wow !"
