"""`SearchEnv` and `SearchVectorEnv`: multi-turn search over any index, as Gymnasium environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from agentgym_ig.envs.episode import CountTokens, Episode, Reply, Rules, weighted, words
from agentgym_ig.envs.spaces import Prose
from agentgym_ig.envs.terminal import draw
from agentgym_ig.envs.turns import atake_turns, take_turns
from agentgym_ig.indexes.base import Index
from agentgym_ig.types import Action, Question, Stop

VectorStep = tuple[tuple[str, ...], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]
"""Observations, rewards, terminated, truncated, infos: N of each."""


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


def check_known(questions: Mapping[str, Question], asked: str) -> None:
    """Raise ValueError for the id of no question."""
    if asked not in questions:
        some = ", ".join(islice(questions, 3))
        raise ValueError(f"no question {asked!r} among {len(questions)}; ids look like: {some}")


def _check_options(options: Mapping[str, Any] | None, known: set[str]) -> None:
    if strange := set(options or ()) - known:
        raise ValueError(f"unknown reset options {sorted(strange)}; this form takes {sorted(known)}")


def note_error(infos: dict[str, Any], place: int, error: str, num_envs: int) -> None:
    """Say in the infos of a vector environment what failed in a place."""
    infos.setdefault("error", np.full(num_envs, None, object))[place] = error
    infos.setdefault("_error", np.zeros(num_envs, bool))[place] = True


class _Questions:
    """What may be asked, and how a place's next question is drawn."""

    def __init__(self, questions: Sequence[Question], rules: Rules, count_tokens: CountTokens) -> None:
        self.by_id = questions_by_id(questions)
        self.ids = list(self.by_id)
        self.rules, self.count_tokens = rules, count_tokens

    def begin(self, rng: np.random.Generator, seed: int | None, asked: str | None) -> Episode:
        """An episode about the question of that id, or one drawn; its seed is drawn too where none is given."""
        drawn, own = self.ids[rng.integers(len(self.ids))], int(rng.integers(2**62))
        name = drawn if asked is None else asked
        check_known(self.by_id, name)
        return Episode(self.by_id[name], self.rules, own if seed is None else seed, self.count_tokens)


