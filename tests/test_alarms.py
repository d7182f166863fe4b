"""Alarms: by hand, against a plainly right slow version, and what must not matter."""

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig.trainers.alarms import Alarm, AlarmConfig, alarms

RELATIVE = ("entropy", "tokens_per_episode", "turns", "searches")
METRICS = (*RELATIVE, "malformed", "skipped_updates")
NAMES = dict(zip(METRICS, ("entropy", "length", "turns", "searches", "malformed", "skipped"), strict=True))
TWO = AlarmConfig(window=2)

Row = dict[str, Any]


def rows(metric: str, values: Sequence[float]) -> list[Row]:
    return [{"step": step + 1, "episodes": 8, metric: value} for step, value in enumerate(values)]


# Means over windows of two: 1.0 at first, then as the name of the case says.
CASES = [
    ("entropy", [1.5, 0.5, 0.125, 0.125], ("entropy_collapse", 0.125, 1.0)),
    ("entropy", [1.5, 0.5, 0.25, 0.25], None),
    ("entropy", [1.0, 1.0, 2.0, 2.0], None),
    ("entropy", [1.0, 1.0, 2.0, 2.25], ("entropy_explosion", 2.125, 1.0)),
    ("entropy", [0.0, 0.0, 0.0, 0.25], ("entropy_explosion", 0.125, 0.0)),
    ("tokens_per_episode", [100.0, 60.0, 900.0, 39.0, 40.0], ("length_collapse", 39.5, 80.0)),
    ("tokens_per_episode", [100.0, 60.0, 40.0, 40.0], None),
    ("tokens_per_episode", [100.0, 60.0, 200.0, 200.0], ("length_explosion", 200.0, 80.0)),
    ("turns", [4.0, 4.0, 1.0, 1.5], ("turns_collapse", 1.25, 4.0)),
    ("turns", [1.5, 1.5, 4.0, 4.0], ("turns_explosion", 4.0, 1.5)),
    ("searches", [2.0, 2.0, 0.0, 0.0], ("searches_collapse", 0.0, 2.0)),
    ("searches", [1.0, 1.0, 1.0, 0.0], None),
    ("searches", [1.0, 1.0, 9.0, 9.0], None),
    ("searches", [0.0, 0.0, 0.0, 0.0], None),
    ("malformed", [0.0, 0.0, 0.5, 0.5], None),
    ("malformed", [0.0, 0.0, 0.5, 0.75], ("malformed_explosion", 0.625, 0.0)),
    ("malformed", [2.0, 2.0, 0.0, 0.0], None),
    ("skipped_updates", [0, 1, 1, 2], ("skipped_explosion", 1.5, 0.5)),
]


@pytest.mark.parametrize(("metric", "values", "expected"), CASES)
def test_by_hand(metric: str, values: list[float], expected: tuple[str, float, float] | None) -> None:
    assert alarms(rows(metric, values), TWO) == ([Alarm(*expected)] if expected else [])


def test_there_must_be_two_windows() -> None:
    history = rows("entropy", [1.0] * 10 + [0.0] * 10)
    assert alarms(history[:19]) == []
    assert alarms(history) == [Alarm("entropy_collapse", 0.0, 1.0)]


def test_an_alarm_ends_with_its_cause() -> None:
    history = rows("searches", [2.0, 2.0, 0.0, 0.0, 2.0, 2.0])
    assert [len(alarms(history[:done], TWO)) for done in range(1, 7)] == [0, 0, 0, 1, 0, 0]


def test_the_message_says_what_moved_where_and_what_to_try() -> None:
    (collapsed,) = alarms(rows("entropy", [1.5, 0.5, 0.125, 0.125]), TWO)
    assert str(collapsed).startswith("entropy_collapse: fell from 1 to 0.125 nats per token; ")
    assert "lower the learning rate" in str(collapsed)
    (exploded,) = alarms(rows("entropy", [1.0, 1.0, 3.0, 3.0]), TWO)
    assert str(exploded).startswith("entropy_explosion: rose from 1 to 3 nats per token; ")
    assert str(exploded).partition("; ")[2] != str(collapsed).partition("; ")[2]


@pytest.mark.parametrize(("metric", "values", "expected"), [case for case in CASES if case[2]])
def test_every_message_ends_with_advice(metric: str, values: list[float], expected: tuple[Any, ...]) -> None:
    (alarm,) = alarms(rows(metric, values), TWO)
    moved = "fell" if alarm.found < alarm.before else "rose"
    start, _, advice = str(alarm).partition("; ")
    assert start.startswith(f"{expected[0]}: {moved} from {alarm.before:.3g} to {alarm.found:.3g} ")
    assert len(advice) > 20


