"""Contract tests for search environments, to inherit: subclass one in a pytest file and say how to make yours.

    from agentgym_ig.envs.testing import EnvContract

    class TestMyEnv(EnvContract):
        def make(self):
            return MyWrapper(gymnasium.make("agentgym_ig/TinyWiki-v0"))

Each test says in its name what every environment owes its users.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import VectorEnv

from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv
from agentgym_ig.envs.wrappers import ChannelWrapper, VectorChannelWrapper, Weight, layers
from agentgym_ig.grammar import GRAMMARS

SEEDS = (0, 1, 2)


def _scripts(env: SearchEnv | SearchVectorEnv) -> list[list[str]]:
    """Actions in the environment's grammar: sensible ones, none that can be read, and searches without end."""
    grammar = GRAMMARS[env.rules.texts.grammar]
    search, answer = grammar.search("who was it"), grammar.answer("nobody")
    return [
        [search, "let me think", grammar.search("and when"), search, answer],
        [answer],
        ["", "<answer>", "\ud800"] * env.rules.max_turns,
        [search] * (env.rules.max_turns + 1),
    ]


def _weights(env: Any) -> dict[str, float]:
    """Channel → its weight now, through all wrappers."""
    channels = [layer for layer in layers(env) if isinstance(layer, ChannelWrapper | VectorChannelWrapper)]
    weights: dict[str, Weight] = {layer.channel.name: layer.weight for layer in channels}
    return {
        name: own() if callable(own) else own for name, own in (weights | dict(env.unwrapped.rules.weights)).items()
    }


