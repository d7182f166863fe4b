"""`agentgym-ig train --dry-run` and `--config`: what a run would take, and options from files."""

from __future__ import annotations

import atexit
import json
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agentgym_ig.commands.console import console
from agentgym_ig.records import METRICS_FILE

if TYPE_CHECKING:
    from agentgym_ig.envs.episode import Rules
    from agentgym_ig.trainers.config import TrainConfig
    from agentgym_ig.trainers.plan import Gpu, Job, Plan
    from agentgym_ig.trainers.recipes import Recipe

NOT_IN_FILES = ("config", "help")


def use_config(context: typer.Context, names: list[str] | None) -> list[str] | None:
    """Have the options that presets and files say be the command's defaults: what is typed wins over them."""
    if names:
        from agentgym_ig.presets import read_options

        parameters = {option.lstrip("-"): own.name for own in context.command.params for option in own.opts}
        allowed = [name for name in parameters if name not in NOT_IN_FILES]
        said = {parameters[name]: value for name, value in read_options(names, allowed).items()}
        context.default_map = {**(context.default_map or {}), **said}
    return names


ConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        help="A preset's name, or a YAML file of options; may be repeated: later ones win, typed options over all.",
        is_eager=True,
        callback=use_config,
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the memory, tokens and FLOPs that the run would take, and end.")
]
GpuOption = Annotated[
    str | None, typer.Option(help="What --dry-run plans for: a GPU's name, as h100 or a100-80, or its memory in GB.")
]
GpusOption = Annotated[int | None, typer.Option(min=1, help="How many GPUs: one process each.")]
ShardOption = Annotated[
    str | None, typer.Option(help="On several GPUs: ddp (a whole copy on each) or fsdp (weights cut into parts).")
]


def join_processes(device: str) -> str:
    """Be one of the processes that a launcher has started, if one has; the first alone speaks. Returns its device."""
    from agentgym_ig.trainers import ranks

    device = ranks.join(device)
    console.quiet = not ranks.first()
    return device


def leave_processes() -> None:
    """Have the group end when the command's model is out of scope: at the end of the program."""
    from agentgym_ig.trainers import ranks

    atexit.register(ranks.leave)


def check_processes(gpus: int | None, shard: str | None) -> None:
    """Raise ValueError where a run meant for several GPUs was started otherwise. None is as it was started."""
    from agentgym_ig.trainers import ranks, sharding

    wanted, asked = gpus or ranks.count(), shard or ("fsdp" if sharding.asked() else "ddp")
    if ranks.count() == wanted and (wanted == 1 or sharding.asked() == (asked == "fsdp")):
        return
    with as_file(files("agentgym_ig.launch") / f"{asked}.yaml") as config:
        start = f"accelerate launch --config_file {config} --num_processes {wanted} -m agentgym_ig train ..."
    raise ValueError(
        f"this run has {ranks.count()} process{'' if ranks.count() == 1 else 'es'}"
        f"{' with fsdp' if sharding.asked() else ''}, and --gpus {wanted} --shard {asked} was asked for; start it by"
        f" {start if wanted > 1 else 'agentgym-ig train ...'}, or look at the plan alone by --dry-run"
    )


def planned_job(
    given: Mapping[str, Any], recipe: Recipe, config: TrainConfig, rules: Rules, *, max_new_tokens: int
) -> Job:
    """The job that the command's options, those of `train` by name, make. Only the model's configuration is read."""
    from agentgym_ig.trainers.footprint import sketch
    from agentgym_ig.trainers.plan import Job, longest_context, within_model
    from agentgym_ig.trainers.tinywiki import WARM_START, warm_start_folder

    name = str(warm_start_folder()) if given["model"] == WARM_START else given["model"]
    model = sketch(name, lora_rank=given["lora_rank"])
    context, turn = longest_context(
        rules.texts,
        max_turns=rules.max_turns,
        top_k=rules.top_k,
        max_new_tokens=max_new_tokens,
        max_observation=rules.max_observation,
    )
    return Job(
        model=model,
        context=within_model(context, model),
        episodes=config.questions_per_step * config.group_size,
        micro_batch=config.micro_batch,
        rollout_batch=given["rollout_batch"],
        bf16=config.bf16,
        checkpointing=config.gradient_checkpointing,
        reference="reference" in recipe.needs,
        critic="values" in recipe.needs,
        belief="info_gain" in recipe.needs,
        passes=config.epochs * (1 + config.replay),
        turn=turn,
        max_cached_tokens=given["max_cached_tokens"],
        gpus=given["gpus"] or 1,
        shard=given["shard"] or "ddp",
    )


def show_dry_run(
    given: Mapping[str, Any], recipe: Recipe, config: TrainConfig, overrides: Mapping[str, Any], max_new_tokens: int
) -> None:
    """Print what a run with the command's options would take; overrides: fields of `Rules` that the user set."""
    from agentgym_ig.commands.parts import training_rules
    from agentgym_ig.trainers.plan import gpu_of

    rules = training_rules(given["suite"], overrides, recipe)
    job = planned_job(given, recipe, config, rules, max_new_tokens=max_new_tokens)
    gpu = gpu_of(given["gpu"]) if given["gpu"] else None
    show_plan(job, gpu, indexes=given["index"] or (), out=given["out"])


