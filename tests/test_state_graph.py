"""GiGPO and GraphGPO. Golden vectors (by an independent script), properties, and slow loops that are plainly right."""

import math
import random
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers.advantages import grpo_advantages
from agentgym_ig.trainers.state_graph import (
    RETURN_FORMS,
    STATE_KEYS,
    distances,
    gigpo_advantages,
    graph_gpo_advantages,
    state_ids,
)
from agentgym_ig.types import Action, Question, Stop, Trajectory, Turn
from tests.groups import assert_golden, f64, plain_z

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def episodes(paths: list[list[int]], success: list[bool], group: list[int] | None = None) -> Inputs:
    """Outcome (10 for a success), success, states, last and group."""
    states = torch.nn.utils.rnn.pad_sequence([torch.tensor(path) for path in paths], batch_first=True)
    last = torch.tensor([len(path) - 2 for path in paths])
    won = torch.tensor(success)
    return won.double() * 10, won, states, last, torch.tensor(group or [0] * len(paths))


# t1 goes 0, 1, 2 and succeeds; t2 0, 3, 1, 4 and fails; t3 0, 1 and succeeds. A success's own last state is not read.
PATHS, SUCCESS = [[0, 1, 2, 9], [0, 3, 1, 4], [0, 1, 7]], [True, False, True]
GRAPH: dict[str, Any] = {"omega": 0.5, "episode_weight": 0.0}


def test_distances_golden() -> None:
    _, success, states, last, group = episodes(PATHS, SUCCESS)
    got = distances(states, last, success, group)
    assert_golden(got, [[2.0, 1.0, 1.0, 0.0], [2.0, 2.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
    powers = {name: (10 * 0.5 ** form(got[:, :-1], got[:, 1:])).tolist() for name, form in RETURN_FORMS.items()}
    assert powers["code"][:2] == [[5, 5, 10], [2.5, 5, 1.25]]
    assert powers["paper"][:2] == [[2.5, 2.5, 5], [1.25, 2.5, 0.625]]
    assert powers["progress"][:2] == [[10, 5, 10], [5, 10, 1.25]]
    assert [powers[name][2][:2] for name in ("code", "paper", "progress")] == [[5, 10], [2.5, 5], [10, 10]]


NEARER = [[0.577350, -0.094916, 0.0], [-1.154700, 0.0, -0.949158], [0.577350, 1.044074]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"form": "code"}, NEARER),
        ({"form": "paper"}, NEARER),
        (
            {"form": "paper", "success_return": 1.0, "ddof": 0},
            [[0.707095, -0.116247, 0.0], [-1.414190, 0.0, -1.162470], [0.707095, 1.278717]],
        ),
        (
            {"form": "code", "scale": False},
            [[0.833333, -0.416667, 0.0], [-1.666667, 0.0, -4.166667], [0.833333, 4.583333]],
        ),
        ({"graph_weight": 0.0, "episode_weight": 1.0}, [[0.577350] * 3, [-1.154700] * 3, [0.577350] * 2]),
        (
            {"graph_weight": 0.0, "episode_weight": 1.0, "per_turn": True},
            [[0.724569] * 3, [-1.207614] * 3, [0.724569] * 2],
        ),
        (
            {"episode_weight": 1.0},
            [[1.154700, 0.482434, 0.577350], [-2.309400, -1.154700, -2.103858], [1.154700, 1.621424]],
        ),
        (
            {"episode_weight": 1.0, "per_turn": True},
            [[1.301919, 0.629653, 0.724569], [-2.362314, -1.207614, -2.156772], [1.301919, 1.768642]],
        ),
    ],
    ids=str,
)
def test_graph_gpo_golden(options: dict[str, Any], expected: list[list[float]]) -> None:
    assert_golden(graph_gpo_advantages(*episodes(PATHS, SUCCESS), **GRAPH | options), expected)


def test_graph_gpo_golden_with_an_invalid_action() -> None:
    penalty = f64([[0.1, 0.0, 0.0], [0.0] * 3, [0.0, 0.0, torch.nan]])
    got = graph_gpo_advantages(*episodes(PATHS, SUCCESS), **GRAPH, form="code", penalty=penalty)
    assert_golden(got[:, 0], [0.541664, -1.153979, 0.612315])


