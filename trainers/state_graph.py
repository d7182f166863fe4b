"""GiGPO and GraphGPO: turns compared with the other turns that were taken in the same state.

States are tensors of ids, (B, K + 1) long: the state before each turn and, at `last + 1`, the state after the last.
`state_ids` makes them from trajectories by one of `STATE_KEYS`. States of different groups never meet, even under
one id. Everything else is as in `advantages`: float64, and 0 after an episode's last turn.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from agentgym_ig.answers import normalise_squad
from agentgym_ig.trainers.advantages import finite, require_shape, standardise, turn_returns, until
from agentgym_ig.types import Trajectory, Turn

_SUCCESS, _OVER = object(), object()  # not texts, which an observation could equal


def _raw(episode: Trajectory) -> list[Hashable]:
    """What the environment said last, at first the question."""
    return [episode.question.text, *(turn.observation for turn in episode.turns[:-1])]


def _docset(episode: Trajectory) -> list[Hashable]:
    """All passages retrieved so far."""
    return _carried(episode, frozenset(), lambda seen, turn: seen | set(turn.retrieved))


def _last_docset(episode: Trajectory) -> list[Hashable]:
    """The passages of the last search that found any."""
    return _carried(episode, frozenset(), lambda seen, turn: frozenset(turn.retrieved) or seen)


def _query_norm(episode: Trajectory) -> list[Hashable]:
    """The words of the last search's queries, whatever their order."""
    return _carried(
        episode,
        frozenset(),
        lambda asked, turn: frozenset(" ".join(sorted(normalise_squad(q).split())) for q in turn.queries) or asked,
    )


def _evidence(episode: Trajectory) -> list[Hashable]:
    """The supporting passages retrieved so far. They are known in training alone."""
    if not episode.question.supporting:
        raise ValueError(
            f"question {episode.question.id!r} names no supporting passages, so all its states would be one; use "
            "another state key, such as docset"
        )
    gold = frozenset(episode.question.supporting)
    return _carried(episode, frozenset(), lambda seen, turn: seen | gold & set(turn.retrieved))


def _carried(
    episode: Trajectory, first: frozenset[str], step: Callable[[frozenset[str], Turn], frozenset[str]]
) -> list[Hashable]:
    states = [first]
    for turn in episode.turns[:-1]:
        states.append(step(states[-1], turn))
    return list(states)


STATE_KEYS: dict[str, Callable[[Trajectory], list[Hashable]]] = {
    "raw": _raw,
    "docset": _docset,
    "last_docset": _last_docset,
    "query_norm": _query_norm,
    "evidence": _evidence,
}
"""Name → the state before each turn of an episode. `raw` is what verl-agent's search environment uses, where hardly
any state but the first recurs; the others are ours and merge more."""


def state_ids(episodes: Sequence[Trajectory], key: str) -> Tensor:
    """(B, K + 1) long: the states of each episode under a key; equal states of a group have equal ids.

    After the last turn an episode is in a state of being over, which nothing leads out of. Padded with 0. Raises
    ValueError for an unknown key, for an episode without a turn, and by `evidence` for a question without support.
    """
    if key not in STATE_KEYS:
        raise ValueError(f"unknown state key {key!r}; choose one of {', '.join(STATE_KEYS)}")
    empty = [episode.question.id for episode in episodes if not episode.turns]
    if empty:
        raise ValueError(f"episodes of {empty} have no turn, so no state; leave them out")
    ids: dict[Hashable, int] = {}
    rows = [
        torch.tensor([ids.setdefault((episode.group, state), len(ids)) for state in (*STATE_KEYS[key](episode), _OVER)])
        for episode in episodes
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def distances(states: Tensor, last: Tensor, success: Tensor, group: Tensor) -> Tensor:
    """How many turns each state is away from success, over all turns that any episode of its group has taken.

    states (B, K + 1); last, group (B,) long; success (B,) bool: the last turn of such an episode leads to success.
    Returns (B, K + 1) float64, 0 after an episode's final state. A state that success cannot be reached from is one
    turn further away than the furthest that it can; where nothing succeeded, that is 1 everywhere.
    """
    _check_states(states, last, success=success, group=group)
    away = torch.zeros(states.shape, dtype=torch.float64, device=states.device)
    paths: dict[int, dict[int, list[Hashable]]] = defaultdict(dict)
    rows = zip(states.tolist(), last.tolist(), success.tolist(), group.tolist(), strict=True)
    for row, (own, end, reached, question) in enumerate(rows):
        paths[question][row] = [*own[: end + 1], _SUCCESS if reached else own[end + 1]]
    for graph in paths.values():
        steps = _steps_to_success(list(graph.values()))
        unreachable = max(steps.values()) + 1
        for row, path in graph.items():
            away[row, : len(path)] = away.new_tensor([steps.get(node, unreachable) for node in path])
    return away


def _steps_to_success(paths: Sequence[Sequence[Hashable]]) -> dict[Hashable, int]:
    """Breadth first, against the turns' direction; every turn costs 1, as in all of GraphGPO's experiments."""
    before: dict[Hashable, set[Hashable]] = defaultdict(set)
    for path in paths:
        for state, following in pairwise(path):
            before[following].add(state)
    steps: dict[Hashable, int] = {_SUCCESS: 0}
    queue = deque([_SUCCESS])
    while queue:
        node = queue.popleft()
        for state in before[node] - steps.keys():
            steps[state] = steps[node] + 1
            queue.append(state)
    return steps


RETURN_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "paper": lambda before, after: after + 1,
    "code": lambda before, after: after,
    "progress": lambda before, after: after - before + 1,
}
"""Name → the power of omega in a turn's return, from the distances of the states before and after the turn. `paper` is
its eq. 4; the release uses `code`, which differs by a factor that standardising removes, and `progress` on request."""