def show_plan(job: Job, gpu: Gpu | None, *, indexes: Sequence[str], out: Path | None) -> None:
    """Print what a job takes, whether it fits, and what to lower if not."""
    from agentgym_ig.trainers.plan import plan, usable, what_to_lower

    with console.status("running the model on fake tensors"):
        made = plan(job)
        table = memory_table(made)
    console.print(table, phase_table(made, gpu), step_table(made, gpu, indexes, out))
    if gpu is None:
        console.print("Give --gpu NAME, or --gpu GIGABYTES, to see whether it fits.")
        return
    room, (phase, most) = usable(gpu) / 1e9, made.peak
    verdict = "[green]fits[/]" if made.fits(gpu) else "[red]does not fit[/]"
    console.print(
        f"{gpu.name}: {verdict}. The {phase} needs {_gb(most)} GB on each GPU, and {room:.3g} of"
        f" {gpu.memory:g} GB are planned with. Planned, not measured."
    )
    if not made.fits(gpu):
        console.print("What to lower, one after the other: " + "; ".join(what_to_lower(job, gpu)))


def memory_table(made: Plan) -> Table:
    """What is held, in GB on each GPU."""
    from agentgym_ig.trainers.plan import update_activations

    job, table = made.job, _table("memory on each GPU", "GB", "what")
    other = update_activations(job, checkpointing=not job.checkpointing)
    how = ("with checkpointing", "without checkpointing")
    chosen, against = how if job.checkpointing else how[::-1]
    rows = {
        "weights": (made.weights, "float32"),
        "gradients": (made.gradients, "float32, while an update runs"),
        "optimizer": (made.optimizer, "AdamW, two moments in float32"),
        "reference copy": (made.reference, "for the KL; an adapter is taken off instead"),
        "critic": (made.critic, "weights and optimiser"),
        "gathered weights": (made.gathered, "embeddings and two layers of the other GPUs' parts"),
        "rollout copy": (made.rollout_copy, "all weights, while episodes are sampled"),
        "activations": (made.activations, f"{chosen}: {job.micro_batch:,} x {job.context:,} tokens"),
        f"({against})": (other, "instead of the line above"),
        "logits, loss": (made.logits, "in tiles; with the output layer's own gradient"),
        "keys and values": (made.cache, f"of the rollout: {job.sampled:,} x {job.context:,} tokens, and those kept"),
        "sampling": (made.sampling, "reading contexts, and choosing tokens"),
    }
    for name, (size, what) in rows.items():
        if size:
            table.add_row(name, _gb(size), what)
    return table


def phase_table(made: Plan, gpu: Gpu | None) -> Table:
    """The peak of each phase."""
    from agentgym_ig.trainers.plan import usable

    table = _table("peak of each phase, on each GPU", "GB", "")
    for name, size in made.phases.items():
        over = gpu is not None and size > usable(gpu)
        table.add_row(name, _gb(size), "[red]too much[/]" if over else "")
    return table


def step_table(made: Plan, gpu: Gpu | None, indexes: Sequence[str], out: Path | None) -> Table:
    """Parameters, tokens and arithmetic of a step, and the index."""
    from agentgym_ig.trainers.plan import MFU

    job, table = made.job, _table("a step, on all GPUs", "", "")
    table.add_row("parameters", f"{made.counts.parameters / 1e6:,.1f} M", f"{made.counts.trained / 1e6:,.1f} M trained")
    table.add_row("tokens at most", f"{made.tokens:,}", f"{job.episodes:,} episodes of {job.context:,}")
    if (written := _written(out)) is not None:
        table.add_row("written per episode", f"{written:,.0f}", f"tokens, mean of the last steps of {out}")
    flops = ", ".join(f"{name} {own / 1e15:.3g}" for name, own in made.flops.items())
    table.add_row("PFLOP at most", f"{sum(made.flops.values()) / 1e15:.4g}", flops)
    if gpu is not None and (seconds := made.seconds(gpu)) is not None:
        peak = f"{MFU:.0%} of {gpu.tflops:,.0f} TFLOP/s"
        table.add_row("seconds", f"{seconds:.4g}", f"those FLOPs at {peak}: arithmetic, not measured")
    for index in indexes:
        size = index_bytes(index)
        what = "behind an address" if size is None else "of files, in the machine's memory or mapped from its disk"
        table.add_row("index", "" if size is None else f"{size / 1e9:,.2f} GB", what)
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", min_width=24)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place else "right", min_width=9)
    return table


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f}" if size >= 1e8 else f"{size / 1e9:.2g}"


def index_bytes(index: str) -> int | None:
    """Bytes of an index folder's files; None for an address. Raises FileNotFoundError for no such folder."""
    if index.startswith(("http://", "https://")):
        return None
    if not Path(index).is_dir():
        raise FileNotFoundError(f"no index folder {index}; build one: agentgym-ig index build --out {index}")
    return sum(path.stat().st_size for path in Path(index).rglob("*") if path.is_file())


def _written(out: Path | None, steps: int = 10) -> float | None:
    """Tokens that the policy wrote per episode in the last steps of a run, if the folder holds one."""
    if out is None or not (out / METRICS_FILE).is_file():
        return None
    rows = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()[-steps:]]
    found = [row["tokens_per_episode"] for row in rows if "tokens_per_episode" in row]
    return sum(found) / len(found) if found else None
