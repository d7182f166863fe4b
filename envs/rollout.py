"""Episodes played: any policy in a vector environment, recorded as trajectories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentgym_ig.envs.search import SearchVectorEnv
from agentgym_ig.policies import Policy
from agentgym_ig.types import Action, Conversation, Message, Question, Stop, Trajectory, Turn


@dataclass(frozen=True, slots=True)
class Start:
    """One episode to play: the question's id, the group it belongs to, and the seed of all its random draws."""

    question: str
    group: int
    seed: int


def prompts_of(env: SearchVectorEnv) -> dict[str, Question]:
    """The environment's prompt for each of its questions, for policies that act by question."""
    rules = env.rules
    return {rules.texts.render_question(q.text, rules.max_turns): q for q in env.questions.values()}


def rollout(
    env: SearchVectorEnv,
    policy: Policy,
    starts: Sequence[Start],
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Trajectory]:
    """Play every start to its end, `env.num_envs` at a time, and return the records in the same order.

    `progress` is called with the number of episodes done. Raises ValueError when the policy returns another
    number of actions than it was given conversations.
    """
    done: list[Trajectory] = []
    for first in range(0, len(starts), env.num_envs):
        done += _play(env, policy, starts[first : first + env.num_envs])
        progress(len(done))
    return done


def _play(env: SearchVectorEnv, policy: Policy, starts: Sequence[Start]) -> list[Trajectory]:
    prompts, _ = env.reset(options={"questions": [start.question for start in starts]})
    conversations = [
        Conversation((Message("user", prompt),), start.seed) for prompt, start in zip(prompts, starts, strict=False)
    ]
    turns: list[list[Turn]] = [[] for _ in starts]
    while active := np.flatnonzero(env.active).tolist():
        actions = _actions(policy, [conversations[place] for place in active])
        texts = [""] * env.num_envs
        for place, action in zip(active, actions, strict=True):
            texts[place] = action.text
        observations, _, _, _, infos = env.step(texts)
        for place, action in zip(active, actions, strict=True):
            turns[place].append(_turn(action, observations[place], infos, place))
            conversations[place] = conversations[place].plus(
                Message("assistant", action.text, action.token_ids or None), Message("tool", observations[place])
            )
    return [
        Trajectory(
            question=episode.question,
            prompt=episode.prompt,
            turns=tuple(own),
            stop=episode.stop or Stop.MAX_TURNS,
            group=start.group,
            seed=start.seed,
            answer=episode.answer,
        )
        for episode, own, start in zip(env.episodes, turns, starts, strict=True)
    ]


def _actions(policy: Policy, conversations: Sequence[Conversation]) -> list[Action]:
    actions = [Action(action) if isinstance(action, str) else action for action in policy(conversations)]
    if len(actions) != len(conversations):
        raise ValueError(
            f"the policy gave {len(actions)} actions for {len(conversations)} conversations; give one each"
        )
    return actions


def _turn(action: Action, observation: str, infos: Mapping[str, Any], place: int) -> Turn:
    rewards = {
        name: float(values[place])
        for name, values in infos["rewards"].items()
        if not name.startswith("_") and infos["rewards"][f"_{name}"][place]
    }
    return Turn(action, observation, rewards, infos["retrieved"][place])
