"""`agentgym-ig quickstart`: from nothing to a trained search agent and a report, on a laptop CPU."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentgym_ig.commands.console import bar, console, evaluation_table, interruptible

if TYPE_CHECKING:
    from agentgym_ig.envs.evaluate import Evaluation
    from agentgym_ig.envs.suites import Suite
    from agentgym_ig.indexes.bm25 import Bm25Index
    from agentgym_ig.tinywiki import World

VALIDATION_QUESTIONS = 50
"""Questions per dataset of the evaluations during training; they come from a third world."""

NEXT = """
Next, with a real model and real Wikipedia passages (JSON Lines: id, title, text) and questions (`agentgym-ig data
questions all --out questions`, or JSON Lines named after their dataset: id, question, answers):
  agentgym-ig index build --corpus wiki.jsonl.gz --out wiki-index
  agentgym-ig index search --index wiki-index "who directed Metropolis"
  agentgym-ig eval --model Qwen/Qwen2.5-3B-Instruct --device cuda \\
      --suite igpo --questions questions --index wiki-index --limit 100 --out runs/base
  agentgym-ig train --recipe igpo --model Qwen/Qwen2.5-3B-Instruct --device cuda \\
      --suite igpo --questions questions --index wiki-index --out runs/igpo
"""


@dataclass(frozen=True)
class Settings:
    """What a quickstart depends on: a folder holds the state of one."""

    recipe: str
    seed: int
    steps: int
    questions: int
    from_scratch: bool


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything; run again with the same one to go on.")],
    recipe: Annotated[str, typer.Option(help="A method, as for train.")] = "igpo",
    compare: Annotated[bool, typer.Option("--compare", help="Train with GRPO too and show both.")] = False,
    seed: Annotated[int, typer.Option(help="Of the worlds and all random draws.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps of 96 episodes each.")] = 80,
    questions: Annotated[int, typer.Option(help="Test questions per dataset.")] = 150,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Make the warm start anew first (about 5 minutes).")
    ] = False,
) -> None:
    """Build TinyWiki and its index, evaluate the small policy, train it, evaluate again, write a report."""
    from agentgym_ig.commands.parts import prepare_for_small_models
    from agentgym_ig.trainers.tinywiki import tiny_recipe

    prepare_for_small_models()
    if "self_guide" in tiny_recipe(recipe).needs:
        raise ValueError("the shipped policy was never shown how to assess itself; choose another recipe")
    settings = Settings(recipe, seed, steps, questions, from_scratch)
    _claim(out, settings)
    command = (
        f"agentgym-ig quickstart --out {out} --seed {seed} --recipe {recipe} --steps {steps} --questions {questions}"
    )
    command += (" --compare" if compare else "") + (" --from-scratch" if from_scratch else "")
    with interruptible(f"All that is done is kept; go on with: {command}"):
        _run(out, settings, [recipe, *(["grpo"] if compare and recipe != "grpo" else [])])


def _claim(out: Path, settings: Settings) -> None:
    """Note the settings in the folder, or check that they are those it was begun with."""
    path, wanted = out / "settings.json", vars(settings)
    if path.is_file():
        found = json.loads(path.read_text())
        if found != wanted:
            raise ValueError(f"{out} holds a quickstart with {found}, asked for {wanted}; give another --out")
        return
    from agentgym_ig.records import write_json

    out.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _run(out: Path, settings: Settings, recipes: list[str]) -> None:
    from agentgym_ig.report import write_report
    from agentgym_ig.tinywiki import World
    from agentgym_ig.trainers.tinywiki import test_world, tinywiki_suite, training_world

    started = time.perf_counter()
    train_world = training_world(settings.seed)
    train_index = _indexed(train_world, out / "worlds" / "train")
    unseen = test_world(settings.seed)
    suite = tinywiki_suite(unseen, settings.questions, _indexed(unseen, out / "worlds" / "test"))
    validation = tinywiki_suite(World(settings.seed + 500, "validation"), VALIDATION_QUESTIONS)
    start = _warm_start(out, settings)
    columns = {"before": _evaluated(out / "before", start, suite, "before training")}
    for name in recipes:
        model = _trained(out / name, name, settings, start, train_world, train_index, validation)
        columns[f"after {name}"] = _evaluated(out / name / "after", model, suite, f"after {name}")
    with console.status("writing the report"):
        folders = [out / "before", *(out / name for name in recipes)]
        write_report(folders, out / "report.html", title=f"Quickstart: {' and '.join(recipes)} on TinyWiki")
    console.print(evaluation_table("TinyWiki, sampled, entities never seen in training", columns))
    console.print(f"{time.perf_counter() - started:.1f} s. Report: {out / 'report.html'}", soft_wrap=True)
    console.print(NEXT, highlight=False, soft_wrap=True)


def _indexed(world: World, folder: Path) -> Bm25Index:
    """The world's corpus as a file, and an index built from that file, as for any other corpus."""
    from agentgym_ig.envs.tinywiki import TINYWIKI_BM25
    from agentgym_ig.indexes.bm25 import Bm25Index
    from agentgym_ig.indexes.sources import read_corpus
    from agentgym_ig.indexes.store import write_corpus

    if not (folder / "index").exists():
        write_corpus(folder / "corpus.jsonl", world.passages)
        Bm25Index.build(read_corpus(folder / "corpus.jsonl"), folder / "index", TINYWIKI_BM25)
        console.print(f"{len(world.passages)} articles indexed: {folder}")
    return Bm25Index.open(folder / "index")