eighths = st.integers(0, 40).map(lambda n: n / 8)
cells = st.one_of(st.none(), st.just(math.nan), st.just(math.inf), eighths)
histories = st.lists(
    st.fixed_dictionaries({"episodes": st.integers(0, 2)}, optional=dict.fromkeys(METRICS, cells)), max_size=16
)


def plain(history: list[Row], config: AlarmConfig) -> set[tuple[str, float, float]]:
    """One metric after the other, by a loop over the rows."""
    found = set()
    for metric, name in NAMES.items():
        values: list[float] = []
        for row in history:
            if row["episodes"] and metric in row and row[metric] is not None and math.isfinite(row[metric]):
                values.append(row[metric])
        if len(values) < 2 * config.window:
            continue
        first, last = sum(values[: config.window]) / config.window, sum(values[-config.window :]) / config.window
        share = config.entropy_floor if metric == "entropy" else config.floor
        if metric in RELATIVE and last < first * share:
            found.add((f"{name}_collapse", last, first))
        rises = last > first * config.ceiling and metric != "searches"
        if rises and (metric in RELATIVE or last > config.level):
            found.add((f"{name}_explosion", last, first))
    return found


@settings(deadline=None, max_examples=300)
@given(histories, st.integers(1, 4), st.sampled_from([0.125, 0.5]), st.sampled_from([1.5, 2.0]), eighths)
def test_alarms_are_those_of_a_plain_loop(
    history: list[Row], window: int, floor: float, ceiling: float, level: float
) -> None:
    config = AlarmConfig(window=window, floor=floor, entropy_floor=floor / 2, ceiling=ceiling, level=level)
    raised = alarms(history, config)
    assert {(own.name, own.found, own.before) for own in raised} == plain(history, config)
    assert len({own.name for own in raised}) == len(raised)


@settings(deadline=None)
@given(st.fixed_dictionaries({metric: st.floats(0, 1e9) for metric in METRICS}), st.integers(1, 40), st.integers(1, 5))
def test_what_stays_the_same_never_alarms(row: Row, steps: int, window: int) -> None:
    assert alarms([{"episodes": 1, **row}] * steps, AlarmConfig(window=window)) == []


@settings(deadline=None)
@given(histories, st.integers(-6, 6))
def test_the_unit_of_a_metric_does_not_matter(history: list[Row], power: int) -> None:
    def scaled(row: Row) -> Row:
        return {key: value * 2.0**power if key in RELATIVE and value else value for key, value in row.items()}

    raised = [own for own in alarms(history, TWO) if own.name.partition("_")[0] not in ("malformed", "skipped")]
    expected = [Alarm(own.name, own.found * 2.0**power, own.before * 2.0**power) for own in raised]
    again = alarms([scaled(row) for row in history], TWO)
    assert [own for own in again if own.name.partition("_")[0] not in ("malformed", "skipped")] == expected


@settings(deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_other_keys_and_their_order_do_not_matter(history: list[Row], rng: random.Random) -> None:
    def shuffled(row: Row) -> Row:
        items = [*row.items(), ("em", 0.5), ("evaluation", {"turns": 3}), ("alarms", ["entropy_collapse"])]
        rng.shuffle(items)
        return dict(items)

    assert alarms([shuffled(row) for row in history], TWO) == alarms(history, TWO)


@settings(deadline=None)
@given(histories, st.lists(st.tuples(st.integers(0, 16), st.sampled_from([{}, {"turns": None}])), max_size=4))
def test_rows_without_values_or_episodes_change_nothing(history: list[Row], put: list[tuple[int, Row]]) -> None:
    longer = list(history)
    for place, row in put:
        longer.insert(place, row)
        longer.insert(place, {"episodes": 0, "entropy": 1e9, "turns": 0.0})
    assert alarms(longer, TWO) == alarms(history, TWO)


@settings(deadline=None)
@given(histories)
def test_a_resumed_run_raises_the_same_alarms(history: list[Row]) -> None:
    read = [json.loads(json.dumps(row)) for row in history]
    for done in range(len(history) + 1):
        assert alarms(read[:done], TWO) == alarms(history[:done], TWO)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, r"window=2\.5; wanted a whole number of steps"),
        ({"floor": 0.0}, r"floor=0\.0; wanted shares"),
        ({"floor": 1.0}, r"floor=1\.0; wanted shares"),
        ({"entropy_floor": 1.5}, r"entropy_floor=1\.5"),
        ({"entropy_floor": math.nan}, "entropy_floor=nan"),
        ({"ceiling": 1.0}, r"ceiling=1\.0; wanted a multiple above 1"),
        ({"ceiling": math.inf}, "ceiling=inf"),
        ({"ceiling": math.nan}, "ceiling=nan"),
        ({"level": -0.5}, r"level=-0\.5; wanted 0 or more"),
        ({"level": math.nan}, "level=nan"),
    ],
)
def test_senseless_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlarmConfig(**setting)