def test_without_a_success_every_state_is_one_turn_away_and_nothing_is_learnt() -> None:
    inputs = episodes([[0, 3, 1, 4], [0, 3, 5]], [False, False])
    _, success, states, last, group = inputs
    assert_golden(distances(states, last, success, group), [[1.0] * 4, [1.0] * 3])
    for form in RETURN_FORMS:
        assert not graph_gpo_advantages(*inputs, omega=0.5, form=form).any()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (True, [[0.532414, 0.532414, 0.0], [-1.153563, 0.0, -1.153563], [0.621149, 0.621149]]),
        (False, [[2.85, 3.0, 0.0], [-6.175, 0.0, -6.5], [3.325, 3.5]]),
    ],
)
def test_gigpo_golden(scale: bool, expected: list[list[float]]) -> None:
    outcome, _, states, last, group = episodes(PATHS, SUCCESS)
    rewards = f64([[0, 0, 10], [0, 0, 0], [0, 10, torch.nan]])
    got = gigpo_advantages(rewards, outcome, states, last, group, scale=scale, episode_weight=0.0)
    assert_golden(got, expected)
    episode = gigpo_advantages(rewards, outcome, states, last, group, step_weight=0.0)
    assert_golden(episode, [[0.577350] * 3, [-1.154700] * 3, [0.577350] * 2])
    per_turn = gigpo_advantages(rewards, outcome, states, last, group, step_weight=0.0, per_turn=True)
    assert_golden(per_turn, [[0.724569] * 3, [-1.207614] * 3, [0.724569] * 2])


