"""Channels around environments: the Gymnasium wrappers, single and vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray

from agentgym_ig.envs.channels import Channel, failed_reading
from agentgym_ig.envs.episode import Episode
from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv, VectorStep
from agentgym_ig.types import Action

Weight = float | Callable[[], float]
"""What a channel counts in the reward; a function is asked at every step, for schedules."""


def _now(weight: Weight) -> float:
    return weight() if callable(weight) else weight


def _read(channel: Channel, episodes: Sequence[Episode]) -> list[float | None]:
    """The channel's values; an episode whose value is not finite is ended as failed, alone, and has none."""
    reading = [episode for episode in episodes if episode.stop is None or not episode.stop.failed]
    given = list(channel.values(reading)) if reading else []
    if len(given) != len(reading):
        raise ValueError(f"channel {channel.name!r} gave {len(given)} values for {len(reading)} episodes")
    for episode, value in zip(reading, given, strict=True):
        if value is not None and not math.isfinite(value):
            episode.fail(failed_reading(channel, episode, value))
    values = {id(episode): value for episode, value in zip(reading, given, strict=True) if episode.error is None}
    return [values.get(id(episode)) for episode in episodes]


def _attach(channel: Channel, env: Any, kind: type[SearchEnv] | type[SearchVectorEnv]) -> None:
    inner, search = env, env.unwrapped
    if not isinstance(search, kind):
        raise TypeError(f"a channel goes around a {kind.__name__}, not a {type(search).__name__}")
    taken = set(search.rules.weights)
    while inner is not search:
        if isinstance(inner, ChannelWrapper | VectorChannelWrapper):
            taken.add(inner.channel.name)
        inner = inner.env
    if channel.name in taken:
        raise ValueError(f"there is a channel {channel.name!r} already; give one of the two another name")
    channel.attach(search)


class ChannelWrapper(gymnasium.Wrapper[str, str, str, str]):
    """A channel around a `SearchEnv`, or around one that has others already.

    Raises TypeError around any other environment and ValueError for a second channel of the same name. A value that
    is not finite truncates the episode: `info["stop"]` is `scoring_failed` and `info["error"]` says what to mend.
    """

    def __init__(self, env: gymnasium.Env[str, str], channel: Channel, weight: Weight = 1.0) -> None:
        super().__init__(env)
        _attach(channel, env, SearchEnv)
        self.channel, self.weight = channel, weight

    def _episode(self) -> Episode:
        assert isinstance(self.unwrapped, SearchEnv)
        assert self.unwrapped.episode is not None
        return self.unwrapped.episode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Reset, and let the channel see the episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.channel.begin([self._episode()])
        return observation, info

    def step(self, action: str | Action) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Step, and add the channel's value."""
        observation, reward, terminated, truncated, info = self.env.step(action)  # type: ignore[arg-type]
        episode = self._episode()
        (value,) = _read(self.channel, [episode])
        if value is not None:
            info["rewards"][self.channel.name] = value
            reward = float(reward) + _now(self.weight) * value
        if episode.error is not None:
            info |= {"stop": episode.stop, "error": episode.error}
            terminated, truncated = False, True
        return observation, float(reward), terminated, truncated, info


class VectorChannelWrapper(
    VectorWrapper[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...], NDArray[Any]]
):
    """A channel around a `SearchVectorEnv`, asked once a step for all episodes that took a turn.

    Errors are those of `ChannelWrapper`; an episode that fails leaves the others alone.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], channel: Channel, weight: Weight = 1.0) -> None:
        super().__init__(env)
        _attach(channel, env, SearchVectorEnv)
        self.channel, self.weight = channel, weight

    def _episodes(self, which: NDArray[np.bool_]) -> dict[int, Episode]:
        assert isinstance(self.unwrapped, SearchVectorEnv)
        episodes = self.unwrapped.episodes
        return {place: own for place in np.flatnonzero(which).tolist() if (own := episodes[place]) is not None}

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset, and let the channel see the episodes that began."""
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        begun = self._episodes(infos["_question"])
        if begun:
            self.channel.begin(list(begun.values()))
        return observations, infos

    def step(self, actions: Any) -> Any:
        """Step, and add the channel's values."""
        return self._add(self.env.step(actions))

    async def astep(self, actions: Any) -> VectorStep:
        """`step` that does not block the event loop while the index searches."""
        return self._add(await self.env.astep(actions))  # type: ignore[attr-defined]  # all it can go around have it

    def _add(self, stepped: VectorStep) -> VectorStep:
        observations, rewards, terminated, truncated, infos = stepped
        episodes = self._episodes(infos["_stop"])
        values, present = np.zeros(len(rewards)), np.zeros(len(rewards), bool)
        for place, value in zip(episodes, _read(self.channel, list(episodes.values())), strict=True):
            if value is not None:
                values[place], present[place] = value, True
        infos["rewards"] |= {self.channel.name: values, f"_{self.channel.name}": present}
        for place, episode in episodes.items():
            if episode.error is not None:
                terminated[place], truncated[place] = False, True
                infos["stop"][place] = episode.stop
                self._note(infos, place, episode.error)
        return observations, rewards + _now(self.weight) * values, terminated, truncated, infos

    def _note(self, infos: dict[str, Any], place: int, error: str) -> None:
        infos.setdefault("error", np.full(self.num_envs, None, object))[place] = error
        infos.setdefault("_error", np.zeros(self.num_envs, bool))[place] = True


@overload
def add_channel(env: gymnasium.Env[Any, Any], channel: Channel, *, weight: Weight = 1.0) -> ChannelWrapper: ...
@overload
def add_channel(env: VectorEnv[Any, Any, Any], channel: Channel, *, weight: Weight = 1.0) -> VectorChannelWrapper: ...
def add_channel(
    env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any], channel: Channel, *, weight: Weight = 1.0
) -> ChannelWrapper | VectorChannelWrapper:
    """The environment with one more channel. `weight` is what the channel counts in the reward."""
    if isinstance(env, VectorEnv):
        return VectorChannelWrapper(env, channel, weight)
    return ChannelWrapper(env, channel, weight)
