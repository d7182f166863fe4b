"""The first half of a training step: draw questions, play them, read their likelihoods, and give advantages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agentgym_ig.belief import combine_aliases, with_belief
from agentgym_ig.envs.rollout import Start, VectorSearch
from agentgym_ig.envs.wrappers import layers
from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.records import from_json, to_json
from agentgym_ig.trainers import ranks, sharding
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.critic import read_values
from agentgym_ig.trainers.dapo import groups_with_signal, overlong_penalty, varied_groups
from agentgym_ig.trainers.engines import disagreement, engine_logprobs, play
from agentgym_ig.trainers.experience import Batch, Experience, experience
from agentgym_ig.trainers.learner import Learner, precision
from agentgym_ig.trainers.recipes import Recipe
from agentgym_ig.trainers.scoring import Scored, Scorer
from agentgym_ig.types import Trajectory

if TYPE_CHECKING:
    from agentgym_ig.trainers.loop import Run


OVERLONG = "overlong"
"""The channel of DAPO's punishment."""


@dataclass(frozen=True, slots=True)
class Collected:
    """A step's batch with its advantages; None where no episode was left to learn from. figures: what to log."""

    batch: Batch | None
    learned: Experience | None
    figures: dict[str, float]


def draw_starts(questions: Sequence[str], config: TrainConfig, step: int, sampling: int = 0) -> list[Start]:
    """The episodes of a step: `group_size` of each drawn question. Depends on seed, step and sampling round alone."""
    rng = np.random.default_rng((config.seed, step, 2, sampling) if sampling else (config.seed, step))
    repeats = config.questions_per_step > len(questions)
    drawn = rng.choice(len(questions), config.questions_per_step, replace=repeats).tolist()
    seeds = rng.integers(2**62, size=(len(drawn), config.group_size)).tolist()
    return [
        Start(questions[question], sampling * config.questions_per_step + group, seed)
        for group, (question, own) in enumerate(zip(drawn, seeds, strict=True))
        for seed in own
    ]


def reward_weights(env: VectorSearch, recipe: Recipe) -> dict[str, float]:
    """Channel → what it counts in an episode's reward: the environment's weights, at this moment, without the channels
    that the recipe's estimator reads itself.
    """
    weights = dict(env.unwrapped.rules.weights)  # type: ignore[union-attr]  # every VectorSearch has a SearchVectorEnv inside
    for layer in layers(env):
        weights[layer.channel.name] = layer.weight() if callable(layer.weight) else layer.weight
    if recipe.overlong:
        weights[OVERLONG] = 1.0
    return {name: weight for name, weight in weights.items() if name not in recipe.own_channels}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds what the block took, in seconds, to `seconds[name]`."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun


def collect(run: Run, learner: Learner, step: int) -> Collected:
    """Play a step's episodes and give them advantages.

    Left out and counted: episodes whose search or reward failed, that ended before their first turn, or whose belief
    is not finite. With dynamic sampling groups without signal are dropped, and others drawn, until there are as many
    as wanted or the rounds are used up; the step then goes on with those it has.
    """
    rounds: list[Batch] = []
    seconds: dict[str, float] = {}
    played = kept = groups = sampled = restarts = 0
    wanted, dynamic = run.config.questions_per_step, run.recipe.sampling_rounds > 1
    while groups < wanted and sampled < run.recipe.sampling_rounds:
        with precision(run.config, run.policy.model.device), timed(seconds, "rollout_s"):
            starts = draw_starts(sorted(run.env.questions), run.config, step, sampled)
            episodes, again = learner.playing.of(partial(_play, run, starts))
        with precision(run.config, run.policy.model.device), timed(seconds, "score_s"):
            whole = [own for own in episodes if own.turns and not own.stop.failed]
            batch = learner.scoring.of(partial(read, run, whole, step))
        sampled, played, restarts = sampled + 1, played + len(episodes), restarts + again
        if batch is not None:
            kept += len(batch.episodes)
            batch = with_signal(batch, run.recipe) if dynamic else batch
        if batch is not None:
            rounds.append(batch)
            groups += len(batch.group.unique())
    figures: dict[str, float] = {
        "episodes_played": played,
        "episodes_failed": played - kept,
        "engine_restarts": restarts,
    }
    if dynamic:
        figures |= {"sampling_rounds": sampled, "groups_with_signal": groups}
    batch = _first_groups(rounds, wanted)
    if batch is None:
        return Collected(None, None, figures | {"episodes": 0} | seconds)
    with timed(seconds, "score_s"):
        with precision(run.config, run.policy.model.device):
            batch = learner.scoring.of(partial(beside, batch, learner))
        learned = experience(batch, run.recipe.estimator(batch), importance_cap=run.config.importance_cap)
    figures |= disagreement(batch.old, batch.engine)
    return Collected(batch, learned, figures | {"episodes": len(batch.episodes)} | seconds)


def _play(run: Run, starts: Sequence[Start], batch_size: int) -> tuple[list[Trajectory], int]:
    """All of the episodes on every rank, each of which plays its own groups; and how often an engine was restarted.

    batch_size: of a policy that has one.
    """
    engine = run.engine or run.policy
    if hasattr(run.policy, "batch_size"):
        run.policy.batch_size = batch_size
    if ranks.count() == 1:
        return play(run.env, engine, starts)
    with sharding.gathered(run.policy.model):
        own, restarts = play(run.env, engine, [start for start in starts if _player(start) == ranks.own()])
    told = ranks.gather([[to_json(episode) for episode in own], restarts])
    episodes = [iter(map(from_json, rows)) for rows, _ in told]
    return [next(episodes[_player(start)]) for start in starts], sum(number for _, number in told)


