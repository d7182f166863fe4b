"""Beliefs turn by turn: the scorer that remembers against a forward pass for every single belief."""

import copy
import random
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from agentgym_ig.envs import InfoGain, add_channel, rollout
from agentgym_ig.lm.encode import ConversationEncoder
from agentgym_ig.lm.tiny import tiny_tokenizer
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.trainers import OnlineScorer, Scorer
from agentgym_ig.types import Conversation, Message
from tests.tiny import shipped_policy, tiny_env, untrained

ENCODER = ConversationEncoder(tiny_tokenizer())
PROMPT = PROMPTS["tinywiki"]
WORDS = "Amber Ashford Quiet Dunham film star of the director <search> nothing , . ?".split()
ANSWERS = [["Amber Ashford", "Amber Dunham"], ["a"], [], ["Quiet Dunham"]]
MODELS = {
    "qwen3": ("qwen3",),
    "llama, eager": ("llama", None, "eager"),
    "gemma2 with a window": ("gemma2", 16),
    "gemma3 with a window": ("gemma3_text", 16),
    "mistral with a window": ("mistral", 16),
}


def scorer(model: str = "qwen3", **settings: Any) -> OnlineScorer:
    return OnlineScorer(untrained(*MODELS[model]), ENCODER, PROMPT, temperature=0.7, **settings)


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))


def started(rng: random.Random) -> Conversation:
    question = rng.choice(["Who ?", "What is the star of the film Quiet Dunham?"])  # so some begin alike
    return Conversation((Message("user", question),))


def one_turn_more(conversation: Conversation, rng: random.Random) -> Conversation:
    sampled = tuple(ENCODER.tokenizer(words(rng))["input_ids"])
    return conversation.plus(Message("assistant", "", sampled), Message("tool", words(rng)))


def check(online: OnlineScorer, conversations: list[Conversation], answers: list[list[str]]) -> None:
    for own, wanted, found in zip(conversations, answers, online.beliefs(conversations, answers), strict=True):
        reference = online.reference_beliefs(own, wanted)[-1]
        assert_close(torch.tensor(found), torch.tensor(reference), atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("room", [0, 60, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_any_conversations(model: str, room: int, seed: int) -> None:
    """Subsets, repeats, new ones among old ones, several turns at once, and too little room."""
    rng = random.Random(seed)
    online = scorer(model, max_cached_tokens=room, batch_size=3)
    going: list[Conversation] = []
    for _ in range(6):
        going = [one_turn_more(own, rng) if rng.random() < 0.6 else own for own in going if rng.random() < 0.9]
        going += [started(rng) for _ in range(rng.randint(0, 2))]
        if rng.random() < 0.3:
            going.append(one_turn_more(one_turn_more(started(rng), rng), rng))
        asked = rng.sample(going, rng.randint(0, len(going)))
        check(online, asked, [rng.choice(ANSWERS) for _ in asked])
        assert online.cached_tokens == sum(map(len, online._read.values())) <= room


class Forwarded:
    """Counts the real tokens that a model is given."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, inputs: Any, named: dict[str, Any]) -> None:
        self.tokens.append(named["input_ids"].numel())

    def __enter__(self) -> list[int]:
        return self.tokens

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


def test_only_new_tokens_are_read() -> None:
    rng = random.Random(0)
    online, branch = scorer(), ENCODER.branch("Amber", PROMPT)
    conversation, other = started(rng), started(rng)
    known = 0
    for _ in range(5):
        whole = len(ENCODER.encode(conversation).ids)
        with Forwarded(online.model) as tokens:
            online.beliefs([conversation], [["Amber"]])
        assert tokens == [whole - known + len(branch.ids) - 1]
        online.beliefs([other], [["Amber"]])  # in between
        known, conversation, other = whole, one_turn_more(conversation, rng), one_turn_more(other, rng)
    assert known > 60


def test_an_episode_that_comes_again_is_read_from_its_last_token() -> None:
    rng = random.Random(0)
    online, conversation = scorer(), one_turn_more(started(rng), rng)
    online.beliefs([conversation], [[]])
    with Forwarded(online.model) as tokens:
        check(online, [conversation] * 2, [["Amber"]] * 2)
    assert tokens[0] == 2 * len(ENCODER.branch("Amber", PROMPT).ids)
    assert online.cached_tokens == len(ENCODER.encode(conversation).ids)  # once, not twice


def test_the_beginning_outlives_what_follows_it() -> None:
    rng = random.Random(0)
    first, second = started(rng), started(rng)
    whole = [one_turn_more(own, rng) for own in (first, second)]
    online = scorer(max_cached_tokens=len(ENCODER.encode(whole[1]).ids) + len(ENCODER.encode(first).ids))
    online.beliefs([whole[0]], [[]])
    online.beliefs([whole[1]], [[]])
    with Forwarded(online.model) as tokens:
        online.beliefs([first], [[]])
        online.beliefs([whole[1]], [[]])
    assert tokens == [1, 1]


def test_changed_weights_are_noticed() -> None:
    rng = random.Random(0)
    model = copy.deepcopy(untrained("llama"))
    online, conversation = OnlineScorer(model, ENCODER, PROMPT), one_turn_more(started(rng), rng)
    beliefs = [online.beliefs([conversation], [["Amber"]])]
    before = copy.deepcopy(model.state_dict())
    for kind in ("for-loop", "foreach", "fused"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=kind == "foreach", fused=kind == "fused")
        for weight in model.parameters():
            weight.grad = weight.detach().sign()
        optimizer.step()
        check(online, [conversation], [["Amber"]])
        beliefs.append(online.beliefs([conversation], [["Amber"]]))
    model.load_state_dict(before)
    assert online.beliefs([conversation], [["Amber"]]) == beliefs[0]
    assert len({own for ((own,),) in beliefs}) == 4


def test_clear_forgets() -> None:
    online, conversation = scorer(), started(random.Random(0))
    check(online, [conversation], [["Amber"]])
    online.clear()
    assert online.cached_tokens == 0
    with Forwarded(online.model) as tokens:
        check(online, [conversation], [["Amber"]])
    assert tokens[0] >= len(ENCODER.encode(conversation).ids)


def test_nothing_asked_nothing_read() -> None:
    assert scorer().beliefs([], []) == []


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_policy_scores_itself_while_it_plays(lanes: int) -> None:
    """With two lanes, one thread scores with the very model that another samples from."""
    policy = shipped_policy()
    env = tiny_env()
    ids = list(env.questions)[:24]
    online = OnlineScorer(policy.model, policy.encoder, env.rules.texts)
    episodes = rollout(add_channel(env, InfoGain(online.beliefs)), policy, ids, lanes=lanes)
    plain = rollout(env, policy, ids)
    assert [own.conversation for own in episodes] == [own.conversation for own in plain]
    again = Scorer(policy.model, policy.encoder, env.rules.texts).with_beliefs(plain)
    assert sum(len(own.turns) > 1 for own in again) > 10
    for own, other in zip(episodes, again, strict=True):
        gains = [turn.rewards.get("info_gain", 9.0) for turn in own.turns]
        assert gains == pytest.approx([turn.rewards.get("info_gain", 9.0) for turn in other.turns], abs=1e-4)
