"""Real Wikipedia passages and real questions, end to end on a CPU.

    python -m benchmarks.real_data --out benchmarks/results/real_data.json

Builds a BM25 index over 60,000 passages, measures its recall, plays four policies over the questions of seven
datasets, and reads the information gain of oracle episodes under the small shipped policy (whose beliefs about
real text are worthless; what is shown is that the whole path works on it). The data lie in ../shared/data, or
where AGENTGYM_IG_DATA says: `corpus.jsonl.gz` and `questions/<dataset>.jsonl.gz`.
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agentgym_ig.commands.console import console
from agentgym_ig.commands.parts import open_oracle, open_scripted, open_suite, prepare_for_small_models
from agentgym_ig.envs import Start, Suite, evaluate, rollout
from agentgym_ig.envs.run_card import run_card
from agentgym_ig.indexes import Bm25Index, read_corpus
from agentgym_ig.indexes.evaluate import evaluate_retrieval
from agentgym_ig.records import write_json
from agentgym_ig.trainers import Scorer
from agentgym_ig.trainers.tinywiki import WARM_START, load_policy_model, tiny_policy
from benchmarks.corpora import DATA
from benchmarks.measure import where


def build(folder: Path) -> dict[str, float]:
    """Build the index; seconds and peak resident memory in GB."""
    started = time.perf_counter()
    index = Bm25Index.build(read_corpus(DATA / "corpus.jsonl.gz"), folder)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"passages": len(index), "build_s": round(seconds, 1), "peak_gb": round(peak, 2)}


def suite(folder: Path) -> Suite:
    """All questions of the seven datasets over the index."""
    return open_suite("igpo", DATA / "questions", [str(folder)], None, {"top_k": 3})


def recall_at_10(asked: Suite) -> dict[str, float]:
    """Per dataset, the mean share of a question's supporting passages among the ten best for its own words."""
    return {
        dataset: round(evaluate_retrieval(asked.index, questions, [10])["recall"]["10"], 4)
        for dataset, questions in asked.questions.items()
        if any(question.supporting for question in questions)
    }


POLICIES = ("closed-book", "retrieve-once", "multi-hop", "oracle")


def play(asked: Suite) -> dict[str, Any]:
    """All figures, with intervals, of four policies that need no model; seconds are of playing and of scoring."""
    played: dict[str, Any] = {}
    for name in POLICIES:
        started = time.perf_counter()
        found = evaluate(open_scripted(name, asked), asked, num_envs=256)
        between = time.perf_counter()
        figures = found.as_dict()
        played[name] = figures | {
            "play_s": round(between - started, 1),
            "score_s": round(time.perf_counter() - between, 1),
        }
    return played


def information_gain(asked: Suite, per_dataset: int = 6) -> dict[str, Any]:
    """Oracle episodes with their gain per turn, read by the small policy in one packed pass each."""
    narrow = replace(asked, rules=replace(asked.rules, top_k=1))
    starts = [
        Start(question.id, 0, 0)
        for questions in asked.questions.values()
        for question in [q for q in questions if q.supporting][:per_dataset]
    ]
    episodes = rollout(narrow.env(16), open_oracle(narrow), starts)
    policy = tiny_policy(*load_policy_model(WARM_START))
    started = time.perf_counter()
    scored = Scorer(policy.model, policy.encoder, narrow.rules.texts, batch_size=2).with_beliefs(episodes)
    gains: dict[str, list[float]] = {}
    for episode in scored:
        gains.setdefault(episode.question.dataset, []).append(episode.total("info_gain"))
    return {
        "episodes": len(scored),
        "turns_scored": sum(len(episode.belief) for episode in scored),
        "seconds": round(time.perf_counter() - started, 1),
        "mean_gain_nats": {name: round(sum(own) / len(own), 4) for name, own in gains.items()},
    }


def _table(figures: dict[str, Any]) -> Table:
    """EM of every policy, and recall of those that search, per dataset and domain."""
    searching = [name for name in POLICIES if name != "closed-book"]
    headings = [f"EM {name}" for name in POLICIES[:-1]] + [f"recall {name}" for name in searching]
    table = Table("dataset", "n", "recall@10", *headings, "gain, nats", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    datasets = figures["policies"]["oracle"]["datasets"]
    for name in (*datasets, "in_domain", "out_of_domain", "all"):
        rows = {policy: own["datasets"].get(name) or own[name] for policy, own in figures["policies"].items()}
        shown = [figures["recall@10"].get(name), *(rows[policy]["em"] for policy in POLICIES[:-1])]
        shown += [rows[policy].get("recall") for policy in searching]
        shown.append(figures["info_gain"]["mean_gain_nats"].get(name))
        count = str(rows["oracle"].get("n", ""))
        table.add_row(name, count, *("" if own is None else f"{own:.3f}" for own in shown))
    return table


def main(out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None) -> None:
    """Run everything and print it."""
    prepare_for_small_models()
    with tempfile.TemporaryDirectory() as scratch:
        figures: dict[str, Any] = where()
        figures["index"] = build(Path(scratch) / "index")
        asked = suite(Path(scratch) / "index")
        figures["recall@10"] = recall_at_10(asked)
        figures["card"] = run_card(asked, {"name": "scripts"}, seed=0)
        figures["policies"] = play(asked)
        figures["info_gain"] = information_gain(asked)
    console.print(figures["index"])
    console.print(_table(figures))
    if out is not None:
        write_json(out, figures)


if __name__ == "__main__":
    typer.run(main)
