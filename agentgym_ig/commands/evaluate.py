"""`agentgym-ig eval`: exact match and F1 of any policy on a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agentgym_ig.commands.console import bar, console, evaluation_table, interruptible
from agentgym_ig.envs.episode import Rules
from agentgym_ig.prompts import with_guide

QuestionsOption = Annotated[
    Path | None, typer.Option(help="Folder with <dataset>.jsonl[.gz] files (not for tinywiki).")
]
IndexOption = Annotated[
    list[str] | None,
    typer.Option(help="Folder or address of the index to search (not for tinywiki); several are fused by their ranks."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
TopKOption = Annotated[int | None, typer.Option(help="Passages per search.")]
MaxTurnsOption = Annotated[int | None, typer.Option(help="Actions per episode.")]
PromptOption = Annotated[str | None, typer.Option(help="Prompt by name: search-r1, igpo (function calls) or tinywiki.")]


def rules_set_by_user(
    top_k: int | None, max_turns: int | None, prompt: str | None, *, guide: bool = False
) -> dict[str, Any]:
    """The fields of `Rules` that the user named; with `guide`, a prompt that asks for self-assessment (Self-Guide)."""
    if guide:
        return rules_set_by_user(top_k, max_turns, None) | {
            "prompt": with_guide(Rules(prompt=prompt or "search-r1").texts)
        }
    given = {"top_k": top_k, "max_turns": max_turns, "prompt": prompt}
    return {name: value for name, value in given.items() if value is not None}


def evaluate(
    policy: Annotated[
        str, typer.Option(help="oracle, search-once, random, or a model: tinywiki, a folder, a hub name.")
    ] = "tinywiki",
    model: Annotated[str | None, typer.Option(help="A model's name or folder; the same as --policy with it.")] = None,
    server: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible server that has the model; key: OPENAI_API_KEY.")
    ] = None,
    suite: Annotated[str, typer.Option(help="tinywiki, igpo or search-r1.")] = "tinywiki",
    questions: QuestionsOption = None,
    index: IndexOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per dataset (tinywiki: 150 unless set).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    episodes: Annotated[Path | None, typer.Option(help="Add every episode to this JSON Lines file as it ends.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Do not play again what --episodes holds already.")] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the most probable token.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per action.")] = 256,
    top_k: TopKOption = None,
    max_turns: MaxTurnsOption = None,
    prompt: PromptOption = None,
    guide: Annotated[
        bool, typer.Option("--guide", help="Ask for self-assessment, as training by self-guide does.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Episodes side by side.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of all random draws, and of TinyWiki's test world.")] = 0,
    device: DeviceOption = "cpu",
) -> None:
    """Evaluate a policy on a suite."""
    from agentgym_ig.commands.parts import open_policy, open_suite, prepare_for_small_models
    from agentgym_ig.envs.evaluate import evaluate as run_evaluation
    from agentgym_ig.records import write_json

    if resume and episodes is None:
        raise ValueError("--resume goes on with a file of episodes; name it by --episodes")
    if episodes is not None and episodes.exists() and not resume:
        raise FileExistsError(f"{episodes} is there already; go on with it by --resume, or give another file")
    asked = open_suite(suite, questions, index, limit, rules_set_by_user(top_k, max_turns, prompt, guide=guide), seed)
    if suite == "tinywiki":
        prepare_for_small_models()
        max_new_tokens = min(max_new_tokens, 16)
    name = model or policy
    acting = open_policy(
        name, asked, device=device, temperature=temperature, max_new_tokens=max_new_tokens, server=server
    )
    total = sum(len(own) for own in asked.questions.values())
    advice = (
        "Every whole episode is saved; go on with the same command and --resume."
        if episodes
        else "Nothing was written; with --episodes FILE a stopped evaluation can go on."
    )
    with interruptible(advice), bar("episodes", total) as advance:
        result = run_evaluation(acting, asked, seed=seed, num_envs=batch, out=episodes, progress=advance)
    console.print(evaluation_table(f"{name} on {suite}, {total:,} questions", {"": result.as_dict()}))
    if out is not None:
        write_json(out, {"policy": name, "seed": seed, "temperature": temperature, **result.as_dict()})
        console.print(f"figures: {out}")
    if episodes is not None:
        console.print(f"episodes: {episodes}")
