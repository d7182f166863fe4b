"""`agentgym-ig train`: train any transformers chat model with a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentgym_ig.commands.console import bar, console, interruptible
from agentgym_ig.commands.evaluate import (
    DeviceOption,
    IndexOption,
    MaxTurnsOption,
    PromptOption,
    QuestionsOption,
    TopKOption,
    rules_set_by_user,
)


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    recipe: Annotated[str, typer.Option(help="grpo or igpo.")] = "igpo",
    model: Annotated[
        str, typer.Option(help="tinywiki (the shipped small policy), a folder or a hub name.")
    ] = "tinywiki",
    suite: Annotated[
        str, typer.Option(help="Trains on the suite's in-domain datasets: tinywiki, igpo, search-r1.")
    ] = "tinywiki",
    questions: QuestionsOption = None,
    index: IndexOption = None,
    steps: Annotated[int | None, typer.Option(help="Batches of episodes (80 for tinywiki, else 100).")] = None,
    questions_per_step: Annotated[int | None, typer.Option(help="8 for tinywiki, else 32.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Episodes per question: 12 for tinywiki, else 16.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="5e-4 for tinywiki, else 1e-6.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Episodes per pass: lower it if memory runs out.")] = None,
    updates_per_step: Annotated[int | None, typer.Option(help="Optimiser steps per batch.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per action.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    top_k: TopKOption = None,
    max_turns: MaxTurnsOption = None,
    prompt: PromptOption = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int, typer.Option(help="Of all random draws, and of TinyWiki's training world.")] = 0,
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
) -> None:
    """Train a model; writes metrics.jsonl, checkpoints and, at the end, the model."""
    from agentgym_ig.commands.parts import open_training, prepare_for_small_models
    from agentgym_ig.lm.policy import TransformersPolicy
    from agentgym_ig.trainers.loop import Run
    from agentgym_ig.trainers.loop import train as run_training
    from agentgym_ig.trainers.recipes import recipe as recipe_by_name
    from agentgym_ig.trainers.tinywiki import load_policy_model

    chosen = recipe_by_name(recipe)
    given = {
        "steps": steps,
        "questions_per_step": questions_per_step,
        "group_size": group_size,
        "learning_rate": learning_rate,
        "micro_batch": micro_batch,
        "updates_per_step": updates_per_step,
        "save_every": save_every,
    }
    if suite == "tinywiki":
        prepare_for_small_models()
        max_new_tokens = min(max_new_tokens, 16)
    overrides = rules_set_by_user(top_k, max_turns, prompt)
    config, env = open_training(suite, questions, index, overrides, given, seed)
    policy = TransformersPolicy(
        *load_policy_model(model, device), temperature=temperature, max_new_tokens=max_new_tokens
    )
    run = Run(policy, env, chosen, recipe, config, out)
    advice = "Every whole step is saved; go on with the same command and --resume."
    with interruptible(advice), bar(f"training {recipe}", config.steps) as advance:
        folder = run_training(
            run, resume=resume, progress=lambda done, metrics: advance(done, f"EM {metrics.get('em', 0):.2f}")
        )
    console.print(f"trained model: {folder}\nevaluate it: agentgym-ig eval --model {folder} --suite {suite}")
