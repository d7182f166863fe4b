"""The training loop: roll out, score, advantages, update, log, evaluate, save. Read `train` first."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentgym_ig.answers import score as answer_score
from agentgym_ig.belief import ALIAS_POLICIES, combine_aliases, with_belief
from agentgym_ig.envs.rollout import Start, VectorSearch, rollout
from agentgym_ig.lm.encode import Encoded
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.trainers.batch import Experience, pad
from agentgym_ig.trainers.checkpoint import checkpoints, restore, save_checkpoint, save_model
from agentgym_ig.trainers.interrupt import Interruptible
from agentgym_ig.trainers.losses import AGGREGATIONS, clip_fraction, clipped_loss, token_weights
from agentgym_ig.trainers.recipes import Estimator
from agentgym_ig.trainers.scoring import Scorer, token_logprobs
from agentgym_ig.types import Stop, Trajectory

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run's settings beside its recipe. The defaults are those of the IGPO paper where it states them."""

    steps: int = 100
    """Batches of episodes."""
    questions_per_step: int = 32
    group_size: int = 16
    """Episodes per question."""
    learning_rate: float = 1e-6
    max_grad_norm: float = 1.0
    clip: float = 0.2
    """PPO clip on both sides."""
    updates_per_step: int = 1
    """Optimiser steps that a batch is cut into, by episodes."""
    aggregation: str = "seq-mean-token-mean"
    """How token losses are averaged; see `losses.token_weights`."""
    aliases: str = "first"
    """Which of the accepted answers the belief is about; see `belief.combine_aliases`."""
    micro_batch: int = 16
    """Episodes per forward and backward pass: lower it if memory runs out; results stay the same."""
    evaluate_every: int = 10
    """Steps between evaluations; 0 for none."""
    save_every: int = 10
    """Steps between checkpoints."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} gives every advantage 0; use 2 or more")
        small = [
            name
            for name in ("steps", "questions_per_step", "updates_per_step", "micro_batch", "save_every")
            if getattr(self, name) < 1
        ]
        if small:
            raise ValueError(f"{', '.join(small)} must be 1 or more")
        if not self.learning_rate > 0 or not 0 < self.clip < 1:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0 and clip={self.clip} between 0 and 1")
        choices = {"aggregation": AGGREGATIONS[:3], "aliases": ALIAS_POLICIES}  # the fourth needs a constant of its own
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        episodes = self.questions_per_step * self.group_size
        if episodes < self.updates_per_step:
            raise ValueError(f"{episodes} episodes cannot be cut into updates_per_step={self.updates_per_step}")


@dataclass(frozen=True)
class Run:
    """All parts of a training run. `evaluate` returns figures to log, given the policy."""

    policy: TransformersPolicy
    env: VectorSearch
    recipe: Estimator
    recipe_name: str
    config: TrainConfig
    out: Path
    evaluate: Callable[[TransformersPolicy], dict[str, Any]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        rules = asdict(replace(self.env.rules, weights=dict(self.env.rules.weights)))
        task = json.dumps({"questions": sorted(self.env.questions), "rules": rules}, sort_keys=True)
        free = ("steps", "micro_batch", "evaluate_every", "save_every")  # change nothing about a step
        return {
            "recipe": self.recipe_name,
            "task": hashlib.sha256(task.encode()).hexdigest()[:16],
            "temperature": self.policy.temperature,
            "max_new_tokens": self.policy.max_new_tokens,
            **vars(self.recipe),
            **{name: value for name, value in asdict(self.config).items() if name not in free},
        }


Progress = Callable[[int, dict[str, Any]], None]


def train(run: Run, *, resume: bool = False, progress: Progress = lambda done, metrics: None) -> Path:
    """Train `run.policy.model` in place; returns the folder of the trained model, `out/model`.

    Writes `out/metrics.jsonl` and `out/checkpoints`. With `resume` it goes on from the newest checkpoint, or from
    the start if there is none yet, and ends bit for bit as a run that was never stopped. Ctrl-C finishes the step,
    saves it and raises KeyboardInterrupt.

    Raises ValueError for a greedy policy, FileExistsError when `out` already holds a run and `resume` is not set,
    FileNotFoundError when there is nothing to resume, and CheckpointError when what is there does not fit this run.
    """
    if run.policy.temperature <= 0:
        raise ValueError(f"temperature={run.policy.temperature} samples no alternatives to learn from; use one above 0")
    # The model stays in evaluation mode: with dropout the first update would not be on-policy.
    model, config = run.policy.model.eval(), run.config
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    begun = _begin(run, optimizer, resume)
    with Interruptible() as interrupt:
        for step in range(begun, config.steps):
            metrics = train_step(run, optimizer, step)
            done = step + 1
            if run.evaluate and config.evaluate_every and done % config.evaluate_every == 0:
                metrics["evaluation"] = run.evaluate(run.policy)
            _append(run.out / METRICS_FILE, metrics)
            progress(done, metrics)
            if done % config.save_every == 0 or done == config.steps or interrupt.asked:
                tokenizer = run.policy.encoder.tokenizer
                save_checkpoint(run.out / "checkpoints", done, model, tokenizer, optimizer, run.settings)
            interrupt.check()
    save_model(run.out / "model", model, run.policy.encoder.tokenizer)
    return run.out / "model"


def _begin(run: Run, optimizer: torch.optim.Optimizer, resume: bool) -> int:
    """Prepare the output folder, restore if asked to, and return the steps already done."""
    found, log = checkpoints(run.out / "checkpoints"), run.out / METRICS_FILE
    if not resume:
        if found or log.exists():
            raise FileExistsError(
                f"{run.out} already holds a run; add --resume to go on with it, or give another folder"
            )
        run.out.mkdir(parents=True, exist_ok=True)
        return 0
    if not found and not log.exists():
        raise FileNotFoundError(f"{run.out} holds no run to resume; start it without --resume")
    begun = restore(found[-1], run.policy.model, optimizer, run.settings) if found else 0
    lines = log.read_text().splitlines()[:begun]  # one line a step; those after the checkpoint will be done again
    log.write_text("".join(f"{line}\n" for line in lines))
    return begun


def _append(path: Path, metrics: dict[str, Any]) -> None:
    with path.open("a") as log:
        log.write(json.dumps(metrics) + "\n")


def draw_starts(questions: Sequence[str], config: TrainConfig, step: int) -> list[Start]:
    """The episodes of a step: `group_size` of each drawn question. Depends on seed and step alone."""
    rng = np.random.default_rng((config.seed, step))
    repeats = config.questions_per_step > len(questions)
    drawn = rng.choice(len(questions), config.questions_per_step, replace=repeats).tolist()
    seeds = rng.integers(2**62, size=(len(drawn), config.group_size)).tolist()
    return [
        Start(questions[question], group, seed)
        for group, (question, own) in enumerate(zip(drawn, seeds, strict=True))
        for seed in own
    ]


def train_step(run: Run, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """One batch: play it, score it, and update on it. Returns the step's metrics; `step` in them counts from 1.

    Episodes whose search or reward failed are counted and left out.
    """
    clock = [time.perf_counter()]
    episodes = rollout(run.env, run.policy, draw_starts(sorted(run.env.questions), run.config, step))
    clock.append(time.perf_counter())
    kept, encoded, old = score_episodes(run, [episode for episode in episodes if not episode.stop.failed])
    clock.append(time.perf_counter())
    metrics: dict[str, Any] = {"step": step + 1, "episodes": len(kept), "episodes_failed": len(episodes) - len(kept)}
    if kept:
        advantages = run.recipe(kept)
        learned = Experience(encoded, old, advantages)
        metrics |= update(run, optimizer, learned, step) | summary(kept, advantages)
        clock.append(time.perf_counter())
    phases = zip(("rollout_s", "score_s", "update_s"), np.diff(clock).tolist(), strict=False)
    return metrics | {name: round(seconds, 4) for name, seconds in phases}


def score_episodes(run: Run, episodes: Sequence[Trajectory]) -> tuple[list[Trajectory], list[Encoded], list[Tensor]]:
    """Read every episode's log-probabilities, and its belief if the recipe needs one, in one packed pass.

    Returns the episodes with their belief and `info_gain` channel filled in, their tokens, and (T,) the
    log-probability of each sampled token; without those whose belief is not finite.
    """
    policy, config = run.policy, run.config
    scorer = Scorer(
        policy.model,
        policy.encoder,
        run.env.rules.texts,
        temperature=policy.temperature,
        batch_size=config.micro_batch,
    )
    count = (1 if config.aliases == "first" else None) if run.recipe.needs_belief else 0
    encoded = [policy.encoder.encode(episode.conversation) for episode in episodes]
    scored = scorer.score(encoded, [episode.question.answers[:count] for episode in episodes])
    logprobs = [each.logprobs for each in scored]
    if not run.recipe.needs_belief:
        return list(episodes), encoded, logprobs
    beliefs = [[combine_aliases(own, config.aliases) for own in each.beliefs] for each in scored]
    kept = [row for row, own in enumerate(beliefs) if all(map(math.isfinite, own))]
    believed = [with_belief(episodes[row], beliefs[row], log=run.recipe.log_gain) for row in kept]
    return believed, [encoded[row] for row in kept], [logprobs[row] for row in kept]


def update(run: Run, optimizer: torch.optim.Optimizer, learned: Experience, step: int) -> dict[str, float]:
    """`updates_per_step` optimiser steps over the batch, each over its own part of the episodes."""
    order = np.random.default_rng((run.config.seed, step, 1)).permutation(len(learned.encoded))
    parts = np.array_split(order, min(run.config.updates_per_step, len(order)))
    stats = [_update_on(run, optimizer, learned, part.tolist()) for part in parts]
    return {name: math.fsum(own[name] for own in stats) / len(stats) for name in stats[0]}


def _update_on(run: Run, optimizer: torch.optim.Optimizer, learned: Experience, part: list[int]) -> dict[str, float]:
    """One optimiser step. Every token's weight is fixed over the whole part before it is cut into micro-batches."""
    config, model = run.config, run.policy.model
    part.sort(key=lambda row: len(learned.encoded[row].ids))
    weights = token_weights(pad([learned.encoded[row] for row in part]).sampled, config.aggregation)
    loss_sum, cut, tokens = 0.0, 0.0, 0
    optimizer.zero_grad()
    for first in range(0, len(part), config.micro_batch):
        rows = part[first : first + config.micro_batch]
        batch, old, advantages = learned.rows(rows, model.device)
        logprobs = token_logprobs(model, batch, run.policy.temperature, wanted=batch.sampled)
        losses = clipped_loss(logprobs, old, advantages, clip_low=config.clip, clip_high=config.clip)
        loss = (losses * weights[first : first + len(rows), : losses.shape[1]].to(losses)).sum()
        loss.backward()
        count = int(batch.sampled.sum())
        loss_sum, tokens = loss_sum + float(loss.detach()), tokens + count
        ratios = (logprobs.detach(), old, advantages, batch.sampled)
        cut += count * clip_fraction(*ratios, clip_low=config.clip, clip_high=config.clip)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    if not math.isfinite(loss_sum) or not math.isfinite(norm):
        raise FloatingPointError(
            f"loss {loss_sum} or gradient norm {norm} is not finite; lower the learning rate and resume"
        )
    optimizer.step()
    return {"loss": loss_sum, "grad_norm": norm, "clip_fraction": cut / max(tokens, 1), "tokens": tokens}


def summary(episodes: Sequence[Trajectory], advantages: Tensor) -> dict[str, float]:
    """What the batch was like: scores, lengths, and how much of it carried a signal."""
    n = len(episodes)
    turns = torch.arange(advantages.shape[1]) < torch.tensor([len(episode.turns) for episode in episodes])[:, None]
    silent = (advantages.abs() < 1e-8) | ~turns
    return {
        "em": sum(answer_score("em", episode.answer, episode.question.answers) for episode in episodes) / n,
        "outcome": sum(episode.total("outcome") for episode in episodes) / n,
        "turns": sum(len(episode.turns) for episode in episodes) / n,
        "answered": sum(episode.stop is Stop.ANSWERED for episode in episodes) / n,
        "malformed": abs(sum(episode.total("format") for episode in episodes)) / n,
        "info_gain": sum(episode.total("info_gain") for episode in episodes) / n,
        "no_signal": float(silent.all(1).double().mean()),
    }
