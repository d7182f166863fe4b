"""Episodes as rows of TRL's batches: exact ids, whose tokens they are, log-probabilities and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.trainers.batch import pad_rows
from agentgym_ig.trainers.collect import read, reward_weights, with_overlong
from agentgym_ig.trainers.experience import Batch, Experience, experience
from agentgym_ig.trainers.loop import Run
from agentgym_ig.types import Trajectory


@dataclass(frozen=True, slots=True)
class HostedRow:
    """An episode as TRL has it. The completion is all behind the first prompt, replies of the environment included.

    own: for each token of the completion 1 where the policy wrote it and it is trained on, else 0.
    logprobs: at sampling, nats, one per token of the completion, 0 off the policy's; None if the engine gave none.
    advantages: one per token of the completion, 0 off the policy's.
    reward: the episode's; None for one that is left out of the update, as its search or reward failed.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    own: list[int]
    logprobs: list[float] | None
    advantages: list[float]
    reward: float | None


@dataclass(frozen=True, slots=True)
class Hosted:
    """A generation batch: a row for each episode, in the order given; and those that are learned from as our own
    trainer has them, None where there are none.
    """

    episodes: list[Trajectory]
    rows: list[HostedRow]
    batch: Batch | None
    learned: Experience | None

    @property
    def failed(self) -> int:
        """Episodes that are left out of the update."""
        return sum(row.reward is None for row in self.rows)


def hosted(run: Run, episodes: Sequence[Trajectory], step: int, end: int) -> Hosted:
    """Episodes with the advantages that the run's recipe gives them.

    end: a token to stand for the completion of an episode that failed before its first turn.
    """
    playable = [own for own in episodes if own.turns and not own.stop.failed]
    batch = _batch(run, playable, step) if playable else None
    learned = None
    if batch is not None:
        columns = experience(batch, run.recipe.estimator(batch)).columns
        learned = Experience(batch.encoded, {"advantages": columns["advantages"]})  # the rest is TRL's
    found: dict[int, tuple[Encoded, Tensor, float]] = {}
    if batch is not None and learned is not None:
        kept = zip(batch.encoded, learned.columns["advantages"], batch.reward.tolist(), strict=True)
        found = dict(zip((own.seed for own in batch.episodes), kept, strict=True))  # seeds are one per episode
    rows = [
        _row(own, *found[own.seed])
        if own.seed in found
        else _left_out(run.policy.encoder.encode(own.conversation), end)
        for own in episodes
    ]
    return Hosted(list(episodes), rows, batch, learned)


def _batch(run: Run, episodes: Sequence[Trajectory], step: int) -> Batch | None:
    """As `collect.read` gives it, but without a forward pass where no belief is wanted: TRL makes its own."""
    if "info_gain" in run.recipe.needs:
        return read(run, episodes, step)
    encoded = [run.policy.encoder.encode(own.conversation) for own in episodes]
    played = with_overlong(run, episodes, encoded) if run.recipe.overlong else episodes
    return Batch(played, reward_weights(run.env, run.recipe), step / run.config.steps, encoded)


def _row(episode: Trajectory, encoded: Encoded, advantages: Tensor, reward: float) -> HostedRow:
    first = encoded.decisions[0]
    own = [int(turn != OBSERVED) for turn in encoded.turn[first:]]
    sampled = [value for turn in episode.turns for value in turn.action.logprobs]
    logprobs: list[float] | None = None
    if len(sampled) == sum(own):
        values = iter(sampled)
        logprobs = [next(values) if written else 0.0 for written in own]
    return HostedRow(encoded.ids[:first], encoded.ids[first:], own, logprobs, advantages[first:].tolist(), reward)


def _left_out(encoded: Encoded, end: int) -> HostedRow:
    first = encoded.decisions[0]
    completion = encoded.ids[first:] or [end]  # TRL wants a token in every row
    nothing = [0.0] * len(completion)
    return HostedRow(encoded.ids[:first], completion, [0] * len(completion), nothing, nothing, None)


def check_whole_groups(questions: Sequence[str], size: int) -> None:
    """Raise ValueError unless the rows are groups of `size`, each of one question, one behind the other."""
    wanted = f"wanted each question {size} times in a row, as num_generations says"
    if not questions or len(questions) % size:
        raise ValueError(f"TRL gave a process {len(questions)} rows, which are no whole groups; {wanted}")
    for start in range(0, len(questions), size):
        group = set(questions[start : start + size])
        if len(group) > 1:
            raise ValueError(f"rows {start} to {start + size - 1} are about {', '.join(sorted(group))}; {wanted}")


def check_same_rows(made: dict[str, Tensor], rows: Sequence[HostedRow]) -> None:
    """Raise RuntimeError unless TRL's padded batch holds these very tokens, row for row."""
    for part in ("prompt", "completion"):
        ids, mask = made[f"{part}_ids"], made[f"{part}_mask"].bool()
        ours: list[list[int]] = [getattr(row, f"{part}_ids") for row in rows]
        flat = [token for own in ours for token in own]
        if mask.sum(1).tolist() != [len(own) for own in ours] or ids[mask].tolist() != flat:
            raise RuntimeError(
                f"TRL's batch of {len(ids)} rows does not hold the {part}s of the {len(rows)} episodes played, row for"
                " row; this version of TRL changes what a rollout gives"
            )


def padded_advantages(rows: Sequence[HostedRow], like: Tensor) -> Tensor:
    """(B, C) float32 advantages, padded on the right to TRL's completions `like` (B, C), on their device."""
    values = pad_rows([row.advantages for row in rows], 0.0, torch.float32)
    return torch.nn.functional.pad(values, (0, like.shape[1] - values.shape[1])).to(like.device)
