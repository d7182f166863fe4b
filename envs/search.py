"""`SearchEnv` and `SearchVectorEnv`: multi-turn search over any index, as Gymnasium environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from agentgym_ig.envs.episode import Episode, Reply, Rules, weighted
from agentgym_ig.envs.spaces import Prose
from agentgym_ig.errors import SearchFailed
from agentgym_ig.indexes.base import Index
from agentgym_ig.types import Hit, Question, Stop


def questions_by_id(questions: Sequence[Question]) -> dict[str, Question]:
    """Questions by id. Raises ValueError when there is none or an id stands twice."""
    by_id = {question.id: question for question in questions}
    if not by_id:
        raise ValueError("an environment needs at least one question; found none")
    if len(by_id) < len(questions):
        raise ValueError(
            f"{len(questions) - len(by_id)} of {len(questions)} question ids stand twice; make them unique"
        )
    return by_id


def _known(questions: Mapping[str, Question], asked: str) -> Question:
    if asked not in questions:
        some = ", ".join(sorted(questions)[:3])
        raise ValueError(f"no question {asked!r} among {len(questions)}; ids look like: {some}")
    return questions[asked]


def search_and_reply(index: Index, rules: Rules, episodes: Sequence[Episode], actions: Sequence[str]) -> list[Reply]:
    """One turn of several episodes with a single search for all of their queries.

    Raises TypeError for an action that is no string, before any episode has changed, and ValueError for an index
    that does not answer every query.
    """
    for action in actions:
        if not isinstance(action, str):
            raise TypeError(f"the action is a {type(action).__name__}, wanted a string such as '<search>…</search>'")
    asked = [episode.ask(action) for episode, action in zip(episodes, actions, strict=True)]
    queries = [query for own in asked for query in own]
    found: list[list[Hit]] = []
    failed = False
    if queries:
        try:
            found = index.search(queries, rules.top_k)
        except SearchFailed:
            failed = True
    if not failed and len(found) != len(queries):
        raise ValueError(f"the index gave {len(found)} results for {len(queries)} queries; wanted one each")
    results = iter(found)
    return [
        episode.reply(None if failed and own else list(islice(results, len(own))))
        for episode, own in zip(episodes, asked, strict=True)
    ]


class SearchEnv(gymnasium.Env[str, str]):
    """One question an episode: search as often as the budget allows, then answer.

    `reset` gives the prompt and `step` the reply to an action, both as text. The seed, or
    `options={"question": id}`, picks the question. `info` holds `rewards` (this turn's channels, whose weighted
    sum is the reward), `retrieved` (passage ids), `stop` (why the episode ended, or None) and `question` (its id).

    Args:
        index: what is searched; built once and shared by any number of environments.
        questions: what may be asked.
        rules: prompt, budgets, metric and weights.
        render_mode: `ansi` lets `render` return the episode so far as text.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(
        self, index: Index, questions: Sequence[Question], rules: Rules | None = None, render_mode: str | None = None
    ) -> None:
        self.index, self.rules, self.render_mode = index, rules or Rules(), render_mode
        self.questions = questions_by_id(questions)
        self._ids = list(self.questions)
        self.observation_space, self.action_space = Prose(), Prose()
        self.episode: Episode | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode. Raises ValueError for a question id that does not exist."""
        super().reset(seed=seed)
        drawn = self._ids[self.np_random.integers(len(self._ids))]
        question = _known(self.questions, (options or {}).get("question", drawn))
        self.episode = Episode(question, self.rules)
        return self.episode.prompt, {"question": question.id}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one turn. Raises ResetNeeded before the first reset and after the end."""
        if self.episode is None or self.episode.stop is not None:
            raise ResetNeeded("this episode has not begun or is over; call reset() first")
        (reply,) = search_and_reply(self.index, self.rules, [self.episode], [action])
        info = {
            "rewards": dict(reply.rewards),
            "retrieved": reply.retrieved,
            "stop": reply.stop,
            "question": self.episode.question.id,
        }
        terminated = reply.stop is Stop.ANSWERED
        truncated = reply.stop is not None and not terminated
        return reply.observation, weighted(reply.rewards, self.rules.weights), terminated, truncated, info

    def render(self) -> str | None:
        """The episode so far, as text; None without `render_mode="ansi"`."""
        if self.render_mode != "ansi":
            return None
        messages = self.episode.conversation.messages if self.episode else ()
        return "\n".join(f"[{message.role}] {message.text.strip()}" for message in messages)


