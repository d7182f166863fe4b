"""A batch on its way through a step: `Batch` is what an estimator sees, `Experience` what is learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agentgym_ig.answers import score
from agentgym_ig.lm.encode import Encoded
from agentgym_ig.trainers.batch import TokenBatch, pad
from agentgym_ig.trainers.engines import importance_weights
from agentgym_ig.types import Trajectory, Turn


@dataclass(frozen=True, slots=True)
class Batch:
    """B episodes as an estimator sees them. All tensors that it gives are on the CPU, numbers in float64.

    weights: channel → what it counts in an episode's reward; the others are left to the estimator.
    progress: share of the training that is done, from 0 to 1.
    encoded: the episodes' tokens. old: the (T,) log-probabilities of the policy's tokens as they were sampled;
    reference: those under the reference model; values: what the critic expected before each token. The last two are
    empty where the recipe asks for none. engine: the log-probabilities that the engine gave as it sampled, nan where it
    gave none.

    Raises ValueError for no episode at all and for one without a turn.
    """

    episodes: Sequence[Trajectory]
    weights: Mapping[str, float] = field(default_factory=lambda: {"outcome": 1.0})
    progress: float = 0.0
    encoded: Sequence[Encoded] = ()
    old: Sequence[Tensor] = ()
    reference: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()
    engine: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        if not self.episodes:
            raise ValueError("a batch of no episodes has no advantages")
        empty = [episode.question.id for episode in self.episodes if not episode.turns]
        if empty:
            raise ValueError(f"episodes of {empty} have no turn; leave them out")

    @property
    def group(self) -> Tensor:
        """(B,) long."""
        return torch.tensor([episode.group for episode in self.episodes])

    @property
    def last(self) -> Tensor:
        """(B,) long: index of each episode's last turn."""
        return torch.tensor([len(episode.turns) - 1 for episode in self.episodes])

    @property
    def success(self) -> Tensor:
        """(B,) bool: answered with one of the accepted answers, by exact match."""
        exact = [score("em", episode.answer, episode.question.answers) for episode in self.episodes]
        return torch.tensor(exact) == 1

    @property
    def rewards(self) -> Tensor:
        """(B, K) the weighted channels of each turn; 0 after the last turn."""

        def reward(turn: Turn) -> float:
            return sum(self.weights.get(name, 0.0) * value for name, value in turn.rewards.items())

        rows = [torch.tensor([reward(turn) for turn in own.turns], dtype=torch.float64) for own in self.episodes]
        return pad_sequence(rows, batch_first=True)

    @property
    def reward(self) -> Tensor:
        """(B,) an episode's whole reward: the sum of `rewards` over its turns."""
        return self.rewards.sum(1)

    def channel(self, name: str) -> tuple[Tensor, Tensor]:
        """(B, K) the channel's values, 0 where there is none, and (B, K) bool where there is one."""
        given = [own.channel(name) for own in self.episodes]
        values = [torch.tensor([value or 0.0 for value in own], dtype=torch.float64) for own in given]
        has = [torch.tensor([value is not None for value in own]) for own in given]
        return pad_sequence(values, batch_first=True), pad_sequence(has, batch_first=True)

    def only(self, chosen: Tensor) -> Batch | None:
        """The episodes that are chosen, (B,) bool; None for none of them."""
        rows = chosen.nonzero()[:, 0].tolist()
        columns: dict[str, Any] = {
            name: [own[row] for row in rows] for name in _PER_EPISODE if (own := getattr(self, name))
        }
        return replace(self, **columns) if rows else None

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """All episodes of several batches of one step."""
        columns: dict[str, Any] = {
            name: [row for part in parts for row in getattr(part, name)] for name in _PER_EPISODE
        }
        return replace(parts[0], **columns)

    @property
    def tokens(self) -> TokenBatch:
        """The episodes' tokens padded to (B, T)."""
        return pad(self.encoded)

    def column(self, name: str) -> Tensor:
        """(B, T) `old`, `reference` or `values`, padded. Raises ValueError where the batch has none."""
        rows: Sequence[Tensor] = getattr(self, name)
        if not rows:
            raise ValueError(f"the batch has no {name}; the recipe must ask for it")
        return pad_sequence([row.cpu().double() for row in rows], batch_first=True)


_PER_EPISODE = ("episodes", "encoded", "old", "reference", "values", "engine")