def _warm_start(out: Path, settings: Settings) -> str:
    """The name or folder of the model to begin with."""
    from agentgym_ig.trainers.checkpoint import save_model
    from agentgym_ig.trainers.tinywiki import WARM_START

    if not settings.from_scratch:
        return WARM_START
    folder = out / "warm_start"
    if not folder.exists():
        from agentgym_ig.trainers.warm_start import WarmStartConfig, warm_start

        config = WarmStartConfig(seed=settings.seed)
        with bar("warm start", config.steps) as advance:
            model, tokenizer = warm_start(config, progress=lambda step, loss: advance(step + 1, f"loss {loss:.2f}"))
        save_model(folder, model, tokenizer)
    return str(folder)


def _evaluated(folder: Path, model: str, suite: Suite, what: str) -> dict[str, Any]:
    """The model's figures on the suite, from the folder if it has been evaluated already."""
    from agentgym_ig.envs.results import save
    from agentgym_ig.envs.run_card import model_revision, run_card
    from agentgym_ig.records import EPISODES_FILE, EVALUATION_FILE, write_episodes
    from agentgym_ig.trainers.scoring import Scorer
    from agentgym_ig.trainers.tinywiki import load_policy_model, tiny_policy

    if (folder / EVALUATION_FILE).is_file():
        figures: dict[str, Any] = json.loads((folder / EVALUATION_FILE).read_text())
        return figures
    policy = tiny_policy(*load_policy_model(model))
    result = _evaluate_with_bar(policy, suite, what)
    # The gain of every turn is shown in the report; on a model as small as this one it is read in a second.
    scorer = Scorer(policy.model, policy.encoder, suite.rules.texts)
    result = replace(result, episodes=scorer.with_beliefs(result.episodes))
    write_episodes(folder / EPISODES_FILE, result.episodes)
    card = {"name": what, "kind": "transformers", "temperature": policy.temperature, **model_revision(model, None)}
    return save(folder, result, run_card(suite, card, seed=0))


def _evaluate_with_bar(policy: Any, suite: Suite, what: str) -> Evaluation:
    from agentgym_ig.envs.evaluate import evaluate

    with bar(what, sum(len(own) for own in suite.questions.values())) as advance:
        return evaluate(policy, suite, progress=advance)


def _trained(
    out: Path, name: str, settings: Settings, start: str, world: World, index: Bm25Index, validation: Suite
) -> str:
    """The folder of the trained model; trains it, or goes on training it, if need be."""
    from agentgym_ig.envs.evaluate import evaluate
    from agentgym_ig.records import METRICS_FILE
    from agentgym_ig.trainers.loop import Run, train
    from agentgym_ig.trainers.tinywiki import load_policy_model, tiny_config, tiny_policy, tiny_recipe, training_env

    folder = out / "model"
    if (folder / "config.json").is_file():
        return str(folder)
    config = tiny_config(settings.seed, settings.steps)
    env = training_env(world, config.questions_per_step * config.group_size, index)
    policy = tiny_policy(*load_policy_model(start))
    run = Run(policy, env, tiny_recipe(name), config, out, lambda p: evaluate(p, validation).domains())
    with bar(f"training {name}", settings.steps) as advance:
        train(
            run,
            resume=(out / METRICS_FILE).exists(),
            progress=lambda done, metrics: advance(done, f"EM {metrics.get('em', 0):.2f}"),
        )
    return str(folder)