class SearchVectorEnv(gymnasium.vector.VectorEnv[tuple[str, ...], tuple[str, ...], NDArray[Any]]):
    """N episodes side by side with one `search` call a step for all queries of that step.

    No autoreset: a finished episode stays still, its action is ignored, its reward is 0 and its entry in every
    info is masked out. Infos follow Gymnasium's vector form: `infos["rewards"]["outcome"]` is an (N,) array and
    `infos["rewards"]["_outcome"]` says which entries hold a value.

    `reset(seed)` draws the questions; `options={"questions": ids}` names them, at most N: the places that are
    left over are finished from the start.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}  # noqa: RUF012

    def __init__(self, index: Index, questions: Sequence[Question], num_envs: int, rules: Rules | None = None) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be 1 or more")
        self.index, self.rules, self.num_envs = index, rules or Rules(), num_envs
        self.questions = questions_by_id(questions)
        self._ids = list(self.questions)
        self.single_observation_space, self.single_action_space = Prose(), Prose()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.episodes: list[Episode] = []

    @property
    def active(self) -> NDArray[np.bool_]:
        """(N,) whether each episode is still going on."""
        going = [episode.stop is None for episode in self.episodes]
        return np.array(going + [False] * (self.num_envs - len(going)), bool)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Start N episodes. Raises ValueError for unknown question ids, or more of them than places."""
        asked = (options or {}).get("questions")
        if asked is None:
            asked = self._draw(seed)
        elif len(asked) > self.num_envs:
            raise ValueError(f"{len(asked)} questions for {self.num_envs} places; reset with fewer at a time")
        self.episodes = [Episode(_known(self.questions, question), self.rules) for question in asked]
        prompts = [episode.prompt for episode in self.episodes]
        infos: dict[str, Any] = {}
        for place, question in enumerate(asked):
            infos = self._add_info(infos, {"question": question}, place)
        return tuple(prompts + [""] * (self.num_envs - len(prompts))), infos

    def _draw(self, seed: int | list[int | None] | None) -> list[str]:
        if isinstance(seed, list):
            generators = [np.random.default_rng(own) for own in seed]
        else:
            super().reset(seed=seed)
            generators = [self.np_random] * self.num_envs
        return [self._ids[generator.integers(len(self._ids))] for generator in generators]

    def step(
        self, actions: Sequence[str]
    ) -> tuple[tuple[str, ...], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Take one turn in every episode that is still going on.

        Raises ResetNeeded before the first reset and once all episodes are over, ValueError for another number
        of actions than N.
        """
        places = np.flatnonzero(self.active).tolist()
        if not places:
            raise ResetNeeded("no episode has begun or all are over; call reset() first")
        if len(actions) != self.num_envs:
            raise ValueError(
                f"{len(actions)} actions for {self.num_envs} environments; give one each, '' where finished"
            )
        replies = search_and_reply(
            self.index, self.rules, [self.episodes[i] for i in places], [actions[i] for i in places]
        )
        observations = [""] * self.num_envs
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        infos: dict[str, Any] = {}
        for place, reply in zip(places, replies, strict=True):
            observations[place] = reply.observation
            rewards[place] = weighted(reply.rewards, self.rules.weights)
            terminated[place] = reply.stop is Stop.ANSWERED
            truncated[place] = reply.stop is not None and not terminated[place]
            info = {"rewards": dict(reply.rewards), "retrieved": reply.retrieved, "stop": reply.stop}
            infos = self._add_info(infos, info, place)
        return tuple(observations), rewards, terminated, truncated, infos
