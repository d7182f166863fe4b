"""The environments on real text: speed, the oracle's recall, single against vector form, and hostile actions.

    python -m benchmarks.environment --out benchmarks/results/environment.json

The data lie in ../shared/data, or where AGENTGYM_IG_DATA says.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from agentgym_ig import Hit, Question, RandomPolicy, ScriptedPolicy, Trajectory
from agentgym_ig.commands.console import console
from agentgym_ig.commands.parts import open_oracle, open_suite
from agentgym_ig.envs import (
    Evaluation,
    Evidence,
    RepeatQuery,
    Rules,
    SearchCost,
    SearchEnv,
    SearchVectorEnv,
    SelfGuide,
    Suite,
    add_channel,
    rollout,
)
from agentgym_ig.indexes import Bm25Index, Index, read_corpus
from agentgym_ig.policies import Policy
from agentgym_ig.records import write_json
from benchmarks.corpora import PASSAGES, queries
from benchmarks.fuzz import WRONG, fuzz
from benchmarks.measure import where

DATASETS = ("nq", "triviaqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle", "popqa")
TURNS = 5
THOUGHT = "I should find out who that was, and then look for the place where they were born, before I answer."


class Timed:
    """An index that knows how long it was searched."""

    def __init__(self, index: Index) -> None:
        self.index, self.seconds = index, 0.0

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        started = time.perf_counter()
        found = self.index.search(queries, k)
        self.seconds += time.perf_counter() - started
        return found


def _play_steps(env: Any, index: Timed, asked: list[str], steps: int) -> tuple[float, float]:
    """Seconds in `step` and `reset` and, of these, in the index, for `steps` turns of every place."""
    own, number, index.seconds = 0.0, 0, 0.0
    for turn in range(steps):
        said = [
            f"<think>{THOUGHT}</think>\n<search>{asked[(number + i) % len(asked)]}</search>"
            for i in range(env.num_envs)
        ]
        number += env.num_envs
        if turn % TURNS == TURNS - 1:
            said = [f"<think>{THOUGHT}</think>\n<answer>nobody</answer>"] * env.num_envs
        started = time.perf_counter()
        if turn % TURNS == 0:
            env.reset(seed=turn)
        env.step(said)
        own += time.perf_counter() - started
    return own, index.seconds


def speed(index: Index, asked: Sequence[Question], rounds: int = 5) -> dict[str, Any]:
    """Steps per second with the index, and microseconds per episode and step beside it; the best of some rounds."""
    timed, texts, rows = Timed(index), queries(2000), {}
    for num_envs in (1, 16, 256):
        plain: Any = SearchVectorEnv(timed, asked, num_envs, Rules(max_turns=TURNS))
        channels = plain
        for channel in (SearchCost(), RepeatQuery(), Evidence(), SelfGuide()):
            channels = add_channel(channels, channel, weight=0.1)
        steps = max(TURNS, 2000 // num_envs // TURNS * TURNS)
        for name, env in (("plain", plain), ("with four channels", channels)):
            _play_steps(env, timed, texts, TURNS)
            runs = [_play_steps(env, timed, texts, steps) for _ in range(rounds)]
            taken = steps * num_envs
            rows[f"{num_envs} episodes, {name}"] = {
                "steps_per_s": round(taken / min(whole for whole, _ in runs)),
                "index_us_per_step": round(1e6 * min(searched for _, searched in runs) / taken, 1),
                "own_us_per_step": round(1e6 * min(whole - searched for whole, searched in runs) / taken, 1),
            }
    return rows


def oracle_recall(suite: Suite) -> dict[str, Any]:
    """Per dataset the share of supporting passages that the oracle retrieves, and how it got on otherwise."""
    env = suite.env(256)
    played = Evaluation(suite.name, suite.domains, rollout(env, open_oracle(suite), list(env.questions)))
    kept = ("n", "em", "recall", "turns", "answered", "malformed")
    return {name: {key: row[key] for key in kept if key in row} for name, row in played.table().items()}


def _alone(index: Index, question: Question, seed: int, policy: Policy, rules: Rules) -> list[Any]:
    """The steps of one episode in a single environment."""
    env = SearchEnv(index, [question], rules)
    env.reset(seed=seed, options={"question": question.id})
    assert env.episode is not None
    steps: list[Any] = []
    while env.episode.stop is None:
        (action,) = policy([env.episode.conversation])
        assert isinstance(action, str)
        observation, _, _, _, info = env.step(action)
        steps.append((action, observation, dict(info["rewards"]), info["queries"], info["retrieved"]))
    return steps


def _recorded(episode: Trajectory) -> list[Any]:
    return [(t.action.text, t.observation, dict(t.rewards), t.queries, t.retrieved) for t in episode.turns]


def single_against_vector(index: Index, asked: Sequence[Question], count: int = 100) -> dict[str, Any]:
    """How many of the episodes differ between the two forms, for two policies, of `count` questions per dataset."""
    some = [q for name in DATASETS for q in [own for own in asked if own.dataset == name][:count]]
    rules = Rules(max_turns=4)
    scripted = ScriptedPolicy(["<search>film director born</search>", "hm", "<answer>1901</answer>"])
    policies: dict[str, Policy] = {"scripted": scripted, "random": RandomPolicy()}
    differing: dict[str, int] = {}
    for name, policy in policies.items():
        episodes = rollout(SearchVectorEnv(index, asked, 64, rules), policy, some, seed=11, lanes=2)
        alone = [_alone(index, question, 11 + number, policy, rules) for number, question in enumerate(some)]
        differing[name] = sum(_recorded(one) != other for one, other in zip(episodes, alone, strict=True))
    return {"episodes": len(some), "differing": differing}


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    actions: Annotated[int, typer.Option(help="Hostile actions to try.")] = 1_000_000,
) -> None:
    """Run everything and print it."""
    with tempfile.TemporaryDirectory() as scratch:
        index = Bm25Index.build(read_corpus(PASSAGES), Path(scratch) / "index")
        suite = open_suite(
            "igpo", PASSAGES.parent / "questions", [str(Path(scratch) / "index")], None, {"top_k": 3, "max_turns": 12}
        )
        asked = list(suite.env(1).questions.values())
        parts: dict[str, Callable[[], Any]] = {
            "speed": lambda: speed(index, asked),
            "oracle": lambda: oracle_recall(suite),
            "single_against_vector": lambda: single_against_vector(index, asked),
            "hostile_actions": lambda: fuzz(actions),
        }
        figures: dict[str, Any] = where()
        for name, part in parts.items():
            figures[name] = part()
            console.print(name, figures[name])
    if any(figures["hostile_actions"].get(wrong) for wrong in WRONG):
        console.print("[red]hostile actions did what they must not")
    if out is not None:
        write_json(out, figures)


if __name__ == "__main__":
    typer.run(main)