class EnvContract:
    """What every `SearchEnv` and everything around one must do. Give `make`."""

    def make(self) -> gymnasium.Env[str, str]:
        """A new environment, always the same; its weighted channels are its reward."""
        raise NotImplementedError("say how to make the environment")

    def _base(self, env: gymnasium.Env[str, str]) -> SearchEnv:
        assert isinstance(env.unwrapped, SearchEnv), f"{env} has no SearchEnv inside"
        return env.unwrapped

    def test_gymnasium_accepts_it(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*different from the unwrapped version")  # a wrapper is meant to be
            check_env(self.make(), skip_render_check=True)

    def test_equal_seeds_give_equal_episodes(self) -> None:
        one, two = self.make(), self.make()
        for seed, script in zip(SEEDS, _scripts(self._base(one)), strict=False):
            assert one.reset(seed=seed)[0] == two.reset(seed=seed)[0]
            for action in script:
                left, right = one.step(action), two.step(action)
                assert left[:4] == right[:4]
                for name in ("rewards", "queries", "retrieved", "stop", "question"):
                    assert left[4][name] == right[4][name]
                if left[2] or left[3]:
                    break
        assert one.reset()[0] == two.reset()[0], "what follows the last seed is drawn from it too"

    def test_every_question_can_be_named(self) -> None:
        env = self.make()
        for question in list(self._base(env).questions)[:20]:
            prompt, info = env.reset(options={"question": question})
            assert info["question"] == question
            assert prompt

    def test_channels_add_up_to_the_reward(self) -> None:
        env = self.make()
        for script in _scripts(self._base(env)):
            env.reset(seed=1)
            for action in script:
                _, reward, terminated, truncated, info = env.step(action)
                weights = _weights(env)
                assert set(info["rewards"]) <= set(weights)
                total = sum(weights[name] * value for name, value in info["rewards"].items())
                assert np.isclose(float(reward), total)
                if terminated or truncated:
                    break

    def test_every_episode_ends_within_its_turns_and_says_why(self) -> None:
        env = self.make()
        base = self._base(env)
        for script in _scripts(base):
            env.reset(seed=2)
            for action in script[: base.rules.max_turns]:
                _, _, terminated, truncated, info = env.step(action)
                assert (info["stop"] is None) == (not (terminated or truncated))
                assert not (terminated and truncated)
                if terminated or truncated:
                    break
            assert terminated or truncated
            try:
                env.step(script[0])
            except ResetNeeded:
                continue
            raise AssertionError("a step after the end must raise ResetNeeded")

    def test_an_action_that_is_no_string_changes_nothing(self) -> None:
        env = self.make()
        env.reset(seed=0)
        for wrong in (None, 3, ["<answer>x</answer>"]):
            try:
                env.step(wrong)  # type: ignore[arg-type]
            except TypeError:
                continue
            raise AssertionError(f"{wrong!r} was taken for an action")
        episode = self._base(env).episode
        assert episode is not None
        assert episode.turn == 0

    def test_gold_stays_out_of_sight(self) -> None:
        env = self.make()
        for question in list(self._base(env).questions.values())[:20]:
            prompt, info = env.reset(options={"question": question.id})
            for passage in question.supporting:
                assert passage not in prompt
                assert passage not in repr(info)


class VectorEnvContract:
    """What every `SearchVectorEnv` and everything around one must do. Give `make`, and `make_single` beside it."""

    def make(self, num_envs: int) -> VectorEnv[Any, Any, Any]:
        """A new vector environment, always the same."""
        raise NotImplementedError("say how to make the vector environment")

    def make_single(self) -> gymnasium.Env[str, str]:
        """The same task as a single environment."""
        raise NotImplementedError("say how to make the single environment")

    def _scripts(self) -> list[list[str]]:
        base = self.make_single().unwrapped
        assert isinstance(base, SearchEnv)
        return _scripts(base)

    def test_each_place_plays_as_a_single_environment_does(self) -> None:
        scripts = self._scripts()
        vector, single = self.make(len(scripts)), self.make_single()
        prompts, infos = vector.reset(seed=7)
        alone: list[list[Any]] = []
        for place, script in enumerate(scripts):
            prompt, info = single.reset(seed=7 + place)
            assert (prompts[place], infos["question"][place]) == (prompt, info["question"])
            steps: list[Any] = []
            for action in script:
                steps.append(single.step(action))
                if steps[-1][2] or steps[-1][3]:
                    break
            alone.append(steps)
        for turn in range(max(map(len, alone))):
            stepped = vector.step([script[min(turn, len(script) - 1)] for script in scripts])
            for place, steps in enumerate(alone):
                self._same(stepped, place, steps[turn] if turn < len(steps) else None)

    def _same(self, stepped: Any, place: int, alone: Any) -> None:
        observations, rewards, terminated, truncated, infos = stepped
        if alone is None:
            assert (observations[place], rewards[place], infos["_stop"][place]) == ("", 0.0, False)
            return
        observation, reward, ended, cut, info = alone
        assert (observations[place], terminated[place], truncated[place]) == (observation, ended, cut)
        assert np.isclose(rewards[place], reward)
        channels = infos["rewards"]
        present = {name for name in channels if not name.startswith("_") and channels[f"_{name}"][place]}
        assert present == set(info["rewards"])
        assert all(np.isclose(channels[name][place], info["rewards"][name]) for name in present)
        for name in ("stop", "queries", "retrieved"):
            assert infos[name][place] == info[name]

    def test_places_can_be_reset_and_stepped_alone(self) -> None:
        vector = self.make(3)
        vector.reset(seed=1)
        search = self._scripts()[0][0]
        vector.step([search, None, None])
        base = vector.unwrapped
        assert isinstance(base, SearchVectorEnv)
        assert [episode and episode.turn for episode in base.episodes] == [1, 0, 0]
        vector.reset(seed=[5], options={"reset_mask": np.array([False, True, False])})  # type: ignore[arg-type]
        assert [episode and episode.turn for episode in base.episodes] == [1, 0, 0]
        single, _ = self.make_single().reset(seed=5)
        assert base.episodes[1] is not None
        assert base.episodes[1].prompt == single

    def test_an_event_loop_gets_the_same(self) -> None:
        one, two = self.make(2), self.make(2)
        one.reset(seed=3)
        two.reset(seed=3)
        for actions in zip(self._scripts()[0][:2], self._scripts()[3][:2], strict=True):
            if not one.unwrapped.active.any():  # type: ignore[attr-defined]
                break
            self._equal(one.step(actions), asyncio.run(two.astep(actions)))  # type: ignore[attr-defined]

    def _equal(self, left: Sequence[Any], right: Sequence[Any]) -> None:
        assert left[0] == right[0]
        for here, there in zip(left[1:4], right[1:4], strict=True):
            assert np.array_equal(here, there)
        assert list(left[4]["stop"]) == list(right[4]["stop"])
