"""Channels around environments: the Gymnasium wrappers, single and vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, overload

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.wrappers import Autoreset, TimeLimit
from numpy.typing import NDArray

from agentgym_ig.envs.channels import Channel, failed_reading
from agentgym_ig.envs.episode import Episode
from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv, VectorStep, note_error
from agentgym_ig.types import Action

Weight = float | Callable[[], float]
"""What a channel counts in the reward; a function is asked at every step, for schedules."""


def _now(weight: Weight) -> float:
    return weight() if callable(weight) else weight


def read_channel(channel: Channel, episodes: Sequence[Episode]) -> list[float | None]:
    """The channel's values for episodes that have just taken a turn.

    An episode whose value is not finite is ended as failed, alone, and has none.
    """
    reading = [episode for episode in episodes if episode.stop is None or not episode.stop.failed]
    given: list[Any] = list(channel.values(reading)) if reading else []  # it may be anything
    if len(given) != len(reading):
        raise ValueError(f"channel {channel.name!r} gave {len(given)} values for {len(reading)} episodes")
    values: dict[Episode, float] = {}
    for episode, value in zip(reading, given, strict=True):
        if value is None:
            continue
        if isinstance(value, Real) and math.isfinite(value):
            values[episode] = float(value)
        else:
            episode.fail(failed_reading(channel, episode, value))
    return [values.get(episode) for episode in episodes]


def layers(env: Any) -> Iterator[Any]:
    """The wrappers around an environment, from the outermost in."""
    while env is not env.unwrapped:
        yield env
        env = env.env


def channels_of(env: Any) -> list[Channel]:
    """The channels around an environment, from the outermost in."""
    return [layer.channel for layer in layers(env) if isinstance(layer, ChannelWrapper | VectorChannelWrapper)]


def _attach(channel: Channel, env: Any, kind: type[SearchEnv] | type[SearchVectorEnv]) -> None:
    search = env.unwrapped
    if not isinstance(search, kind):
        raise TypeError(f"a channel goes around a {kind.__name__}, not a {type(search).__name__}")
    for layer in layers(env):
        if isinstance(layer, TimeLimit | Autoreset):
            raise TypeError(
                f"{type(layer).__name__} hides where an episode ends from a channel around it; put it outermost"
                " (and see Rules.max_turns)"
            )
    if not getattr(channel, "name", ""):
        raise ValueError(f"{type(channel).__name__} has no name; set the attribute `name`")
    if channel.name in {*search.rules.weights, *(other.name for other in channels_of(env))}:
        raise ValueError(f"there is a channel {channel.name!r} already; give one of the two another name")
    channel.attach(search)


def _inner(wrapper: Any, name: str) -> Any:
    if name.startswith("_") or "env" not in vars(wrapper):  # nothing is inside yet while a copy is being made
        raise AttributeError(f"{type(wrapper).__name__} has no attribute {name!r}")
    return getattr(wrapper.env, name)


class ChannelWrapper(gymnasium.Wrapper[str, str, str, str]):
    """A channel around a `SearchEnv`, or around one that has others already.

    Raises TypeError around any other environment, and around a `TimeLimit` or `Autoreset`, and ValueError for a channel
    without a name or with one that is taken. A value that is not finite truncates the episode: `info["stop"]` is
    `scoring_failed` and `info["error"]` says what to mend.
    """

    def __init__(self, env: gymnasium.Env[str, str], channel: Channel, weight: Weight = 1.0) -> None:
        super().__init__(env)
        _attach(channel, env, SearchEnv)
        self.channel, self.weight = channel, weight

    def __getattr__(self, name: str) -> Any:
        """What the environment inside has beyond Gymnasium's own: `questions`, `rules`, `index`, `episode`."""
        return _inner(self, name)

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
        (value,) = read_channel(self.channel, [episode])
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

    def __getattr__(self, name: str) -> Any:
        """What the environment inside has beyond Gymnasium's own: `questions`, `rules`, `episodes`, `active`."""
        return _inner(self, name)

    def _episodes(self, which: NDArray[np.bool_]) -> dict[int, Episode]:
        assert isinstance(self.unwrapped, SearchVectorEnv)
        episodes = self.unwrapped.episodes
        return {place: own for place in np.flatnonzero(which).tolist() if (own := episodes[place]) is not None}

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
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
        inner = getattr(self.env, "astep", None)
        if inner is None:
            raise TypeError(
                f"{type(self.env).__name__} inside has no astep; put it outside of the channels, or use step"
            )
        return self._add(await inner(actions))

    def _add(self, stepped: VectorStep) -> VectorStep:
        observations, rewards, terminated, truncated, infos = stepped
        episodes = self._episodes(infos["_stop"])
        values, present = np.zeros(len(rewards)), np.zeros(len(rewards), bool)
        for place, value in zip(episodes, read_channel(self.channel, list(episodes.values())), strict=True):
            if value is not None:
                values[place], present[place] = value, True
        infos["rewards"] |= {self.channel.name: values, f"_{self.channel.name}": present}
        for place, episode in episodes.items():
            if episode.error is not None:
                terminated[place], truncated[place] = False, True
                infos["stop"][place] = episode.stop
                note_error(infos, place, episode.error, self.num_envs)
        paid = np.where(present, _now(self.weight) * values, 0.0)
        return observations, rewards + paid, terminated, truncated, infos


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