def _player(start: Start) -> int:
    """The rank that plays it."""
    return start.group % ranks.count()


def read(run: Run, episodes: Sequence[Trajectory], step: int, batch_size: int | None = None) -> Batch | None:
    """The episodes with the log-probabilities of their tokens and, if the recipe reads it, their belief, both read in
    one packed pass. Without those whose belief is not finite; None where none are left.
    """
    policy, config = run.policy, run.config
    gain = run.recipe.gain if "info_gain" in run.recipe.needs else None
    scorer = Scorer(
        policy.model,
        policy.encoder,
        run.env.rules.texts,
        temperature=policy.temperature,
        batch_size=batch_size or config.micro_batch,
    )
    count = (1 if config.aliases == "first" else None) if gain else 0
    encoded = [policy.encoder.encode(episode.conversation) for episode in episodes]
    answers = [episode.question.answers[:count] for episode in episodes]
    with sharding.gathered(policy.model):
        scored = ranks.read_rows(
            [len(own.ids) for own in encoded],
            lambda rows: scorer.score([encoded[row] for row in rows], [answers[row] for row in rows]),
            encode=lambda own: [own.logprobs.tolist(), own.beliefs],
            decode=lambda sent: Scored(torch.tensor(sent[0]), sent[1]),
        )
    if run.recipe.overlong:
        episodes = with_overlong(run, episodes, encoded)
    kept: list[tuple[Trajectory, Encoded, Tensor]] = []
    for episode, own, each in zip(episodes, encoded, scored, strict=True):
        belief = [combine_aliases(behind, config.aliases) for behind in each.beliefs] if gain else []
        if all(map(math.isfinite, belief)):
            kept.append(
                (with_belief(episode, belief, log=gain == "log") if gain else episode, own, each.logprobs.cpu())
            )
    if not kept:
        return None
    weights = reward_weights(run.env, run.recipe)
    played, tokens, logprobs = (list(column) for column in zip(*kept, strict=True))
    engine = [engine_logprobs(*own) for own in zip(played, tokens, strict=True)]
    return Batch(played, weights, step / config.steps, tokens, logprobs, engine=engine)


def with_overlong(run: Run, episodes: Sequence[Trajectory], encoded: Sequence[Encoded]) -> list[Trajectory]:
    """The episodes with DAPO's punishment as the channel `overlong` of their last turn."""
    limit = longest_episode(run)
    buffer = max(round(run.recipe.overlong * limit), 1)
    lengths = torch.tensor([sum(turn != OBSERVED for turn in own.turn) for own in encoded])
    penalties = overlong_penalty(lengths, limit=limit, buffer=buffer).tolist()
    shaped = []
    for episode, penalty in zip(episodes, penalties, strict=True):
        *before, last = episode.turns
        last = replace(last, rewards={**last.rewards, OVERLONG: penalty})
        shaped.append(replace(episode, turns=(*before, last)))
    return shaped


def with_signal(batch: Batch, recipe: Recipe) -> Batch | None:
    """The groups that something can be learned from: those with any advantage, where the estimator reads information
    gain, which can differ where rewards do not; else those whose rewards differ, apart from the punishment for being
    long. None where no group is left.
    """
    advantages = recipe.estimator(batch) if "info_gain" in recipe.needs else None
    if isinstance(advantages, Tensor):
        return batch.only(groups_with_signal(advantages, batch.group))
    unpunished = replace(batch, weights={name: own for name, own in batch.weights.items() if name != OVERLONG})
    return batch.only(varied_groups(unpunished.reward, batch.group))


def _first_groups(rounds: Sequence[Batch], wanted: int) -> Batch | None:
    if not rounds:
        return None
    batch = Batch.joined(rounds)
    groups = list(dict.fromkeys(batch.group.tolist()))[:wanted]
    return batch.only(torch.isin(batch.group, torch.tensor(groups)))


def longest_episode(run: Run) -> int:
    """Tokens that the policy can write in an episode at most."""
    return int(run.policy.max_new_tokens * run.env.rules.max_turns)


def beside(batch: Batch, learner: Learner, batch_size: int) -> Batch:
    """The batch with what the reference model and the critic say of its tokens, where the learner has them."""
    if learner.reference is not None:
        batch = replace(batch, reference=_tokens_of(batch, learner.model, learner.reference))
    if (critic := learner.critic) is not None:
        values = _tokens_of(batch, critic, lambda own: read_values(critic, own, batch_size=batch_size))
        batch = replace(batch, values=values)
    return batch


def _tokens_of(batch: Batch, model: Any, read: Callable[[Sequence[Encoded]], list[Tensor]]) -> list[Tensor]:
    """(T,) what `read` makes of each episode, every rank reading its share."""
    with sharding.gathered(model):
        return ranks.read_rows(
            [len(own.ids) for own in batch.encoded],
            lambda rows: read([batch.encoded[row] for row in rows]),
            encode=Tensor.tolist,
            decode=torch.tensor,
        )
