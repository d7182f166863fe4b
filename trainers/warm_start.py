"""The supervised warm start of the small TinyWiki policy.

It learns to read, copy and follow the grammar from a demonstrator who mostly does the wrong thing but never
invents anything: every action copies a name that stands in the conversation. What is left for reinforcement
learning is to choose the right one. Each demonstration is a real episode, and a fresh world every second step
leaves nothing to memorise. The settings were found by measurement: with weights drawn wider (0.06 instead of
0.02), or a learning rate of 3e-3, the model settles for guessing among the names in view, and copies late or never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from transformers import get_wsd_schedule

from agentgym_ig.envs.rollout import Start, prompts_of, rollout
from agentgym_ig.envs.search import SearchVectorEnv
from agentgym_ig.envs.tinywiki import TINYWIKI_BM25, TINYWIKI_RULES
from agentgym_ig.guide import VERDICTS
from agentgym_ig.indexes.bm25 import Bm25Index
from agentgym_ig.lm.encode import ConversationEncoder, Encoded
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.policies import QuestionPolicy
from agentgym_ig.tinywiki import SCHEMA, Path, World, chains
from agentgym_ig.trainers.batch import pad, pad_rows
from agentgym_ig.trainers.scoring import token_logprobs
from agentgym_ig.types import Conversation, Message, Question


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """How the warm start is made. The habits are chances per turn; what is left over is spent on more searching."""

    steps: int = 1200
    lookup_steps: int = 550
    """Steps at the beginning that mostly train reading a value out of an article."""
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    seed: int = 0
    right: float = 0.12
    """Fact not seen yet: follow the right link."""
    first: float = 0.30
    """Fact not seen yet: follow the link that stands first in the last article."""
    again: float = 0.08
    """Fact not seen yet: search the question's own entity again."""
    answer: float = 0.30
    """Fact seen: answer with it."""
    wrong_answer: float = 0.40
    """Fact seen: answer with another value of the last article."""
    wrong_relation: bool = False
    """Wrong answers never are of the relation asked for. Else a small policy, which can hardly tell whether the fact
    has been seen, answers right more often than its demonstrator."""
    shares: tuple[float, ...] = (0.1, 0.27, 0.315, 0.315)
    """Demonstrations after `lookup_steps`: the share of plain reading, then of questions of one hop, two hops, …"""
    right_verdict: float | None = None
    """With Self-Guide's block in front of every action: the chance that its verdict is right. None: no block."""

    def __post_init__(self) -> None:
        if not 0 <= self.lookup_steps <= self.steps or self.batch_size < 1:
            raise ValueError(
                f"lookup_steps={self.lookup_steps} must lie in 0…steps={self.steps}, batch_size be 1 or more"
            )
        if self.right + self.first + self.again > 1 or self.answer + self.wrong_answer > 1:
            raise ValueError("the habits of one situation must not add up to more than 1")
        if not 2 <= len(self.shares) <= 5 or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(f"shares={self.shares} must be those of reading and of one to four hops, and add up to 1")
        if self.right_verdict is not None and not 0 <= self.right_verdict <= 1:
            raise ValueError(f"right_verdict={self.right_verdict} is a chance from 0 to 1, or None for no guide block")