@dataclass(frozen=True, slots=True)
class TokenAdvantages:
    """Advantages of an estimator that tells a turn's tokens apart: (B, T), as the batch's tokens are padded, and for a
    critic the (B, T) returns that it is to learn.
    """

    advantages: Tensor
    returns: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Experience:
    """What an update learns from: encoded episodes, and per episode a (T,) float32 tensor for each column: `old`,
    `advantages`, and where they are used `reference`, `values`, `returns` and `importance`. Only what stands at the
    policy's tokens is read.
    """

    encoded: Sequence[Encoded]
    columns: Mapping[str, Sequence[Tensor]]

    def rows(self, chosen: Sequence[int], device: torch.device | str) -> tuple[TokenBatch, dict[str, Tensor]]:
        """Some of the episodes: their tokens, and each column padded to (B, T)."""
        batch = pad([self.encoded[row] for row in chosen], device)
        columns = {
            name: pad_sequence([own[row] for row in chosen], batch_first=True).to(device)
            for name, own in self.columns.items()
        }
        return batch, columns

    @staticmethod
    def joined(parts: Sequence[Experience]) -> Experience:
        """All episodes of several batches, which have the same columns."""
        columns = {name: [row for part in parts for row in part.columns[name]] for name in parts[0].columns}
        return Experience([own for part in parts for own in part.encoded], columns)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as flat tensors, for a file; `from_tensors` reads them."""
        flat = {name: torch.cat(list(own)) for name, own in self.columns.items()}
        for name in ("ids", "turn", "decisions"):
            own = [getattr(each, name) for each in self.encoded]
            flat[f"{name}.length"] = torch.tensor([len(row) for row in own])
            flat[name] = torch.tensor([value for row in own for value in row], dtype=torch.long)
        return flat

    @staticmethod
    def from_tensors(flat: Mapping[str, Tensor]) -> Experience:
        """What `tensors` was called on."""
        lengths = {name: flat[f"{name}.length"].tolist() for name in ("ids", "turn", "decisions")}
        rows = [[row.tolist() for row in flat[name].split(own)] for name, own in lengths.items()]
        columns = {
            name: list(values.split(lengths["ids"]))
            for name, values in flat.items()
            if name not in lengths and not name.endswith(".length")
        }
        return Experience([Encoded(*own) for own in zip(*rows, strict=True)], columns)


def experience(batch: Batch, advantages: Tensor | TokenAdvantages, *, importance_cap: float = 0.0) -> Experience:
    """A batch with its advantages, (B, K) per turn or per token, ready to be learned from.

    With a cap above 0 its tokens have truncated importance weights, see `engines.importance_weights`.

    Raises ValueError for advantages of another shape, or that are not finite at a token of the policy, and where a
    critic has nothing to learn.
    """
    tokens = batch.tokens
    given = advantages if isinstance(advantages, TokenAdvantages) else TokenAdvantages(_spread(tokens, advantages))
    columns = {"old": batch.old, "advantages": _unpad(given.advantages, tokens)}
    if batch.values and given.returns is None:
        raise ValueError("a critic is trained, but the estimator gave no returns; wanted TokenAdvantages with both")
    if batch.reference:
        columns["reference"] = batch.reference
    if given.returns is not None:
        columns |= {"values": batch.values, "returns": _unpad(given.returns, tokens)}
    if importance_cap:
        rows = zip(batch.old, batch.engine, batch.encoded, strict=True)
        columns["importance"] = [importance_weights(*row, importance_cap) for row in rows]
    return Experience(batch.encoded, {name: [row.float().cpu() for row in own] for name, own in columns.items()})


def _spread(tokens: TokenBatch, per_turn: Tensor) -> Tensor:
    turns = int(tokens.turn.max()) + 1
    if per_turn.dim() != 2 or len(per_turn) != len(tokens.ids) or per_turn.shape[1] < turns:
        raise ValueError(
            f"the estimator gave {tuple(per_turn.shape)}; wanted one advantage per turn, ({len(tokens.ids)}, {turns})"
        )
    return tokens.spread(per_turn)


def _unpad(values: Tensor, tokens: TokenBatch) -> list[Tensor]:
    if values.shape != tokens.ids.shape:
        raise ValueError(f"the estimator gave {tuple(values.shape)}; wanted one value per token, {tokens.ids.shape}")
    if not torch.isfinite(values[tokens.sampled]).all():
        raise ValueError("an advantage is not finite; an estimator must give 0 where it has none")
    return [row[: int(own.sum())] for row, own in zip(values, tokens.real, strict=True)]
