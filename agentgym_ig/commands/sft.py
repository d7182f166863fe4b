"""`agentgym-ig sft`: fine-tune a model on recorded episodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from agentgym_ig.commands.console import bar, console, interruptible
from agentgym_ig.commands.evaluate import DeviceOption
from agentgym_ig.commands.train import AttentionOption, Bf16Option, CheckpointingOption, LigerOption, LoraOption


def sft(
    episodes: Annotated[
        list[Path],
        typer.Option(exists=True, dir_okay=False, help="The episodes.jsonl of eval --out; may be given several times."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    model: Annotated[
        str, typer.Option(help="tinywiki (the shipped small policy), a folder or a hub name.")
    ] = "tinywiki",
    metric: Annotated[str, typer.Option(help="What an episode's answer is scored by: em, f1, cover_em, ...")] = "em",
    min_score: Annotated[float, typer.Option(help="Learn from episodes that score so much; 0: from all.")] = 1.0,
    as_text: Annotated[
        bool, typer.Option("--as-text", help="Tokenise anew: the episodes are of a model with another tokenizer.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="How often each episode is learned from (3).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Episodes per optimiser step (32).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="1e-3 for tinywiki, else 1e-5.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Leave out longer conversations, and say how many.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Episodes per pass (8): lower it if memory runs out.")] = None,
    lora_rank: LoraOption = None,
    bf16: Bf16Option = False,
    gradient_checkpointing: CheckpointingOption = False,
    attention: AttentionOption = None,
    liger: LigerOption = False,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints (50).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the episodes, and of the adapter.")] = 0,
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
) -> None:
    """Fine-tune a model on recorded episodes; writes metrics.jsonl, checkpoints and, at the end, the model."""
    from agentgym_ig.commands.parts import open_trainable, prepare_for_small_models
    from agentgym_ig.records import read_episodes
    from agentgym_ig.trainers.sft import SftConfig, chosen, retokenised
    from agentgym_ig.trainers.sft import sft as fine_tune
    from agentgym_ig.trainers.tinywiki import WARM_START

    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"{processes} processes were started, and sft learns in one; start it by agentgym-ig sft")
    if small := model == WARM_START:
        prepare_for_small_models()
    given: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate if learning_rate is not None or not small else 1e-3,
        "micro_batch": micro_batch,
        "save_every": save_every,
    }
    given = {name: value for name, value in given.items() if value is not None}
    config = SftConfig(
        max_tokens=max_tokens, bf16=bf16, gradient_checkpointing=gradient_checkpointing, seed=seed, **given
    )
    recorded = [episode for path in episodes for episode in read_episodes(path)]
    kept = chosen(recorded, metric=metric, least=min_score)
    kept = retokenised(kept) if as_text else kept
    console.print(f"{len(kept):,} of {len(recorded):,} episodes have {metric} of {min_score:g} or more")
    tuned, tokenizer = open_trainable(model, device, lora_rank, seed=seed, attention=attention, liger=liger)
    advice = "Every whole step is saved; go on with the same command and --resume."
    with interruptible(advice), bar("epochs", config.epochs) as advance:
        folder = fine_tune(
            tuned,
            tokenizer,
            kept,
            config,
            out,
            resume=resume,
            progress=lambda done, metrics: advance(metrics["epoch"], f"loss {metrics.get('loss', float('nan')):.3f}"),
        )
    console.print(_what_next(folder, out, small), soft_wrap=True)


def _what_next(folder: Path, out: Path, small: bool) -> str:
    suite = "--suite tinywiki" if small else "--suite igpo --questions FOLDER --index FOLDER"
    return (
        f"fine-tuned model: {folder}\nevaluate it: agentgym-ig eval --model {folder} {suite}\n"
        f"train it on: agentgym-ig train --model {folder} {suite} --out {out}-rl"
    )