class Demonstrator:
    """Plays a path through a world with the configured habits."""

    def __init__(self, config: WarmStartConfig, world: World, paths: dict[str, Path]) -> None:
        self.config, self.world, self.paths = config, world, paths

    def __call__(self, question: Question, conversation: Conversation) -> str:
        """The next action, behind a guide block if the config wants one."""
        path = self.paths[question.id]
        seen = [_title(message.text) for message in conversation.messages if message.role == "tool"]
        return self._guide(path, seen, conversation) + self._action(path, seen, conversation)

    def _guide(self, path: Path, seen: list[str], conversation: Conversation) -> str:
        chance = self.config.right_verdict
        if chance is None:
            return ""
        rng = np.random.default_rng((conversation.seed, conversation.turn, 1))  # so that the actions stay the same
        right = true_verdict(path, seen)
        wrong = [verdict for verdict in VERDICTS if verdict != right]
        return f"<guide>{right if rng.random() < chance else wrong[rng.integers(len(wrong))]}</guide>"

    def _action(self, path: Path, seen: list[str], conversation: Conversation) -> str:
        rng = np.random.default_rng((conversation.seed, conversation.turn))
        if not seen:
            return f"<search>{path.kind} {path.entities[0]}</search>"
        found = path.entities[-2] in seen
        if len(path.relations) == 1:
            return self._gold(path)  # reading is shown right; only where to go and when to stop is not
        if conversation.turn == TINYWIKI_RULES.max_turns - 1:
            good = self.config.answer / max(self.config.answer + self.config.wrong_answer, 1e-9)
            return self._gold(path) if found and rng.random() < good else self._other(path, seen[-1], rng)
        return self._with_fact(path, seen, rng) if found else self._without_fact(path, seen, rng)

    def _with_fact(self, path: Path, seen: list[str], rng: Generator) -> str:
        draw = rng.random()
        if draw < self.config.answer:
            return self._gold(path)
        if draw < self.config.answer + self.config.wrong_answer:
            return self._other(path, seen[-1], rng)
        return self._first_link(path, seen[-1])

    def _without_fact(self, path: Path, seen: list[str], rng: Generator) -> str:
        draw, config = rng.random(), self.config
        if draw < config.right:
            reached = next(i for i, name in enumerate(path.entities) if name not in seen)
            return f"<search>{path.relations[reached - 1]} {path.entities[reached]}</search>"
        if draw < config.right + config.first:
            return self._first_link(path, seen[-1])
        if draw < config.right + config.first + config.again:
            return f"<search>{path.kind} {path.entities[0]}</search>"
        return self._other(path, seen[-1], rng)

    def _gold(self, path: Path) -> str:
        return f"<answer>{path.relations[-1]} {path.entities[-1]}</answer>"

    def _other(self, path: Path, title: str, rng: Generator) -> str:
        """A value of the last article that is not the answer."""
        asked, gold = path.relations[-1], path.entities[-1]
        wrong = [
            f"{relation} {value}"
            for relation, value in self.world.facts[title].items()
            if relation != asked or (value != gold and not self.config.wrong_relation)
        ]
        return f"<answer>{wrong[rng.integers(len(wrong))]}</answer>"

    def _first_link(self, path: Path, title: str) -> str:
        for relation, value in self.world.facts[title].items():
            if self.world.facts[value]:
                return f"<search>{relation} {value}</search>"
        return f"<search>{path.kind} {path.entities[0]}</search>"


def true_verdict(path: Path, seen: Sequence[str]) -> str:
    """How a search stands that has read the articles `seen`, last one last.

    Positive with the article that states the answer among them, negative when the last one is beside the path.
    """
    if path.entities[-2] in seen:
        return "positive"
    return "negative" if seen and seen[-1] not in path.entities else "neutral"


def _title(observation: str) -> str:
    words = observation.removeprefix("<information>").split()
    return " ".join(words[:2])


