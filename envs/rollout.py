"""Episodes played: any policy in a vector environment, recorded as trajectories."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agentgym_ig.envs.episode import Episode
from agentgym_ig.envs.search import SearchVectorEnv, VectorStep, check_known
from agentgym_ig.envs.wrappers import VectorChannelWrapper, channels_of, read_channel
from agentgym_ig.errors import CorpusError
from agentgym_ig.policies import Policy, session_of
from agentgym_ig.records import EpisodeLog
from agentgym_ig.types import Action, Question, Trajectory, Turn

VectorSearch = SearchVectorEnv | VectorChannelWrapper


@dataclass(frozen=True, slots=True)
class Start:
    """One episode to play: the question's id, the group it belongs to, and the seed of all its random draws."""

    question: str
    group: int
    seed: int


def prompts_of(env: VectorSearch) -> dict[str, Question]:
    """The environment's first user message for each of its questions, for policies that act by question.

    Of questions with equal texts it is the last.
    """
    search = _base(env)
    texts, turns = search.rules.texts, search.rules.max_turns
    return {texts.opening(own.text, turns)[-1].text: own for own in search.questions.values()}


def rollout(
    env: VectorSearch,
    policy: Policy,
    questions: Sequence[Start | Question | str],
    *,
    seed: int = 0,
    out: Path | None = None,
    lanes: int = 1,
    progress: bool | Callable[[int], None] = False,
    ended: dict[int, Trajectory] | None = None,
) -> list[Trajectory]:
    """Play an episode of each question to its end and return the records in the same order.

    At most `env.num_envs` are played at a time, and a finished one gives its place to the next at once. Neither that
    number nor `lanes` changes an episode.

    Args:
        env: a `SearchVectorEnv`, or one with channels around it.
        policy: what acts. None in place of an action says that the conversation no longer fits it, which ends the
            episode with `Stop.CONTEXT_FULL`.
        questions: starts; or questions or their ids, which get one group each and seeds in a row.
        seed: the first of those seeds.
        out: a file of JSON lines that every episode is added to as it ends. If it is there already, the episodes in
            it are not played again: a crash loses those in flight.
        lanes: into how many parts the places are cut; while one searches, the policy acts in another. Two are
            enough to hide a slow index.
        progress: True for a progress bar, or a function that is called with the number of episodes done.
        ended: place among the questions → episode. Those in it are not played again, and every other is added as it
            ends: what is left of a rollout whose policy has failed.

    Raises ValueError when the policy gives another number of actions than it was given conversations or cannot even
    begin, and CorpusError when `out` holds episodes that are not among those asked for.
    """
    if lanes < 1 or (out is not None and ended is not None):
        raise ValueError(f"lanes={lanes} must be 1 or more, and of out and ended one can be given")
    starts = [_start(own, number, seed) for number, own in enumerate(questions)]
    for start in starts:
        check_known(_base(env).questions, start.question)
    with ExitStack() as stack:
        log = EpisodeLog(out) if out else None
        if log:
            stack.callback(log.close)
        pool = stack.enter_context(ThreadPoolExecutor(lanes)) if lanes > 1 else None
        stack.enter_context(session_of(policy))
        done = _done(log, starts, _base(env)) if ended is None else ended
        game = _Rollout(env, policy, starts, done, log)
        report = stack.enter_context(_bar(len(starts))) if progress is True else progress or (lambda done: None)
        game.play([list(range(lane, env.num_envs, lanes)) for lane in range(lanes)], pool, report)
    return [game.done[number] for number in range(len(starts))]


def _start(own: Start | Question | str, number: int, seed: int) -> Start:
    if isinstance(own, Start):
        return own
    return Start(own if isinstance(own, str) else own.id, number, seed + number)


def _done(log: EpisodeLog | None, starts: Sequence[Start], search: SearchVectorEnv) -> dict[int, Trajectory]:
    """Number of the start → its episode, for those that the log holds already."""
    numbers: dict[Start, deque[int]] = {}
    for number, start in enumerate(starts):
        numbers.setdefault(start, deque()).append(number)
    done: dict[int, Trajectory] = {}
    for episode in log.done if log else ():
        waiting = numbers.get(Start(episode.question.id, episode.group, episode.seed))
        which = f"the file holds an episode of {episode.question.id!r} (group {episode.group}, seed {episode.seed})"
        if not waiting:
            raise CorpusError(f"{which} that is not asked for now, or not as often; give another file")
        now = search.rules.texts.opening(search.questions[episode.question.id].text, search.rules.max_turns)
        if episode.question != search.questions[episode.question.id] or episode.opening != now:
            raise CorpusError(f"{which} whose question or prompt was another; give another file")
        done[waiting.popleft()] = episode
    return done


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()) as shown:
        task = shown.add_task("episodes", total=total)
        yield lambda done: shown.update(task, completed=done)