class SearchEnv(gymnasium.Env[str, str]):
    """One question an episode: search as often as the budgets allow, then answer.

    `reset` gives the prompt and `step` the reply to an action, both as text. The seed, or
    `options={"question": id}`, picks the question. `info` holds `rewards` (this turn's channels, whose weighted
    sum is the reward), `queries` and `retrieved` (what was searched, and the ids of the passages shown), `stop`
    (why the episode ended, or None) and `question` (its id).

    An action may also be an `Action`, whose token ids then stand in the episode's conversation.

    Args:
        index: what is searched; built once and shared by any number of environments.
        questions: what may be asked.
        rules: prompt, budgets, metric and weights.
        render_mode: `ansi` lets `render` return the episode so far as text with terminal colours.
        count_tokens: how `Rules.max_observation` is counted; words by default.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(
        self,
        index: Index,
        questions: Sequence[Question],
        rules: Rules | None = None,
        render_mode: str | None = None,
        count_tokens: CountTokens = words,
    ) -> None:
        self.index, self.render_mode = index, render_mode
        self._questions = _Questions(questions, rules or Rules(), count_tokens)
        self.observation_space, self.action_space = Prose(), Prose()
        self.episode: Episode | None = None

    @property
    def questions(self) -> Mapping[str, Question]:
        """All questions by id."""
        return self._questions.by_id

    @property
    def rules(self) -> Rules:
        """What holds for every episode."""
        return self._questions.rules

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode. Raises ValueError for a question id that does not exist."""
        super().reset(seed=seed)
        _check_options(options, {"question"})
        self.episode = self._questions.begin(self.np_random, seed, (options or {}).get("question"))
        return self.episode.prompt, {"question": self.episode.question.id}

    def step(self, action: str | Action) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one turn. Raises ResetNeeded before the first reset and after the end."""
        if self.episode is None or self.episode.stop is not None:
            raise ResetNeeded("this episode has not begun or is over; call reset() first")
        (reply,) = take_turns(self.index, self.rules.top_k, [self.episode], [action])
        info = {
            "rewards": reply.rewards,
            "queries": reply.queries,
            "retrieved": reply.retrieved,
            "stop": reply.stop,
            "question": self.episode.question.id,
        }
        if self.episode.error is not None:
            info["error"] = self.episode.error
        terminated = reply.stop is Stop.ANSWERED
        truncated = reply.stop is not None and not terminated
        return reply.observation, weighted(reply.rewards, self.rules.weights), terminated, truncated, info

    def render(self) -> str | None:
        """The episode so far, for a terminal; None without `render_mode="ansi"`."""
        return draw(self.episode) if self.render_mode == "ansi" else None


class SearchVectorEnv(gymnasium.vector.VectorEnv[tuple[str, ...], tuple[str, ...], NDArray[Any]]):
    """N episodes side by side with one `search` call a step for all queries of that step.

    No autoreset: a finished episode stays still, its action is ignored, its reward is 0 and its entry in every
    info is masked out. An action of None leaves a place as it is, so steps may be taken for some places only, and
    for different places from several threads or tasks at once. Infos follow Gymnasium's vector form:
    `infos["rewards"]["outcome"]` is an (N,) array and `infos["rewards"]["_outcome"]` says which entries hold a value.

    `reset(seed)` draws the questions: place i gets what `SearchEnv` draws from `seed + i`.
    `options={"questions": ids}` names them, at most one a place: the places that are left over are finished from
    the start. `options={"reset_mask": (N,) bool}` resets those places alone, as in Gymnasium's own vector
    environments; ids and seeds are then for them, in order.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        index: Index,
        questions: Sequence[Question],
        num_envs: int,
        rules: Rules | None = None,
        count_tokens: CountTokens = words,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be 1 or more")
        self.index, self.num_envs = index, num_envs
        self._questions = _Questions(questions, rules or Rules(), count_tokens)
        self.single_observation_space, self.single_action_space = Prose(), Prose()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.episodes: list[Episode | None] = [None] * num_envs
        self._generators = [np.random.default_rng() for _ in range(num_envs)]

    @property
    def questions(self) -> Mapping[str, Question]:
        """All questions by id."""
        return self._questions.by_id

    @property
    def rules(self) -> Rules:
        """What holds for every episode."""
        return self._questions.rules

    @property
    def active(self) -> NDArray[np.bool_]:
        """(N,) whether each episode is still going on."""
        return np.array([episode is not None and episode.stop is None for episode in self.episodes], bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Start N episodes, or those of `reset_mask`; the observations of the others are empty.

        Raises ValueError for unknown question ids, and for more of them, or other numbers of seeds, than places.
        """
        options = options or {}
        _check_options(options, {"questions", "reset_mask"})
        places = np.flatnonzero(self._mask(options.get("reset_mask"))).tolist()
        given = options.get("questions")
        asked: list[str | None] = [None] * len(places) if given is None else list(given)
        if len(asked) > len(places):
            raise ValueError(f"{len(asked)} questions for {len(places)} places; reset with fewer at a time")
        seeds = self._seeds(seed, places[: len(asked)])
        begun: dict[int, Episode] = {}
        for place, own, name in zip(places, seeds, asked, strict=False):
            if own is not None:
                self._generators[place] = np_random(own)[0]
            begun[place] = self._questions.begin(self._generators[place], own, name)
        for place in places:
            self.episodes[place] = begun.get(place)
        prompts = tuple(begun[place].prompt if place in begun else "" for place in range(self.num_envs))
        ids = self._column({place: episode.question.id for place, episode in begun.items()})
        return prompts, {"question": ids, "_question": self._which(list(begun))}

    def _mask(self, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        if mask is None:
            return np.ones(self.num_envs, bool)
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ValueError(f"reset_mask is {mask.dtype} {mask.shape}, wanted bool ({self.num_envs},)")
        return mask

    def _seeds(self, seed: int | Sequence[int | None] | None, places: Sequence[int]) -> list[int | None]:
        if seed is None:
            return [None] * len(places)
        if isinstance(seed, int | np.integer):
            return [int(seed) + place for place in places]
        if len(seed) < len(places):
            raise ValueError(f"{len(seed)} seeds for {len(places)} episodes; give one each")
        return [None if own is None else int(own) for own in seed[: len(places)]]

    def step(self, actions: Sequence[str | Action | None]) -> VectorStep:
        """Take one turn in every episode that is still going on and has an action.

        Raises ResetNeeded before the first reset and once all episodes are over, ValueError for another number
        of actions than N, and TypeError for one that is no string, before any episode has changed.
        """
        places, episodes, said = self._stepped(actions)
        return self._results(places, take_turns(self.index, self.rules.top_k, episodes, said))

    async def astep(self, actions: Sequence[str | Action | None]) -> VectorStep:
        """`step` that does not block the event loop while the index searches."""
        places, episodes, said = self._stepped(actions)
        return self._results(places, await atake_turns(self.index, self.rules.top_k, episodes, said))

    def _stepped(self, actions: Sequence[str | Action | None]) -> tuple[list[int], list[Episode], list[str | Action]]:
        """The places that take a turn, their episodes and their actions."""
        if len(actions) != self.num_envs:
            raise ValueError(
                f"{len(actions)} actions for {self.num_envs} environments; give one each, '' where finished"
            )
        going = [(place, episode) for place, episode in enumerate(self.episodes) if episode and episode.stop is None]
        if not going:
            raise ResetNeeded("no episode has begun or all are over; call reset() first")
        moves = [(place, episode, said) for place, episode in going if (said := actions[place]) is not None]
        return [place for place, _, _ in moves], [episode for _, episode, _ in moves], [said for _, _, said in moves]

    def _results(self, places: Sequence[int], replies: Sequence[Reply]) -> VectorStep:
        by_place = dict(zip(places, replies, strict=True))
        observations = tuple(by_place[i].observation if i in by_place else "" for i in range(self.num_envs))
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for place, reply in by_place.items():
            rewards[place] = weighted(reply.rewards, self.rules.weights)
            terminated[place] = reply.stop is Stop.ANSWERED
            truncated[place] = reply.stop is not None and not terminated[place]
        stepped = self._which(places)
        infos: dict[str, Any] = {"rewards": self._channels(by_place), "_rewards": stepped}
        for name in ("queries", "retrieved", "stop"):
            infos[name] = self._column({place: getattr(reply, name) for place, reply in by_place.items()})
            infos[f"_{name}"] = stepped
        for place in places:
            episode = self.episodes[place]
            if episode is not None and episode.error is not None:
                note_error(infos, place, episode.error, self.num_envs)
        return observations, rewards, terminated, truncated, infos

    def _channels(self, replies: Mapping[int, Reply]) -> dict[str, NDArray[Any]]:
        channels: dict[str, NDArray[Any]] = {}
        for name in self.rules.weights:
            channels[name], channels[f"_{name}"] = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        for place, reply in replies.items():
            for name, value in reply.rewards.items():
                channels[name][place], channels[f"_{name}"][place] = value, True
        return channels

    def _column(self, values: Mapping[int, object]) -> NDArray[np.object_]:
        column = np.full(self.num_envs, None, object)
        for place, value in values.items():
            column[place] = value
        return column

    def _which(self, places: Sequence[int]) -> NDArray[np.bool_]:
        which = np.zeros(self.num_envs, bool)
        which[list(places)] = True
        return which
