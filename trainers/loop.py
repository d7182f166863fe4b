"""The training loop: roll out, score, advantages, update, log, evaluate, save. Read `train` first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agentgym_ig.answers import score
from agentgym_ig.envs.rollout import VectorSearch
from agentgym_ig.envs.wrappers import channels_of, layers
from agentgym_ig.guide import verdict
from agentgym_ig.lm.policy import LocalPolicy, TransformersPolicy
from agentgym_ig.policies import Policy
from agentgym_ig.trainers import ranks, sharding
from agentgym_ig.trainers.adapters import is_adapted
from agentgym_ig.trainers.alarms import alarms
from agentgym_ig.trainers.checkpoint import save_checkpoint, save_model
from agentgym_ig.trainers.collect import collect, longest_episode, timed
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.critic import Critic
from agentgym_ig.trainers.experience import Batch, Experience
from agentgym_ig.trainers.interrupt import Interruptible
from agentgym_ig.trainers.journal import CHECKPOINTS, append, begin, stop_if_not_finite
from agentgym_ig.trainers.learner import Learner, make_learner, next_rate
from agentgym_ig.trainers.memory import Portion
from agentgym_ig.trainers.recipes import Recipe
from agentgym_ig.trainers.reference import reference_of, weights_digest
from agentgym_ig.trainers.trackers import check_trackers, trackers
from agentgym_ig.trainers.update import Update
from agentgym_ig.types import Stop


@dataclass(frozen=True)
class Run:
    """All parts of a training run. `evaluate` returns figures to log, given the policy; `log_with` names trackers.

    The policy holds the model that is trained, and plays. An `engine` plays in its place: a server with the same
    weights, which are the caller's to keep the same from step to step.
    """

    policy: LocalPolicy
    env: VectorSearch
    recipe: Recipe
    config: TrainConfig
    out: Path
    evaluate: Callable[[LocalPolicy], dict[str, Any]] | None = None
    log_with: tuple[str, ...] = ()
    engine: Policy | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        rules = asdict(replace(self.env.rules, weights=dict(self.env.rules.weights)))
        # A weight that changes by a function of the user's is theirs to repeat.
        channels = {own.channel.name: None if callable(own.weight) else own.weight for own in layers(self.env)}
        questions = {name: asdict(own) for name, own in sorted(self.env.questions.items())}
        # These change nothing about a step; how many there will be, only where something depends on the share done.
        free = ["micro_batch", "evaluate_every", "save_every", "keep", "max_skipped_updates"]
        if self.config.schedule == "constant_with_warmup" and "self_guide" not in self.recipe.needs:
            free.append("steps")
        return {
            "recipe": self.recipe.settings,
            "questions": _digest(questions),
            "rules": _digest(rules),
            "channels": channels,
            "temperature": self.policy.temperature,
            "max_new_tokens": self.policy.max_new_tokens,
            **{name: value for name, value in asdict(self.config).items() if name not in free},
        }


def check_run(run: Run) -> None:
    """Raise ValueError for a policy that samples nothing to learn from, for a recipe without the channels it needs, and
    for an answer that cannot be scored.
    """
    if run.policy.temperature <= 0:
        raise ValueError(f"temperature={run.policy.temperature} samples no alternatives to learn from; use one above 0")
    _check_engine(run)
    needs = run.recipe.needs
    if "self_guide" in needs and "self_guide" not in {channel.name for channel in channels_of(run.env)}:
        raise ValueError("this recipe reads the channel self_guide; train on add_channel(env, SelfGuide())")
    if "info_gain" in needs:
        _check_answers(run)


def _check_answers(run: Run) -> None:
    """Raise ValueError, at the start and not at the step that draws it, for an answer without a token to score."""
    for question in run.env.questions.values():
        for answer in question.answers[: 1 if run.config.aliases == "first" else None]:
            try:
                run.policy.encoder.branch(answer, run.env.rules.texts)
            except ValueError as error:
                raise ValueError(f"question {question.id!r}: {error}") from error


def _check_engine(run: Run) -> None:
    """Raise ValueError for an engine that samples otherwise than the policy is trained to, or cannot have shards."""
    if sharding.asked() and not isinstance(run.policy, TransformersPolicy):
        raise ValueError("divided weights are sampled from by a TransformersPolicy alone; take --engine transformers")
    for name in ("temperature", "max_new_tokens"):
        own, wanted = getattr(run.engine, name, None), getattr(run.policy, name)
        if own not in (None, wanted):
            raise ValueError(f"the engine has {name}={own}, and the policy {name}={wanted}; they must be the same")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


Progress = Callable[[int, dict[str, Any]], None]


def train(run: Run, *, resume: bool = False, progress: Progress = lambda done, metrics: None) -> Path:
    """Train `run.policy.model` in place; returns the folder of the trained model, `out/model`.

    Writes `out/metrics.jsonl` and `out/checkpoints`. With `resume` it goes on from the newest checkpoint, or from
    the start if there is none yet, and ends bit for bit as a run that was never stopped. Ctrl-C finishes the step,
    saves it and raises KeyboardInterrupt.

    Raises ValueError for a greedy policy, FileExistsError when `out` already holds a run and `resume` is not set,
    FileNotFoundError when there is nothing to resume, CheckpointError when what is there does not fit this run, and
    FloatingPointError when more updates than allowed were not finite.
    """
    config, folder = run.config, run.out / CHECKPOINTS
    learner, settings = prepare(run)
    history = begin(run.out, learner, settings, resume=resume)
    tracked = trackers(
        run.log_with if ranks.first() else (), run.out, run.out.resolve().name, settings, begun=len(history)
    )
    with tracked as track, Interruptible() as interrupt:
        for step in range(len(history), config.steps):
            metrics = train_step(run, learner, step)
            done = step + 1
            if run.evaluate and config.evaluate_every and done % config.evaluate_every == 0:
                metrics["evaluation"] = run.evaluate(run.policy)
            history.append(metrics)
            metrics["alarms"] = [str(alarm) for alarm in alarms(history)]
            append(run.out, metrics)
            track(metrics, done)
            progress(done, metrics)
            stop_if_not_finite(history, config.max_skipped_updates)
            interrupt.agree()
            if done % config.save_every == 0 or done == config.steps or interrupt.asked:
                save_checkpoint(folder, done, learner, settings, keep=config.keep)
            interrupt.check()
    save_model(run.out / "model", learner.model, learner.tokenizer)
    return run.out / "model"


def train_step(run: Run, learner: Learner, step: int) -> dict[str, Any]:
    """One batch: play it, score it, and update on it. Returns the step's metrics; `step` in them counts from 1.

    Earlier batches that are still learned from keep their advantages and the log-probabilities that they had.
    """
    collected = collect(run, learner, step)
    rate = learner.schedule.get_last_lr()[0]
    metrics: dict[str, Any] = {"step": step + 1, "learning_rate": rate, **collected.figures}
    if collected.learned is not None and collected.batch is not None:
        metrics |= summary(collected.batch, collected.learned)
        seconds: dict[str, float] = {}
        update = Update(
            learner, run.recipe, run.config, temperature=run.policy.temperature, longest=longest_episode(run)
        )
        batches = [*learner.replay, collected.learned]
        with timed(seconds, "update_s"):
            metrics |= update(Experience.joined(batches), step)
        metrics |= seconds
        learner.replay[:] = batches[max(len(batches) - run.config.replay, 0) :]
    next_rate(learner.schedule)
    return {name: round(value, 4) if name.endswith("_s") else value for name, value in metrics.items()}


def prepare(run: Run) -> tuple[Learner, dict[str, Any]]:
    """The learner at the beginning of a run, and the run's settings, with the weights that a checkpoint relies on.

    Raises ValueError for a policy that samples nothing to learn from, and for a recipe without the channels it needs.
    """
    check_run(run)
    check_trackers(run.log_with)
    needs = run.recipe.needs
    model, settings = run.policy.model, run.settings
    if "reference" in needs or is_adapted(model):
        settings["base_weights"] = weights_digest(model)
    critic = Critic(model) if "values" in needs else None
    reference = reference_of(model) if "reference" in needs else None
    learner = make_learner(model, run.policy.encoder.tokenizer, run.config, critic=critic)
    learner = replace(learner, playing=Portion("rollout", getattr(run.policy, "batch_size", 1)))
    if reference is not None:
        scoring = learner.scoring
        learner = replace(
            learner,
            reference=lambda encoded: reference.logprobs(
                encoded, temperature=run.policy.temperature, batch_size=scoring.size
            ),
        )
    json.dumps(settings)  # what a checkpoint could not hold is found now
    return learner, settings


def summary(batch: Batch, learned: Experience) -> dict[str, float]:
    """What the batch was like: scores, lengths, and how much of it carried a signal."""
    figures, n = totals(batch, learned), len(batch.episodes)
    nats = -float(batch.column("old")[batch.tokens.sampled].sum())
    entropy = nats / max(figures["tokens_per_episode"], 1.0)
    return {name: value / n for name, value in figures.items()} | {"entropy": entropy}


def totals(batch: Batch, learned: Experience) -> dict[str, float]:
    """The figures of a batch, summed over its episodes."""
    episodes = batch.episodes
    tokens, columns = learned.rows(range(len(episodes)), "cpu")
    silent = (columns["advantages"].abs() < 1e-8) | ~tokens.sampled
    figures = {
        "em": sum(score("em", own.answer, own.question.answers) for own in episodes),
        "reward": float(batch.reward.sum()),
        "outcome": sum(own.total("outcome") for own in episodes),
        "turns": sum(len(own.turns) for own in episodes),
        "searches": sum(len(turn.queries) for own in episodes for turn in own.turns),
        "answered": sum(own.stop is Stop.ANSWERED for own in episodes),
        "malformed": abs(sum(own.total("format") for own in episodes)),
        "info_gain": sum(own.total("info_gain") for own in episodes),
        "no_signal": float(silent.all(1).sum()),
        "tokens_per_episode": float(tokens.sampled.sum()),
    }
    if any("self_guide" in turn.rewards for own in episodes for turn in own.turns):
        figures["unreadable_verdicts"] = sum(
            verdict(turn.action.text) is None for own in episodes for turn in own.turns
        )
    return figures