Batch = tuple[list[list[int]], list[bool], list[int]]
batches = st.lists(
    st.tuples(st.lists(st.integers(0, 4), min_size=2, max_size=5), st.booleans(), st.integers(0, 1)),
    min_size=1,
    max_size=7,
).map(lambda rows: ([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))


def nodes(path: list[int], success: bool) -> list[Any]:
    """The states of an episode; success is None."""
    return [*path[:-1], None if success else path[-1]]


POWERS: dict[str, Callable[[float, float], float]] = {
    "paper": lambda _, after: after + 1,
    "code": lambda _, after: after,
    "progress": lambda before, after: after - before + 1,
}


def edges(batch: Batch, question: int) -> list[tuple[Any, Any]]:
    """Every turn of a group as (state, next state)."""
    rows = zip(*batch, strict=True)
    return [pair for path, success, group in rows if group == question for pair in pairwise(nodes(path, success))]


def reachable(turns: list[tuple[Any, Any]]) -> dict[Any, float]:
    """Bellman and Ford: the turns to success from where it can be reached."""
    away: dict[Any, float] = {node: math.inf for pair in turns for node in pair} | {None: 0.0}
    for _ in away:
        for state, after in turns:
            away[state] = min(away[state], away[after] + 1)
    return {node: value for node, value in away.items() if value < math.inf}


@settings(deadline=None)
@given(batches, st.sampled_from(sorted(RETURN_FORMS)), st.booleans())
def test_graph_gpo_equals_a_slow_loop(batch: Batch, form: str, per_turn: bool) -> None:
    inputs = episodes(*batch)
    got = graph_gpo_advantages(*inputs, omega=0.5, form=form, per_turn=per_turn)
    away = distances(inputs[2], inputs[3], inputs[1], inputs[4])
    for row, (path, success, group) in enumerate(zip(*batch, strict=True)):
        turns, own_nodes = edges(batch, group), nodes(path, success)
        near = reachable(turns)
        steps = {node: near.get(node, max(near.values()) + 1) for pair in turns for node in pair}
        outcomes = [
            10.0 * won
            for own, won, its in zip(*batch, strict=True)
            if its == group
            for _ in range(len(own) - 1 if per_turn else 1)
        ]
        assert away[row, : len(path)].tolist() == [steps[node] for node in own_nodes]
        for turn, (state, after) in enumerate(pairwise(own_nodes)):
            pool = [10 * 0.5 ** POWERS[form](steps[s], steps[n]) for s, n in turns if s == state]
            own = 10 * 0.5 ** POWERS[form](steps[state], steps[after])
            expected = plain_z(pool, ddof=1)(own) + plain_z(outcomes, ddof=1)(10.0 * success)
            assert float(got[row, turn]) == pytest.approx(expected, abs=1e-8)
        assert not got[row, len(path) - 1 :].any()


@settings(deadline=None)
@given(batches, st.lists(st.integers(-8, 8), min_size=28, max_size=28), st.sampled_from([0.0, 0.5, 1.0]))
def test_gigpo_equals_a_slow_loop(batch: Batch, eighths: list[int], gamma: float) -> None:
    outcome, _, states, last, group = episodes(*batch)
    width = states.shape[1] - 1
    rewards = f64(eighths)[: len(states) * width].reshape(-1, width) / 8
    got = gigpo_advantages(rewards, outcome, states, last, group, gamma=gamma)
    at: dict[tuple[int, int], list[float]] = {}
    returns: dict[tuple[int, int], float] = {}
    for row, (path, _, question) in enumerate(zip(*batch, strict=True)):
        for turn in range(len(path) - 1):
            ahead = rewards[row, turn : len(path) - 1].tolist()
            returns[row, turn] = sum(gamma**i * reward for i, reward in enumerate(ahead))
            at.setdefault((question, path[turn]), []).append(returns[row, turn])
    episode = grpo_advantages(outcome, group).tolist()
    for (row, turn), value in returns.items():
        pool = at[batch[2][row], batch[0][row][turn]]
        assert float(got[row, turn]) == pytest.approx(plain_z(pool, ddof=1)(value) + episode[row], abs=1e-8)
    assert not got[torch.arange(width) > last[:, None]].any()


@settings(deadline=None)
@given(batches, st.integers(0, 10_000))
def test_order_names_padding_and_other_questions_change_nothing(batch: Batch, seed: int) -> None:
    inputs = episodes(*batch)
    outcome, success, states, last, group = inputs
    whole = graph_gpo_advantages(*inputs, omega=0.5)
    order = torch.tensor(random.Random(seed).sample(range(len(states)), len(states)))
    moved = graph_gpo_advantages(*(tensor[order] for tensor in inputs), omega=0.5)
    assert_close(moved, whole[order], atol=1e-9, rtol=0)
    renamed = torch.tensor(random.Random(seed).sample(range(50, 60), 5))[states]
    wide = torch.nn.functional.pad(renamed, (0, 2), value=-1)
    got = graph_gpo_advantages(outcome, success, wide, last, 7 - group, omega=0.5)
    assert_close(got, torch.nn.functional.pad(whole, (0, 2)), atol=1e-9, rtol=0)
    for question in group.unique():
        alone = [tensor[group == question] for tensor in inputs]
        assert_close(graph_gpo_advantages(*alone, omega=0.5), whole[group == question], atol=1e-9, rtol=0)


def found(batch: Batch) -> dict[Any, float]:
    """State → our distance, all episodes in one group."""
    _, success, states, last, group = episodes(*batch)
    rows = zip(batch[0], batch[1], distances(states, last, success, torch.zeros_like(group)).tolist(), strict=True)
    return {node: steps for path, won, row in rows for node, steps in zip(nodes(path, won), row, strict=False)}


@settings(deadline=None)
@given(batches, st.integers(1, 6))
def test_more_episodes_never_lengthen_a_way(batch: Batch, count: int) -> None:
    paths, success, _ = batch
    fewer = paths[:count], success[:count], [0] * len(paths[:count])
    before, after = found(fewer), found(batch)
    for node in reachable(edges(fewer, 0)).keys() & before.keys():
        assert after[node] <= before[node]


@settings(deadline=None)
@given(batches)
def test_nearer_is_never_worse(batch: Batch) -> None:
    _, success, states, last, group = inputs = episodes(*batch)
    away = distances(states, last, success, group)
    for form in RETURN_FORMS:
        got = graph_gpo_advantages(*inputs, **GRAPH, form=form)
        turns = [(i, t) for i in range(len(states)) for t in range(int(last[i]) + 1)]
        for (i, t), (j, u) in product(turns, turns):
            if group[i] == group[j] and states[i, t] == states[j, u] and away[i, t + 1] < away[j, u + 1]:
                assert got[i, t] >= got[j, u] - 1e-9


@settings(deadline=None)
@given(batches)
def test_each_state_and_each_question_sums_to_zero(batch: Batch) -> None:
    inputs = episodes(*batch)
    _, _, states, last, group = inputs
    nearer = graph_gpo_advantages(*inputs, **GRAPH)
    turns = torch.arange(nearer.shape[1]) <= last[:, None]
    for question in group.unique():
        for state in states.unique():
            here = turns & (states[:, :-1] == state) & (group == question)[:, None]
            assert abs(nearer[here].sum()) < 1e-9
            assert here.sum() > 1 or not nearer[here].any()


def test_a_turn_forward_in_a_failure_beats_a_turn_back_in_a_success() -> None:
    # From 0 the failure goes on to 1, one turn before success; the success first goes back to 5 and then the long way.
    inputs = episodes([[0, 5, 0, 1, 9], [0, 1, 4]], [True, False])
    got = graph_gpo_advantages(*inputs, **GRAPH)
    assert got[1, 0] > 0 > got[0, 0]
    assert_close(got[0, 2], got[1, 0])


def test_an_episode_alone_still_learns_where_it_came_back_to_a_state() -> None:
    alone = episodes([[0, 1, 0, 9]], [True])
    got = graph_gpo_advantages(*alone, omega=0.5)[0]
    assert_golden(got, [-0.707106, 0.0, 0.707106])
    assert not graph_gpo_advantages(*episodes([[0, 1, 2, 9]], [True]), omega=0.5).any()


def test_a_turn_that_changes_nothing_keeps_the_distance() -> None:
    _, success, states, last, group = episodes([[0, 0, 1, 9]], [True])
    assert_golden(distances(states, last, success, group), [[2.0, 2.0, 1.0, 0.0]])


QUESTION = Question("q", "Where?", ("there",), "toy", ("p1", "p2"))


Seen = tuple[str, tuple[str, ...], tuple[str, ...]]


def trajectory(*turns: Seen, group: int = 0, question: Question = QUESTION) -> Trajectory:
    """Turns as observation, queries, retrieved."""
    taken = tuple(Turn(Action("…"), observation, {}, queries, shown) for observation, queries, shown in turns)
    return Trajectory(question, (), taken, Stop.ANSWERED, group, 0)


def test_states_of_trajectories() -> None:
    first = ("found p1 p3", ("The river, Poland",), ("p1", "p3"))
    second = ("found p2", ("poland river!",), ("p2",))
    broken, answer = ("say that again", (), ()), ("", (), ())
    batch = [trajectory(first, second, answer), trajectory(second, first, broken, answer), trajectory(answer, group=1)]
    expected = {
        "raw": [[0, 1, 2, 3, 0], [0, 2, 1, 4, 3], [5, 6, 0, 0, 0]],
        "docset": [[0, 1, 2, 3, 0], [0, 4, 2, 2, 3], [5, 6, 0, 0, 0]],
        "last_docset": [[0, 1, 2, 3, 0], [0, 2, 1, 1, 3], [4, 5, 0, 0, 0]],
        "query_norm": [[0, 1, 1, 2, 0], [0, 1, 1, 1, 2], [3, 4, 0, 0, 0]],
        "evidence": [[0, 1, 2, 3, 0], [0, 4, 2, 2, 3], [5, 6, 0, 0, 0]],
    }
    assert expected.keys() == STATE_KEYS.keys()
    for key, ids in expected.items():
        assert state_ids(batch, key).tolist() == ids, key
    useless = trajectory(("found p9", ("x",), ("p9",)), answer)
    assert state_ids([useless], "evidence").tolist() == [[0, 0, 1]]
    assert state_ids([useless], "docset").tolist() == [[0, 1, 2]]


def test_no_observation_can_be_taken_for_the_end() -> None:
    texts = [trajectory((text, (), ()), ("", (), ())) for text in ("success", "None", "")]
    assert state_ids(texts, "raw").tolist() == [[0, 1, 2], [0, 3, 2], [0, 4, 2]]


def test_wrong_input_says_what_is_wrong() -> None:
    outcome, success, states, last, group = inputs = episodes(PATHS, SUCCESS)
    with pytest.raises(ValueError, match=r"unknown return form 'best'; choose one of paper, code, progress"):
        graph_gpo_advantages(*inputs, omega=0.5, form="best")
    for omega in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="omega"):
            graph_gpo_advantages(*inputs, omega=omega)
    with pytest.raises(ValueError, match=r"wanted indices from 0 to 2"):
        graph_gpo_advantages(outcome, success, states, last + 1, group, omega=0.5)
    with pytest.raises(ValueError, match=r"success \(2,\): wanted \(3,\)"):
        graph_gpo_advantages(outcome, success[:2], states, last, group, omega=0.5)
    with pytest.raises(ValueError, match="not finite"):
        graph_gpo_advantages(outcome * torch.nan, success, states, last, group, omega=0.5)
    with pytest.raises(ValueError, match=r"the penalty at \[0, 0\] is nan"):
        graph_gpo_advantages(*inputs, omega=0.5, penalty=torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match=r"rewards \(3, 4\): wanted \(3, 3\)"):
        gigpo_advantages(torch.zeros(3, 4), outcome, states, last, group)
    with pytest.raises(ValueError, match=r"the reward at \[0, 0\] is nan"):
        gigpo_advantages(torch.full((3, 3), torch.nan), outcome, states, last, group)
    with pytest.raises(ValueError, match=r"wanted \(B, K \+ 1\)"):
        distances(states[0], last, success, group)
    with pytest.raises(ValueError, match="unknown state key 'x'; choose one of raw, docset"):
        state_ids([trajectory(("", (), ()))], "x")
    with pytest.raises(ValueError, match="no turn"):
        state_ids([trajectory()], "raw")
    lone = Question("q9", "Where?", ("there",), "toy")
    with pytest.raises(ValueError, match="'q9' names no supporting passages"):
        state_ids([trajectory(("", (), ()), question=lone)], "evidence")