def graph_gpo_advantages(
    outcome: Tensor,
    success: Tensor,
    states: Tensor,
    last: Tensor,
    group: Tensor,
    *,
    omega: float,
    form: str = "paper",
    success_return: float = 10.0,
    graph_weight: float = 1.0,
    episode_weight: float = 1.0,
    scale: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
    per_turn: bool = False,
    penalty: Tensor | None = None,
) -> Tensor:
    """GraphGPO (arXiv 2605.26684): how near success a turn leads, against the other turns taken in its state, plus the
    episode's own advantage.

    outcome, last, group (B,); success (B,) bool; states (B, K + 1). A turn's return is success_return * omega^power,
    the power one of `RETURN_FORMS`. scale=False only takes off means (the release's `mean_norm`), in both parts.
    per_turn: each episode counts once per turn in the statistics of the episode part (the release's default), not once.
    penalty (B, K): what the returns of invalid actions lose, 0.1 in the release, which takes it off the outcome of that
    turn as well. Returns (B, K), 0 after the last turn.

    The part of a state left only once is 0, and so is that of all states where nothing succeeded; the episode's part is
    0 in a group of one (where the release keeps the raw reward). Raises ValueError for an unknown form and an omega
    outside (0, 1).
    """
    if form not in RETURN_FORMS:
        raise ValueError(f"unknown return form {form!r}; choose one of {', '.join(RETURN_FORMS)}")
    if not 0 < omega < 1:
        raise ValueError(f"omega={omega}: nearer states are worth more with a number between 0 and 1 alone")
    away = distances(states, last, success, group)
    returns = success_return * omega ** RETURN_FORMS[form](away[:, :-1], away[:, 1:])
    turns = until(last, returns.shape[1])
    if penalty is not None:
        require_shape(returns.shape, penalty=penalty)
        returns = returns - finite("the penalty", penalty, turns)
    nearer = standardise(returns, turns, _cells(states, group), ddof=ddof, eps=eps, scale=scale)
    episode = _episode_part(outcome, turns, group, per_turn=per_turn, scale=scale, ddof=ddof, eps=eps)
    return graph_weight * nearer + episode_weight * episode


def gigpo_advantages(
    rewards: Tensor,
    outcome: Tensor,
    states: Tensor,
    last: Tensor,
    group: Tensor,
    *,
    gamma: float = 0.95,
    step_weight: float = 1.0,
    episode_weight: float = 1.0,
    scale: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
    per_turn: bool = False,
) -> Tensor:
    """GiGPO (Feng et al. 2025, arXiv 2505.10978): a turn's discounted return against the other turns taken in its
    state, plus the episode's own advantage.

    rewards (B, K): of each turn, the outcome included where it was given; outcome, last, group (B,);
    states (B, K + 1). scale=False only takes off means (the release's default, `mean_norm`), in both parts. per_turn as
    for `graph_gpo_advantages`. Returns (B, K), 0 after the last turn; the part of a state left only once is 0, and so
    is the episode's in a group of one. Raises ValueError for a reward that is not finite.
    """
    _check_states(states, last, group=group)
    require_shape((len(states), states.shape[1] - 1), rewards=rewards)
    returns = turn_returns(rewards, last, gamma=gamma)
    turns = until(last, returns.shape[1])
    better = standardise(returns, turns, _cells(states, group), ddof=ddof, eps=eps, scale=scale)
    episode = _episode_part(outcome, turns, group, per_turn=per_turn, scale=scale, ddof=ddof, eps=eps)
    return step_weight * better + episode_weight * episode


def _episode_part(
    outcome: Tensor, turns: Tensor, group: Tensor, *, per_turn: bool, scale: bool, ddof: int, eps: float
) -> Tensor:
    """(B, K) the outcome against the other episodes of the question, 0 after the last turn."""
    require_shape(turns.shape[:1], outcome=outcome)
    counted = turns if per_turn else turns[:, :1]
    values = outcome[:, None].expand(counted.shape)
    return standardise(values, counted, group, ddof=ddof, eps=eps, scale=scale).expand(turns.shape) * turns


def _cells(states: Tensor, group: Tensor) -> Tensor:
    """(B, K) an id for each pair of a group and a state before a turn."""
    pairs = torch.stack([group[:, None].expand_as(states), states], -1)[:, :-1]
    ids: Tensor = pairs.flatten(0, 1).unique(dim=0, return_inverse=True)[1]
    return ids.reshape(pairs.shape[:2])


def _check_states(states: Tensor, last: Tensor, **per_episode: Tensor) -> None:
    if states.dim() != 2:
        raise ValueError(f"states {tuple(states.shape)}: wanted (B, K + 1)")
    require_shape(states.shape[:1], last=last, **per_episode)
    until(last, states.shape[1] - 1)
