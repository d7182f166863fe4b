"""Information gain as a reward channel (IGPO, arXiv 2510.14967): a wrapper for either kind of search environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorWrapper
from numpy.typing import NDArray

from agentgym_ig.belief import information_gains
from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv
from agentgym_ig.types import Conversation

Beliefs = Callable[[Sequence[Conversation], Sequence[Sequence[str]]], Sequence[Sequence[float]]]
"""Conversations and accepted answers → per conversation the mean log-probability (nats) of each answer.

`agentgym_ig.trainers.Scorer.beliefs` is one.
"""


def _read(beliefs: Beliefs, conversations: list[Conversation], answers: list[tuple[str, ...]]) -> list[float]:
    """The belief in the first accepted answer. Raises ValueError for one that is not finite."""
    values = [own[0] for own in beliefs(conversations, [own[:1] for own in answers])]
    for value, own in zip(values, answers, strict=True):
        if not np.isfinite(value):
            raise ValueError(
                f"the scorer gave {value} for the answer {own[0]!r}; a belief must be a finite number of nats"
            )
    return values


class InfoGain(gymnasium.Wrapper[str, str, str, str]):
    """Adds the channel `info_gain` to `SearchEnv`: how much the turn's passages raised the belief in the answer.

    Read from the policy being trained, with the answer forced after each reply. The answering turn, and one
    whose search failed, has no gain. `weight` is what the channel counts in the reward; `log` takes
    differences of log-probabilities (the paper's v2) instead of probabilities (v1).
    """

    def __init__(
        self, env: gymnasium.Env[str, str], beliefs: Beliefs, *, weight: float = 1.0, log: bool = True
    ) -> None:
        super().__init__(env)
        if not isinstance(env.unwrapped, SearchEnv):
            raise TypeError(f"InfoGain wraps a SearchEnv, not a {type(env.unwrapped).__name__}")
        self.search, self.beliefs, self.weight, self.log = env.unwrapped, beliefs, weight, log
        self._belief = 0.0

    def _now(self) -> float:
        episode = self.search.episode
        assert episode is not None
        return _read(self.beliefs, [episode.conversation], [episode.question.answers])[0]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Reset, and read the belief that the question alone gives."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._belief = self._now()
        return observation, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Step, and add the gain of the reply."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            return observation, float(reward), terminated, truncated, info
        before, self._belief = self._belief, self._now()
        (gain,) = information_gains([before, self._belief], log=self.log)
        info["rewards"] = info["rewards"] | {"info_gain": gain}
        return observation, float(reward) + self.weight * gain, terminated, truncated, info


class VectorInfoGain(VectorWrapper):
    """`InfoGain` for `SearchVectorEnv`: one call of the scorer a step for all episodes that go on."""

    def __init__(self, env: SearchVectorEnv, beliefs: Beliefs, *, weight: float = 1.0, log: bool = True) -> None:
        super().__init__(env)
        self.search, self.beliefs, self.weight, self.log = env, beliefs, weight, log
        self._beliefs: dict[int, float] = {}

    def _now(self) -> dict[int, float]:
        places = np.flatnonzero(self.search.active).tolist()
        episodes = [self.search.episodes[place] for place in places]
        if not episodes:
            return {}
        values = _read(self.beliefs, [e.conversation for e in episodes], [e.question.answers for e in episodes])
        return dict(zip(places, values, strict=True))

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset, and read the beliefs that the questions alone give."""
        observations, infos = self.search.reset(seed=seed, options=options)
        self._beliefs = self._now()
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Step, and add the gains of the replies."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        gains = np.zeros(self.search.num_envs)
        present = np.zeros(self.search.num_envs, bool)
        before, self._beliefs = self._beliefs, self._now()
        for place, after in self._beliefs.items():
            (gains[place],) = information_gains([before[place], after], log=self.log)
            present[place] = True
        infos["rewards"] = infos["rewards"] | {"info_gain": gains, "_info_gain": present}
        return observations, rewards + self.weight * gains, terminated, truncated, infos