def _base(env: VectorSearch) -> SearchVectorEnv:
    search = env.unwrapped
    assert isinstance(search, SearchVectorEnv)
    return search


class _Rollout:
    """One rollout under way: what waits, what is being played in which place, and what is done."""

    def __init__(
        self,
        env: VectorSearch,
        policy: Policy,
        starts: Sequence[Start],
        done: dict[int, Trajectory],
        log: EpisodeLog | None,
    ) -> None:
        self.env, self.search, self.policy = env, _base(env), policy
        self.starts, self.done, self.log = starts, done, log
        self.waiting = deque(number for number in range(len(starts)) if number not in done)
        self.number: dict[int, int] = {}  # place → start that is played there
        self.turns: dict[int, list[Turn]] = {}

    def play(
        self, lanes: Sequence[list[int]], pool: ThreadPoolExecutor | None, progress: Callable[[int], None]
    ) -> None:
        """Play all that wait, the lanes in turns."""
        pending: dict[int, tuple[dict[int, Action], Callable[[], VectorStep]]] = {}
        progress(len(self.done))
        while self.waiting or self.number:
            for lane, places in enumerate(lanes):
                if lane in pending:
                    actions, result = pending.pop(lane)
                    self._record(actions, result())
                self._refill(places)
                actions = self._act([place for place in places if place in self.number])
                if actions:
                    texts = [actions.get(place) for place in range(self.search.num_envs)]
                    step = partial(self.env.step, texts)
                    pending[lane] = (actions, pool.submit(step).result if pool else step)
                progress(len(self.done))

    def _refill(self, places: Sequence[int]) -> None:
        free = [place for place in places if place not in self.number][: len(self.waiting)]
        if not free:
            return
        mask = np.zeros(self.search.num_envs, bool)
        mask[free] = True
        begun = [self.waiting.popleft() for _ in free]
        own = [self.starts[number] for number in begun]
        self.env.reset(
            seed=[start.seed for start in own],
            options={"reset_mask": mask, "questions": [start.question for start in own]},
        )
        for place, number in zip(free, begun, strict=True):
            self.number[place], self.turns[place] = number, []

    def _episode(self, place: int) -> Episode:
        episode = self.search.episodes[place]
        assert episode is not None
        return episode

    def _act(self, places: Sequence[int]) -> dict[int, Action]:
        """The policy's actions by place; an episode that it cannot go on with is over."""
        if not places:
            return {}
        given = list(self.policy([self._episode(place).conversation for place in places]))
        if len(given) != len(places):
            raise ValueError(f"the policy gave {len(given)} actions for {len(places)} conversations; give one each")
        actions: dict[int, Action] = {}
        for place, action in zip(places, given, strict=True):
            if action is None:
                self._abandon(place)
            else:
                actions[place] = Action(action) if isinstance(action, str) else action
        return actions

    def _abandon(self, place: int) -> None:
        """End an episode whose last reply no longer fits the policy: it is as if that reply had not come."""
        episode, turns = self._episode(place), self.turns[place]
        if not turns:
            raise ValueError(
                f"question {episode.question.id!r} alone does not fit the policy; give it a longer context, or lower"
                " its max_new_tokens"
            )
        own = episode.abandon()
        channels = channels_of(self.env)
        gone = {channel.name for channel in channels if channel.about == "reply"}
        rewards = {name: value for name, value in turns[-1].rewards.items() if name not in gone} | own
        for channel in channels:
            if channel.about == "end" and (value := read_channel(channel, [episode])[0]) is not None:
                rewards[channel.name] = value
        turns[-1] = replace(turns[-1], observation="", retrieved=(), rewards=rewards)
        self._finish(place)

    def _record(self, actions: Mapping[int, Action], stepped: VectorStep) -> None:
        observations, _, _, _, infos = stepped
        for place, action in actions.items():
            self.turns[place].append(_turn(action, observations[place], infos, place))
            if self._episode(place).stop is not None:
                self._finish(place)

    def _finish(self, place: int) -> None:
        number, episode = self.number.pop(place), self._episode(place)
        start = self.starts[number]
        assert episode.stop is not None
        self.done[number] = Trajectory(
            question=episode.question,
            opening=episode.opening,
            turns=tuple(self.turns.pop(place)),
            stop=episode.stop,
            group=start.group,
            seed=start.seed,
            grammar=episode.conversation.grammar,
            answer=episode.answer,
            error=episode.error,
        )
        if self.log:
            self.log.add(self.done[number])


def _turn(action: Action, observation: str, infos: Mapping[str, Any], place: int) -> Turn:
    rewards = {
        name: float(values[place])
        for name, values in infos["rewards"].items()
        if not name.startswith("_") and infos["rewards"][f"_{name}"][place]
    }
    return Turn(action, observation, rewards, infos["queries"][place], infos["retrieved"][place])
