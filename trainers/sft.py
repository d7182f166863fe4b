"""Supervised fine-tuning on recorded episodes: a warm start for reinforcement learning, or rejection sampling.

The loss of an optimiser step is the mean of -log p over all tokens that the agent wrote in its episodes, in nats; what
the environment wrote is read but not learned. Episodes of a text-only policy are tokenised, those with token ids are
learned from as they were sampled.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentgym_ig.answers import METRICS, score
from agentgym_ig.lm.encode import OBSERVED, ConversationEncoder, Encoded, Tokenizer
from agentgym_ig.trainers.adapters import is_adapted
from agentgym_ig.trainers.aggregation import token_weights
from agentgym_ig.trainers.batch import pad
from agentgym_ig.trainers.checkpoint import save_checkpoint, save_model
from agentgym_ig.trainers.collect import timed
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.interrupt import Interruptible
from agentgym_ig.trainers.journal import CHECKPOINTS, append, begin, stop_if_not_finite
from agentgym_ig.trainers.learner import Learner, make_learner, next_rate, precision, take_step
from agentgym_ig.trainers.packing import packing
from agentgym_ig.trainers.readout import Model
from agentgym_ig.trainers.reference import weights_digest
from agentgym_ig.trainers.scoring import token_logprobs
from agentgym_ig.types import Action, Trajectory

logger = logging.getLogger(__name__)

_OWN = ("epochs", "batch_size", "warmup", "max_tokens")
"""Fields of `SftConfig` that `TrainConfig` has not, or means otherwise."""

_FREE = ("micro_batch", "max_skipped_updates", "save_every", "keep")
"""Fields that change nothing about a step, so a run can be resumed with others."""


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """The settings of a fine-tuning run. Those that `TrainConfig` has too mean the same there."""

    epochs: int = 3
    """How often each episode is learned from."""
    batch_size: int = 32
    """Episodes per optimiser step, at most: an epoch is cut into steps of like size."""
    learning_rate: float = 1e-5
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    max_tokens: int | None = None
    """Longer conversations are left out, and counted; with None, one that the model cannot read is an error."""
    micro_batch: int = 8
    """Episodes per forward and backward pass: lower it if memory runs out; results stay the same."""
    bf16: bool = False
    gradient_checkpointing: bool = False
    max_skipped_updates: int = 10
    save_every: int = 50
    """Steps between checkpoints."""
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seed < 0:
            raise ValueError(f"batch_size={self.batch_size} must be 1 or more, and seed={self.seed} 0 or more")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup} is a share of the steps, from 0 to 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be 1 or more, or None")
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be 1 or more")
        self.as_train(1)  # which checks the others

    def steps_per_epoch(self, episodes: int) -> int:
        """Optimiser steps that so many episodes are cut into."""
        return math.ceil(episodes / self.batch_size)

    def as_train(self, episodes: int) -> TrainConfig:
        """The settings that fine-tuning shares with other training, for a run over so many episodes."""
        steps = self.epochs * self.steps_per_epoch(episodes)
        shared = {name: value for name, value in asdict(self).items() if name not in _OWN}
        return TrainConfig(steps=steps, warmup_steps=round(self.warmup * steps), **shared)


def chosen(episodes: Sequence[Trajectory], *, metric: str = "em", least: float = 1.0) -> list[Trajectory]:
    """The episodes whose answer scores at least so much by a metric of `answers.METRICS`; failed ones never.

    Where there is no answer the score is 0, so `least=0` keeps all that did not fail. Raises ValueError for another
    metric, a `least` outside [0, 1], and when no episode is left.
    """
    if metric not in METRICS or not 0 <= least <= 1:
        raise ValueError(f"metric={metric!r} must be one of {', '.join(METRICS)}, and least={least} from 0 to 1")
    if not episodes:
        raise ValueError("no episodes to learn from; record some by agentgym-ig eval --episodes FILE")
    scores = [score(metric, own.answer, own.question.answers) for own in episodes]
    kept = [own for own, value in zip(episodes, scores, strict=True) if value >= least and not own.stop.failed]
    if not kept:
        failed = sum(own.stop.failed for own in episodes)
        raise ValueError(
            f"nothing to learn from: of {len(episodes)} episodes {failed} failed, and no other has {metric} of {least}"
            f" or more (the best has {max(scores, default=0.0):.2f}); record more, or ask for less"
        )
    return kept


def retokenised(episodes: Sequence[Trajectory]) -> list[Trajectory]:
    """The episodes without the token ids that were sampled: for a model with another tokenizer than the recorded."""
    return [
        replace(own, turns=tuple(replace(turn, action=Action(turn.action.text)) for turn in own.turns))
        for own in episodes
    ]


Progress = Callable[[int, dict[str, Any]], None]


def sft(
    model: Model,
    tokenizer: Tokenizer,
    episodes: Sequence[Trajectory],
    config: SftConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress = lambda done, metrics: None,
) -> Path:
    """Fine-tune `model`, which may have an adapter, in place; returns the folder of the result, `out/model`.

    All episodes are learned from: see `chosen`. There is no dropout. Writes `out/metrics.jsonl` and
    `out/checkpoints`, and resumes as `loop.train` does: bit for bit, and after Ctrl-C without losing the step.

    Raises ValueError for episodes that cannot be learned from (see `encode_all`), FileExistsError when `out` already
    holds a run and `resume` is not set, FileNotFoundError when there is nothing to resume, CheckpointError when what
    is there is of other settings, data or model, and FloatingPointError when more steps than allowed were not finite.
    """
    encoded = encode_all(model, tokenizer, episodes, config.max_tokens)
    steps = config.as_train(len(encoded)).steps
    settings = _settings(model, encoded, config)
    learner = make_learner(model, tokenizer, config.as_train(len(encoded)))
    history = begin(out, learner, settings, resume=resume)
    with Interruptible() as interrupt:
        for step in range(len(history), steps):
            done = step + 1
            metrics = train_step(learner, encoded, config, step)
            history.append(metrics)
            append(out, metrics)
            progress(done, metrics)
            stop_if_not_finite(history, config.max_skipped_updates)
            if done % config.save_every == 0 or done == steps or interrupt.asked:
                save_checkpoint(out / CHECKPOINTS, done, learner, settings, keep=config.keep)
            interrupt.check()
    save_model(out / "model", learner.model, learner.tokenizer)
    return out / "model"


def train_step(learner: Learner, encoded: Sequence[Encoded], config: SftConfig, step: int) -> dict[str, Any]:
    """Learn from the episodes of a step; one that is not finite is skipped.

    Returns its metrics: `step` in them counts from 1, and `epoch` how often the data has been gone through after it.
    """
    rows = rows_of(step, len(encoded), config)
    metrics: dict[str, Any] = {
        "step": step + 1,
        "epoch": round((step + 1) / config.steps_per_epoch(len(encoded)), 4),
        "episodes": len(rows),
        "learning_rate": learner.schedule.get_last_lr()[0],
        "skipped_updates": 0,
    }
    seconds: dict[str, float] = {}
    with timed(seconds, "update_s"):
        try:
            metrics |= learn(learner, [encoded[row] for row in rows], config.as_train(len(encoded)))
        except FloatingPointError:
            learner.optimizer.zero_grad()
            metrics["skipped_updates"] = 1
    next_rate(learner.schedule)
    return metrics | {name: round(value, 4) for name, value in seconds.items()}


def rows_of(step: int, episodes: int, config: SftConfig) -> list[int]:
    """Which episodes a step learns from: each epoch has an order of its own, made of the seed and its number."""
    epoch, part = divmod(step, config.steps_per_epoch(episodes))
    order = np.random.default_rng((config.seed, epoch)).permutation(episodes)
    own: list[int] = np.array_split(order, config.steps_per_epoch(episodes))[part].tolist()
    return own


def learn(learner: Learner, encoded: Sequence[Encoded], config: TrainConfig) -> dict[str, float]:
    """One optimiser step. Returns the loss, the agent's tokens and the norm of the gradient before it was clipped.

    Every token's weight is fixed over all episodes before they are cut into micro-batches. Raises FloatingPointError,
    before any weight has changed, when the loss or the gradient is not finite.
    """
    rows, device = sorted(encoded, key=lambda own: len(own.ids)), learner.model.device
    sampled = pad(rows).sampled
    weights = token_weights(sampled, "token-mean")
    loss = 0.0
    learner.optimizer.zero_grad()
    for first in range(0, len(rows), config.micro_batch):
        batch = pad(rows[first : first + config.micro_batch], device)
        weight = weights[first : first + len(batch.ids), : batch.ids.shape[1]].to(device, torch.float32)
        with packing(learner.model):
            with precision(config, device):
                logprobs = token_logprobs(learner.model, batch, wanted=batch.sampled)
            part = -(logprobs * weight).sum()
            part.backward()
        loss += float(part.detach())
    (norm,) = take_step(learner, [loss], config.max_grad_norm)
    return {"loss": loss, "tokens": int(sampled.sum()), "grad_norm": norm}


def encode_all(
    model: Model, tokenizer: Tokenizer, episodes: Sequence[Trajectory], max_tokens: int | None = None
) -> list[Encoded]:
    """The episodes' tokens, without conversations of more than `max_tokens` and those in which the agent wrote
    nothing; a warning says how many were left out.

    Raises ValueError when none is left, for token ids of another tokenizer, and for a conversation that is longer
    than the model can read and not longer than `max_tokens`.
    """
    _check_ids(tokenizer, episodes)
    encoder = ConversationEncoder(tokenizer)
    every = [encoder.encode(own.conversation) for own in episodes]
    fitting = [own for own in every if max_tokens is None or len(own.ids) <= max_tokens]
    kept = [own for own in fitting if any(turn != OBSERVED for turn in own.turn)]
    left_out = (
        f"of {len(every)} conversations {len(every) - len(fitting)} have more than max_tokens={max_tokens} tokens,"
        f" and in {len(fitting) - len(kept)} the agent wrote nothing"
    )
    if not kept:
        raise ValueError(f"nothing to learn from: {left_out}")
    if len(kept) < len(every):
        logger.warning("left out: %s", left_out)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if beyond := [len(own.ids) for own in kept if len(own.ids) > longest]:
        raise ValueError(
            f"{len(beyond)} conversations have more than the {longest} tokens that the model can read, one of them"
            f" {max(beyond)}; leave them out by max_tokens={longest}"
        )
    return kept


def _check_ids(tokenizer: Tokenizer, episodes: Sequence[Trajectory]) -> None:
    """Raise ValueError for token ids that do not spell their action's text, which a server may have cut or trimmed."""
    for episode in episodes:
        for turn in episode.turns:
            if not (ids := turn.action.token_ids):
                continue
            spelt = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            one, other = "".join(spelt.split()), "".join(turn.action.text.split())
            if not (one.startswith(other) or (one and other.startswith(one))):
                raise ValueError(
                    f"an action of question {episode.question.id!r} is {turn.action.text!r}, but its token ids spell"
                    f" {spelt!r}: another tokenizer made them; learn from the text by retokenised() or --as-text"
                )


def _settings(model: Model, encoded: Sequence[Encoded], config: SftConfig) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    digest = hashlib.sha256()
    for own in encoded:
        digest.update(np.array([len(own.ids), *own.ids, *own.turn], np.int64).tobytes())
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    settings |= {"data": digest.hexdigest()[:16], "conversations": len(encoded)}
    return settings | ({"base_weights": weights_digest(model)} if is_adapted(model) else {})