class Demonstrations:
    """Batches of encoded demonstrations without end, a fresh world every second batch."""

    def __init__(self, config: WarmStartConfig, encoder: ConversationEncoder) -> None:
        self.config, self.encoder = config, encoder
        self._world = lru_cache(1)(self._make_world)

    def _make_world(self, number: int) -> tuple[World, Bm25Index]:
        world = World(1_000_000 * (self.config.seed + 1) + number, "train")
        return world, Bm25Index.from_passages(world.passages, TINYWIKI_BM25)

    def batch(self, step: int) -> list[Encoded]:
        """The demonstrations of one step; depends on the config and the step alone."""
        rng = np.random.default_rng((self.config.seed, step))
        world, index = self._world(step // 2)
        early = step < self.config.lookup_steps
        shares = (0.8, 0.2, 0.0, 0.0) if early else self.config.shares
        lookup, *hops = rng.multinomial(self.config.batch_size, shares).tolist()
        conversations = [_lookup(world, rng) for _ in range(lookup)]
        paths = [
            path
            for number, count in enumerate(hops, 1)
            if count
            for path in world.draw_paths(chains(number, held_out=False), count, rng)
        ]
        conversations += self._episodes(world, index, paths, rng) if paths else []
        return [self.encoder.encode(conversation) for conversation in conversations]

    def _episodes(self, world: World, index: Bm25Index, paths: list[Path], rng: Generator) -> list[Conversation]:
        asked = {world.question(path, f"hop{len(path.relations)}"): path for path in paths}
        env = SearchVectorEnv(index, list(asked), len(asked), TINYWIKI_RULES)
        act = Demonstrator(self.config, world, {question.id: path for question, path in asked.items()})
        starts = [Start(question.id, 0, int(rng.integers(2**62))) for question in asked]
        return [episode.conversation for episode in rollout(env, QuestionPolicy(prompts_of(env), act), starts)]


def _lookup(world: World, rng: Generator) -> Conversation:
    """An article with three random relations, then a question about each of them: nothing but reading."""
    linking = {relation: word for own in SCHEMA.values() for relation, (word, _) in own.items()}
    relations = rng.permutation(sorted(linking))[:3]
    names = list(world.facts)
    title, *values = (names[i] for i in rng.permutation(len(names))[:4])
    facts = dict(zip(relations.tolist(), values, strict=True))
    article = f"{title} is a film, {', '.join(f'{linking[r]} {r} {value}' for r, value in facts.items())}."
    messages = [Message("user", f"<information>{article}</information>")]
    for relation in rng.permutation(relations).tolist():
        messages.append(Message("tool", f"What is the {relation} of the film {title}?"))
        messages.append(Message("assistant", f"<answer>{relation} {facts[relation]}</answer>"))
    return Conversation(tuple(messages))


def _weights(encoded: Encoded, opens: int) -> list[float]:
    """1 on the agent's tokens, 0.3 on the title that a reply opens with: it repeats the query, practice in copying."""
    weights = [float(turn >= 0) for turn in encoded.turn]
    for place, token in enumerate(encoded.ids[:-2]):
        if token == opens and place > 0:
            weights[place + 1] = weights[place + 2] = 0.3
    return weights


def warm_start(
    config: WarmStartConfig, *, progress: Callable[[int, float], None] = lambda step, loss: None
) -> tuple[Any, Any]:
    """Train the small policy from nothing; returns the model and its tokenizer.

    Equal configs give equal weights on one machine with one torch thread. `progress` gets the step and its loss.
    """
    tokenizer, model = tiny_tokenizer(), tiny_model(config.seed)
    imitate(model, tokenizer, config, progress=progress)
    return model, tokenizer


def imitate(
    model: Any,
    tokenizer: Any,
    config: WarmStartConfig,
    *,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train a TinyWiki policy in place on the configured demonstrations. One that reads already needs no lookups."""
    demonstrations = Demonstrations(config, ConversationEncoder(tokenizer))
    opens = int(tokenizer.convert_tokens_to_ids("<information>"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(50, config.steps)
    schedule = get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup,
        num_decay_steps=config.steps - max(warmup, config.lookup_steps),
        num_training_steps=config.steps,
        decay_type="linear",
    )
    model.train()
    for step in range(config.steps):
        loss = _supervised_loss(model, demonstrations.batch(step), opens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step, float(loss.detach()))
    model.eval()


def _supervised_loss(model: Any, batch: Sequence[Encoded], opens: int) -> torch.Tensor:
    weights = pad_rows([_weights(encoded, opens) for encoded in batch], 0.0, torch.float32)
    return -(token_logprobs(model, pad(batch)) * weights).sum() / weights.sum()
