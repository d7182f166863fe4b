"""Random, mutated and adversarial actions through the parsers and the environments."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from agentgym_ig import Stop
from agentgym_ig.envs import (
    Evidence,
    RepeatQuery,
    Rules,
    SearchCost,
    SearchVectorEnv,
    SelfGuide,
    add_channel,
    tinywiki_index,
    tinywiki_questions,
)
from agentgym_ig.grammar import GRAMMARS, Answer, Malformed, Search
from agentgym_ig.prompts import PROMPTS, with_guide
from agentgym_ig.tinywiki import World

NAMES = ("think", "guide", "search", "answer", "information", "tool_call", "tool_response")
PIECES = [
    *(f"<{slash}{name}{end}" for name in NAMES for slash in ("", "/") for end in (">", " >", "", "/>")),
    '{"name": "search", "arguments": {"query": ["film"]}}',
    '{"name": "search", "arguments": {"query": []}}',
    '{"name": "search", "arguments": {"query": [1, null, {}]}}',
    '{"name": "search", "arguments": "{\\"query\\": \\"film\\"}"}',
    '{"name": "search", "name": "x", "arguments": {"query": "film"}}',
    *("[" * 2000, '{"a":' * 2000, "1e999", "NaN", "\\ud800", "\x00", "\ud800", "\udfff\ud800"),
    *("\u200b", "\u202e", "\ufeff", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "[INST]", "</s>"),
    *("film", " ", "\n", "positive", "東京", "é" * 50, "%s%n", "{question}", "{}", "\\", '"', "'", "&lt;search&gt;"),
]
HUGE = 10_000_000
WEIGHTS = {"outcome": 1.0, "format": 0.1, "search_cost": 0.01, "repeat_query": 0.02, "evidence": 0.5, "self_guide": 0.3}


def well_formed(rng: random.Random, words: list[str]) -> str:
    """An action as an agent means it."""
    grammar = GRAMMARS[rng.choice(["tags", "tools"])]
    thought = rng.choice(["", "<think>hm</think>", "<guide>so far so good: positive</guide>\n"])
    query = " ".join(rng.choices(words, k=rng.randint(1, 6)))
    return thought + (grammar.search(query) if rng.random() < 0.8 else grammar.answer(query))


def mutated(rng: random.Random, action: str) -> str:
    """The action with pieces cut out, doubled, put in, or their case changed."""
    for _ in range(rng.randint(1, 4)):
        first, last = sorted((rng.randint(0, len(action)), rng.randint(0, len(action))))
        middle = action[first:last]
        change = rng.choice(["", middle * 2, rng.choice(PIECES), middle.swapcase(), middle[::-1]])
        action = action[:first] + change + action[last:]
    return action[:20_000]


def actions(seed: int, words: list[str]) -> Iterator[str]:
    """Actions without end: a third as they are meant, a third mutated, a third put together from bad pieces."""
    rng = random.Random(seed)
    while True:
        yield well_formed(rng, words)
        yield mutated(rng, well_formed(rng, words))
        yield "".join(rng.choices(PIECES, k=rng.randint(0, 8)))


def make_env(prompt: str, num_envs: int) -> Any:
    """A small real index, every channel that needs no model, and all budgets."""
    world = World(3, "train")
    questions = list(tinywiki_questions(world, "hop2", 50))
    rules = Rules(
        prompt=with_guide(PROMPTS[prompt]), max_turns=6, max_searches=2, max_observation=40, top_k=2, metric="em"
    )
    env: Any = SearchVectorEnv(tinywiki_index(world), questions, num_envs, rules)
    for channel in (SearchCost(), RepeatQuery(), Evidence(), SelfGuide()):
        env = add_channel(env, channel, weight=WEIGHTS[channel.name])
    return env


def check_step(env: Any, stepped: Any, found: Counter[str]) -> None:
    """Count what is wrong: budgets exceeded, rewards that do not add up, ends without a reason."""
    _, rewards, terminated, truncated, infos = stepped
    base = env.unwrapped
    channels = {name: values for name, values in infos["rewards"].items() if not name.startswith("_")}
    total = sum(WEIGHTS[name] * values for name, values in channels.items())
    found["rewards do not add up"] += int((~np.isclose(rewards, total)).sum())
    ended = terminated | truncated
    for place in np.flatnonzero(infos["_stop"]).tolist():
        episode, rules = base.episodes[place], base.rules
        shown = [m.text for m in episode.conversation.messages if m.role == "tool"]
        found["turns exceeded"] += episode.turn > rules.max_turns
        found["searches exceeded"] += sum(map(len, episode.queries)) > rules.max_searches
        found["observation exceeded"] += sum(len(text.split()) for text in shown) > rules.max_observation
        found["ended without a reason"] += bool(ended[place]) != (infos["stop"][place] is not None)
        if infos["stop"][place] is not None:
            found[f"stopped: {Stop(infos['stop'][place]).value}"] += 1


def fuzz(count: int, seed: int = 0, num_envs: int = 256) -> dict[str, int]:
    """`count` actions, half in each grammar's environment, all through both parsers; how often what happened."""
    found: Counter[str] = Counter()
    for name in ("search-r1", "igpo"):
        env = make_env(name, num_envs)
        words = " ".join(question.text for question in env.unwrapped.questions.values()).split()
        stream = actions(seed, words)
        env.reset(seed=seed)
        while found[name] < count // 2:
            said = [next(stream) for _ in range(num_envs)]
            if found[name] < num_envs:
                said[0] = "<search>" + "a" * HUGE + "</search>"
            for action in said:
                parsed = [grammar.parse(action) for grammar in GRAMMARS.values()]
                found["parser gave something else"] += not all(
                    isinstance(p, Search | Answer | Malformed) for p in parsed
                )
            taken = int(env.unwrapped.active.sum())
            check_step(env, env.step(said), found)
            found[name] += taken
            over = ~env.unwrapped.active
            if over.any():
                env.reset(seed=[None] * int(over.sum()), options={"reset_mask": over})
    return dict(found)


WRONG = (
    "rewards do not add up", "turns exceeded", "searches exceeded", "observation exceeded", "ended without a reason",
    "parser gave something else",
)  # fmt: skip
"""What must never happen."""
