"""`agentgym-ig train`: train any transformers chat model with a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

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
from agentgym_ig.commands.plan import (
    ConfigOption,
    DryRunOption,
    GpuOption,
    GpusOption,
    ShardOption,
    check_processes,
    join_processes,
    leave_processes,
    show_dry_run,
)
from agentgym_ig.lm import CACHED_TOKENS

LoraOption = Annotated[int | None, typer.Option(help="Train a LoRA adapter of this rank, not all weights (peft).")]
Bf16Option = Annotated[bool, typer.Option("--bf16", help="Forward passes in bfloat16; weights stay in float32.")]
AttentionOption = Annotated[
    str | None,
    typer.Option(help="The model's attention kernel: sdpa (the default), flash_attention_2 or flex_attention."),
]
LigerOption = Annotated[bool, typer.Option("--liger", help="Compute by Liger's kernels, on a GPU (liger-kernel).")]
CheckpointingOption = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory for a slower update; results stay the same.")
]


def train(
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    config: ConfigOption = None,
    recipe: Annotated[str, typer.Option(help="A method, or several joined by +, as in igpo+gipo.")] = "igpo",
    model: Annotated[
        str, typer.Option(help="tinywiki (the shipped small policy), a folder or a hub name.")
    ] = "tinywiki",
    suite: Annotated[
        str, typer.Option(help="Trains on the suite's in-domain datasets: tinywiki, igpo, search-r1.")
    ] = "tinywiki",
    questions: QuestionsOption = None,
    index: IndexOption = None,
    steps: Annotated[int | None, typer.Option(help="Batches of episodes (80 for tinywiki, else 100).")] = None,
    questions_per_step: Annotated[int | None, typer.Option(help="8 for tinywiki, else the recipe's.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Episodes per question: 12 for tinywiki.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="5e-4 for tinywiki, else the recipe's.")] = None,
    critic_learning_rate: Annotated[float | None, typer.Option(help="Of PPO's critic.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps over which the learning rate rises.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant_with_warmup, linear or cosine, of the learning rate.")
    ] = None,
    updates_per_step: Annotated[int | None, typer.Option(help="Optimiser steps per batch.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times that a step goes through its batch.")] = None,
    replay: Annotated[int | None, typer.Option(help="Earlier batches learned from again beside each new one.")] = None,
    kl: Annotated[float | None, typer.Option(help="Weight of the KL to the first model; 0 for none.")] = None,
    entropy: Annotated[float | None, typer.Option(help="Weight of the entropy bonus.")] = None,
    lora_rank: LoraOption = None,
    bf16: Bf16Option = False,
    gradient_checkpointing: CheckpointingOption = False,
    attention: AttentionOption = None,
    liger: LigerOption = False,
    micro_batch: Annotated[int | None, typer.Option(help="Episodes per pass: lower it if memory runs out.")] = None,
    engine: Annotated[
        str, typer.Option(help="What generates: transformers, or continuous (its paged batching, for a GPU).")
    ] = "transformers",
    importance_cap: Annotated[
        float | None, typer.Option(help="Correct for an engine that differs from the trainer, by at most this factor.")
    ] = None,
    rollout_batch: Annotated[int, typer.Option(help="Episodes sampled at once: lower it if memory runs out.")] = 128,
    max_cached_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens whose keys and values are kept from turn to turn.")
    ] = CACHED_TOKENS,
    max_skipped_updates: Annotated[int | None, typer.Option(help="Updates not finite that are let pass.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens per action: 16 for tinywiki, else 256.")] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    top_k: TopKOption = None,
    max_turns: MaxTurnsOption = None,
    prompt: PromptOption = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints kept.")] = None,
    log_with: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or trackio; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random draws, and of TinyWiki's training world.")] = 0,
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    dry_run: DryRunOption = False,
    gpu: GpuOption = None,
    gpus: GpusOption = None,
    shard: ShardOption = None,
) -> None:
    """Train a model; writes metrics.jsonl, checkpoints and, at the end, the model."""
    given = dict(locals())
    from agentgym_ig.commands.parts import (
        check_fits_suite,
        open_engine,
        open_recipe,
        open_trainable,
        open_training,
        prepare_for_small_models,
        training_config,
    )
    from agentgym_ig.trainers.loop import Run
    from agentgym_ig.trainers.loop import train as run_training

    device = join_processes(device)
    tiny = suite == "tinywiki"
    if tiny:
        prepare_for_small_models()
    chosen = open_recipe(recipe, suite, kl=kl, entropy=entropy)
    settings, rules = training_config(suite, given, chosen, seed), rules_set_by_user(top_k, max_turns, prompt)
    max_new_tokens = max_new_tokens or (16 if tiny else 256)
    if dry_run:
        show_dry_run(given, chosen, settings, rules, max_new_tokens)
        return
    check_processes(gpus, shard)
    if out is None:
        raise ValueError("give --out FOLDER for the run, or --dry-run to see what it would take")
    env = open_training(suite, questions, index, rules, settings, recipe=chosen, seed=seed)
    policy = open_engine(
        engine,
        *open_trainable(model, device, lora_rank, seed=seed, attention=attention, liger=liger),
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=rollout_batch,
        max_cached_tokens=max_cached_tokens,
    )
    check_fits_suite(policy, suite, chosen, learning_rate)
    run = Run(policy, env, chosen, settings, out, log_with=tuple(log_with or ()))
    advice = "Every whole step is saved; go on with the same command and --resume."
    with interruptible(advice), bar(f"training {recipe}", settings.steps) as advance:
        folder = run_training(run, resume=resume, progress=_shown(advance))
    _finish(folder, suite, questions, index or ())


def _finish(folder: Path, suite: str, questions: Path | None, index: Sequence[str]) -> None:
    """Say what may come next, and have the processes part."""
    places = (f" --questions {questions}" if questions else "") + "".join(f" --index {own}" for own in index)
    console.print(f"trained model: {folder}\nevaluate it: agentgym-ig eval --model {folder} --suite {suite}{places}")
    leave_processes()


def _shown(advance: Callable[[int, str], None]) -> Callable[[int, dict[str, Any]], None]:
    """What to call after each step: moves the bar, and says of each alarm once that it is raised."""
    raised: set[str] = set()

    def note(done: int, metrics: dict[str, Any]) -> None:
        advance(done, f"EM {metrics.get('em', 0):.2f}")
        for alarm in metrics["alarms"]:
            name, _, _ = alarm.partition(":")
            if name not in raised:
                raised.add(name)
                console.print(f"[yellow]step {done}:[/] {alarm}", highlight=False, soft_wrap=True)

    return note
