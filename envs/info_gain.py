"""Information gain as a reward channel (IGPO, arXiv 2510.14967)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from agentgym_ig.belief import ALIAS_POLICIES, combine_aliases
from agentgym_ig.envs.channels import Channel
from agentgym_ig.envs.episode import Episode
from agentgym_ig.types import Conversation

Beliefs = Callable[[Sequence[Conversation], Sequence[Sequence[str]]], Sequence[Sequence[float]]]
"""Conversations and accepted answers → per conversation the mean log-probability (nats) of each answer.

`beliefs` of `agentgym_ig.trainers.Scorer`, of its `OnlineScorer` and of `agentgym_ig.remote.ServerScorer` are such.
"""


class InfoGain(Channel):
    """How much the turn's reply raised the policy's belief in the gold answer.

    Read from the policy being trained, with the answer forced after each reply. The question alone is the baseline;
    the turn that ends the episode has no gain.

    Args:
        beliefs: the scorer.
        log: differences of log-probabilities (the paper's v2, in nats) instead of probabilities (v1).
        aliases: which of the accepted answers the belief is about, one of `agentgym_ig.belief.ALIAS_POLICIES`.
    """

    name = "info_gain"
    about = "reply"

    def __init__(self, beliefs: Beliefs, *, log: bool = True, aliases: str = "first") -> None:
        if aliases not in ALIAS_POLICIES:
            raise ValueError(f"unknown alias policy {aliases!r}; choose one of {', '.join(ALIAS_POLICIES)}")
        self.beliefs, self.log, self.aliases = beliefs, log, aliases

    def _read(self, episodes: Sequence[Episode]) -> list[float]:
        """The value of the answer now: nats, or a probability."""
        answers = [episode.question.answers for episode in episodes]
        answers = [own[:1] if self.aliases == "first" else own for own in answers]
        read = self.beliefs([episode.conversation for episode in episodes], answers)
        if len(read) != len(episodes):
            raise ValueError(f"the scorer gave {len(read)} beliefs for {len(episodes)} conversations; give one each")
        return [self._value(own, asked, episode) for own, asked, episode in zip(read, answers, episodes, strict=True)]

    def _value(self, beliefs: Sequence[float], answers: Sequence[str], episode: Episode) -> float:
        if len(beliefs) != len(answers):
            raise ValueError(
                f"the scorer gave {len(beliefs)} beliefs for the {len(answers)} answers of {episode.question.id!r};"
                " give one each"
            )
        try:
            belief = combine_aliases([float(own) for own in beliefs], self.aliases)
            return belief if self.log else math.exp(belief)
        except (TypeError, ValueError, OverflowError):  # no number, or far too large a one: the episode has failed
            return math.nan

    def begin(self, episodes: Sequence[Episode]) -> None:
        """Read the baselines."""
        for episode, value in zip(episodes, self._read(episodes), strict=True):
            episode.memory[self.name] = value

    def values(self, episodes: Sequence[Episode]) -> list[float | None]:
        """See `Channel.values`. Raises ValueError for an episode that began before the channel was added."""
        going = [episode for episode in episodes if episode.stop is None]
        if any(self.name not in episode.memory for episode in going):
            raise ValueError(f"channel {self.name!r} was added in the middle of an episode; call reset() first")
        gains: dict[Episode, float] = {}
        for episode, after in zip(going, self._read(going) if going else [], strict=True):
            gains[episode] = after - episode.memory[self.name]
            episode.memory[self.name] = after
        return [gains.get(episode) for episode in episodes]
