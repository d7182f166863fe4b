"""The first half of a step: what is played, what is kept of it, and what is read of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from agentgym_ig.envs import SearchVectorEnv, rollout
from agentgym_ig.envs.rollout import VectorSearch
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES
from agentgym_ig.errors import SearchFailed
from agentgym_ig.trainers import Recipe, Run, recipe
from agentgym_ig.trainers.collect import collect, draw_starts, read
from agentgym_ig.trainers.experience import Batch
from agentgym_ig.trainers.loop import prepare, train_step
from agentgym_ig.trainers.tinywiki import tiny_policy
from agentgym_ig.types import Hit, Stop, Trajectory
from tests.fakes import QUESTIONS, BrokenIndex
from tests.runs import SMALL, begun, fresh, paid_env, same, scored, weights
from tests.tiny import play, tiny_env


def test_starts_depend_on_seed_step_and_round_alone() -> None:
    questions = [f"q{i}" for i in range(10)]
    assert draw_starts(questions, SMALL, 3) == draw_starts(questions, SMALL, 3)
    drawn = [draw_starts(questions, replace(SMALL, seed=seed), step, sampled) for seed, step, sampled in FIRST]
    assert len({tuple(own) for own in drawn}) == len(FIRST)
    assert len({start.seed for own in drawn for start in own}) == 12 * len(FIRST)
    starts = draw_starts(questions, SMALL, 0)
    assert [start.group for start in starts] == [0] * 4 + [1] * 4 + [2] * 4
    assert [start.group for start in draw_starts(questions, SMALL, 0, 2)] == [6] * 4 + [7] * 4 + [8] * 4
    assert len({start.question for start in starts}) == 3
    assert len(draw_starts(questions[:2], SMALL, 0)) == 12  # fewer questions than wanted: some come twice


FIRST = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]


def key(episode: Trajectory) -> tuple[int, int]:
    return episode.group, episode.seed


def rounds_of(run: Run, count: int) -> list[list[Trajectory]]:
    """What each round of a first step plays."""
    return [
        rollout(run.env, run.policy, draw_starts(sorted(run.env.questions), run.config, 0, number))
        for number in range(count)
    ]


def by_group(episodes: Sequence[Trajectory]) -> dict[int, list[Trajectory]]:
    groups: dict[int, list[Trajectory]] = defaultdict(list)
    for own in episodes:
        groups[own.group].append(own)
    return groups


def paid(episode: Trajectory) -> float:
    return episode.total("outcome") + 0.1 * episode.total("search_cost")


def dapo(rounds: int) -> Recipe:
    return replace(recipe("dapo"), sampling_rounds=rounds)


def kept_by(batch: Batch | None) -> set[tuple[int, int]]:
    return {key(own) for own in batch.episodes} if batch else set()


@pytest.mark.parametrize(("rounds", "size", "env"), [(2, 4, tiny_env(12)), (6, 2, paid_env(12)), (6, 3, paid_env(12))])
def test_dynamic_sampling_keeps_the_first_groups_that_vary(
    rounds: int, size: int, env: VectorSearch, tmp_path: Path
) -> None:
    run = fresh(tmp_path, dapo(rounds), env=env, group_size=size)
    played = rounds_of(run, rounds)
    wanted: list[list[Trajectory]] = []
    used = 0
    for own in played:
        if len(wanted) < 3:
            used += 1
            wanted += [each for each in by_group(own).values() if len(set(map(paid, each))) > 1]
    collected = collect(run, begun(run, rate=0.1), 0)
    assert kept_by(collected.batch) == {key(own) for group in wanted[:3] for own in group}
    assert collected.figures["sampling_rounds"] == used
    assert collected.figures["groups_with_signal"] == len(wanted)
    assert collected.figures["episodes_played"] == 3 * size * used
    assert collected.figures["episodes_failed"] == 0
    assert len(wanted) < len({own.group for each in played for own in each})  # some were dropped


def test_dynamic_sampling_stops_with_as_many_groups_as_wanted(tmp_path: Path) -> None:
    run = fresh(tmp_path, dapo(20), env=paid_env())
    collected = collect(run, begun(run, rate=0.1), 0)
    assert collected.batch is not None
    groups = by_group(collected.batch.episodes)
    assert len(groups) == 3
    assert all(len(own) == 4 for own in groups.values())
    paid = dict(zip(map(key, collected.batch.episodes), collected.batch.reward.tolist(), strict=True))
    assert all(len({paid[key(each)] for each in own}) > 1 for own in groups.values())
    assert collected.figures["groups_with_signal"] >= 3
    assert collected.figures["sampling_rounds"] < 20


def test_without_any_signal_dynamic_sampling_ends_and_nothing_is_learned(tmp_path: Path) -> None:
    worthless = SearchVectorEnv(
        tiny_env().index, list(tiny_env().questions.values()), 12, replace(TINYWIKI_RULES, weights={"outcome": 0.0})
    )
    run = fresh(tmp_path, dapo(3), env=worthless)
    before, learner = weights(run.policy.model), prepare(run)[0]
    metrics = train_step(run, learner, 0)
    assert metrics["sampling_rounds"] == 3
    assert metrics["episodes_played"] == 36
    assert metrics["episodes"] == metrics["groups_with_signal"] == 0
    assert same(before, weights(run.policy.model))


def test_with_igpo_groups_are_kept_by_their_advantages(tmp_path: Path) -> None:
    run = fresh(tmp_path, replace(recipe("igpo+dapo"), sampling_rounds=2), env=tiny_env(12), questions_per_step=4)
    wanted: set[tuple[int, int]] = set()
    equal = 0
    for own in rounds_of(run, 2):
        batch = read(run, own, 0)
        assert batch is not None
        for group, each in by_group(batch.episodes).items():
            rows = batch.only(batch.group == group)
            assert rows is not None
            if float(run.recipe.estimator(rows).abs().max()) > 1e-8 and len({k[0] for k in wanted}) < 4:  # type: ignore[union-attr]
                equal += len({e.total("outcome") for e in each}) == 1
                wanted |= {key(e) for e in each}
    collected = collect(run, begun(run, rate=0.1), 0)
    assert kept_by(collected.batch) == wanted
    assert equal  # groups that DAPO alone would have dropped


class Flaky:
    """Fails every third search."""

    def __init__(self, index: Any) -> None:
        self.index, self.calls = index, 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.calls += 1
        if self.calls % 3 == 0:
            raise SearchFailed("try later")
        return list(self.index.search(queries, k))


def test_failed_searches_are_counted_and_left_out(tmp_path: Path) -> None:
    whole = tiny_env()
    env = SearchVectorEnv(Flaky(whole.index), list(whole.questions.values()), 5, TINYWIKI_RULES)
    run = fresh(tmp_path, env=env)
    metrics = train_step(run, begun(run, rate=0.1), 0)
    assert metrics["episodes"] + metrics["episodes_failed"] == metrics["episodes_played"] == 12
    assert 0 < metrics["episodes_failed"] < 12
    again = fresh(tmp_path, env=SearchVectorEnv(Flaky(whole.index), list(whole.questions.values()), 5, TINYWIKI_RULES))
    collected = collect(again, begun(again, rate=0.1), 0)
    assert collected.batch is not None
    assert len(collected.batch.episodes) == metrics["episodes"]
    assert not any(own.stop.failed for own in collected.batch.episodes)


@pytest.mark.parametrize("name", ["igpo", "dapo", "ppo"])
def test_a_step_whose_searches_all_failed_learns_nothing(name: str, tmp_path: Path) -> None:
    broken = SearchVectorEnv(BrokenIndex(), QUESTIONS, 12, TINYWIKI_RULES)
    run = fresh(tmp_path, name, env=broken)
    learner, _ = prepare(run)
    before = weights(run.policy.model)
    metrics = [train_step(run, learner, step) for step in range(2)]
    assert all(own["episodes"] + own["episodes_failed"] <= own["episodes_played"] for own in metrics)
    assert all(own["episodes_failed"] > 0 for own in metrics)
    if not any(own["episodes"] for own in metrics):
        assert same(before, weights(run.policy.model))


def test_long_episodes_are_punished_on_their_last_turn(tmp_path: Path) -> None:
    run = fresh(tmp_path, replace(recipe("grpo"), overlong=8 / 18))
    run = replace(
        run,
        env=SearchVectorEnv(run.env.index, list(run.env.questions.values()), 12, replace(run.env.rules, max_turns=3)),
    )
    run.policy.max_new_tokens = 6  # so that an episode has at most 18
    batch = scored(run)
    seen = set()
    for own, total in zip(batch.episodes, batch.reward.tolist(), strict=True):
        written = sum(len(turn.action.token_ids) for turn in own.turns)
        wanted = 0.0 if written <= 10 else max((10 - written) / 8, -1.0)
        assert own.channel("overlong")[:-1] == [None] * (len(own.turns) - 1)
        assert own.turns[-1].rewards["overlong"] == pytest.approx(wanted)
        assert total == pytest.approx(own.total("outcome") + wanted)
        seen.add(wanted)
    assert 0.0 in seen
    assert any(-1 < value < 0 for value in seen)


def test_an_episode_that_outgrows_the_model_ends_alone(tmp_path: Path) -> None:
    run = fresh(tmp_path, env=tiny_env(12), max_skipped_updates=0)
    free = rollout(run.env, run.policy, draw_starts(sorted(run.env.questions), run.config, 0))
    lengths = [len(run.policy.encoder.encode(own.conversation).ids) for own in free]
    model = run.policy.model
    model.config.max_position_embeddings = sorted(lengths)[8] + 1
    short = replace(run, policy=tiny_policy(model, run.policy.encoder.tokenizer))
    collected = collect(short, begun(short, rate=0.1), 0)
    assert collected.batch is not None
    by_start = {key(own): own for own in free}
    full = [own for own in collected.batch.episodes if own.stop is Stop.CONTEXT_FULL]
    assert 0 < len(full) < 12
    for own in collected.batch.episodes:
        other = by_start[key(own)]
        if own.stop is not Stop.CONTEXT_FULL:
            assert [turn.action for turn in own.turns] == [turn.action for turn in other.turns]
        else:
            assert [turn.action for turn in own.turns] == [turn.action for turn in other.turns[: len(own.turns)]]
            assert own.turns[-1].observation == ""
            assert own.answer is None
    metrics = train_step(short, begun(short, rate=0.1), 0)
    assert metrics["skipped_updates"] == 0
    assert metrics["episodes"] == 12
    assert all(math.isfinite(value) for value in metrics.values())


def test_what_was_sampled_is_what_is_read(tmp_path: Path) -> None:
    for temperature in (1.0, 0.7):
        run = fresh(tmp_path, "grpo")
        run.policy.temperature = temperature
        batch = scored(run, episodes=rollout(tiny_env(), run.policy, list(tiny_env().questions)[:8]))
        for own, encoded, old in zip(batch.episodes, batch.encoded, batch.old, strict=True):
            mask = torch.tensor(encoded.turn) >= 0
            sampled = torch.tensor([value for turn in own.turns for value in turn.action.logprobs])
            assert_close(old[mask], sampled, atol=2e-4, rtol=0)
            assert not old[~mask].any()
        assert all(own.belief == () for own in batch.episodes)


def test_gains_telescope_and_the_answering_turn_has_none(tmp_path: Path) -> None:
    for own in scored(fresh(tmp_path)).episodes:
        assert len(own.belief) == len(own.turns)
        assert own.channel("info_gain")[-1] is None
        assert own.total("info_gain") == pytest.approx(own.belief[-1] - own.belief[0], abs=1e-6)


def test_the_belief_can_be_in_all_accepted_answers(tmp_path: Path) -> None:
    def beliefs(policy: str, *answers: str) -> list[float]:
        asked = [
            replace(own, question=replace(own.question, answers=answers or own.question.answers[:1])) for own in play(8)
        ]
        both = [
            replace(own, question=replace(own.question, answers=("nothing", own.question.answers[0])))
            for own in play(8)
        ]
        run = fresh(tmp_path, aliases=policy)
        found = scored(run, episodes=asked if policy == "first" else both)
        return [value for own in found.episodes for value in own.belief]

    nothing, gold = beliefs("first", "nothing"), beliefs("first")
    assert beliefs("max") == pytest.approx(list(map(max, nothing, gold)), abs=1e-4)
    assert beliefs("mean") == pytest.approx([(a + b) / 2 for a, b in zip(nothing, gold, strict=True)], abs=1e-4)
    assert max(map(max, nothing, gold)) > min(nothing)


def test_progress_is_the_share_done(tmp_path: Path) -> None:
    run = fresh(tmp_path, "grpo", steps=8)
    seen = [read(run, play(4), step) for step in (0, 6)]
    assert [own.progress for own in seen if own] == [0.0, 0.75]


def test_an_environment_with_channels_pays_as_it_says(tmp_path: Path) -> None:
    env: VectorSearch = paid_env(12, weight=0.5)
    run = fresh(tmp_path, "grpo", env=env)
    collected = collect(run, begun(run, rate=0.1), 0)
    assert collected.batch is not None
    for own, total in zip(collected.batch.episodes, collected.batch.reward.tolist(), strict=True):
        assert total == own.total("outcome") + 0.5 * own.total("search_cost")
