"""`agentgym-ig eval` and `agentgym-ig compare`: any policy on a suite, and two evaluations beside each other."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentgym_ig.commands.console import bar, comparison_table, console, figures_table, interruptible
from agentgym_ig.envs.episode import Rules
from agentgym_ig.prompts import with_guide

if TYPE_CHECKING:
    from agentgym_ig.envs.evaluate import Evaluation
    from agentgym_ig.envs.suites import Suite
    from agentgym_ig.policies import Policy

QuestionsOption = Annotated[
    Path | None, typer.Option(help="Folder with <dataset>.jsonl[.gz] files (not for tinywiki and miniwiki).")
]
IndexOption = Annotated[
    list[str] | None,
    typer.Option(help="Folder or address of the index (not for tinywiki and miniwiki); several are fused by ranks."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
TopKOption = Annotated[int | None, typer.Option(help="Passages per search.")]
MaxTurnsOption = Annotated[int | None, typer.Option(help="Actions per episode.")]
PromptOption = Annotated[str | None, typer.Option(help="Prompt by name: search-r1, igpo (function calls) or tinywiki.")]

MODES: dict[str, dict[str, Any]] = {
    "agent": {},
    "closed-book": {"prompt": "closed-book", "max_turns": 1},
    "retrieve-once": {"max_turns": 2},
}
"""What a model may do → the rules that make it so."""


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


@dataclass(frozen=True, kw_only=True)
class _Acting:
    """What the user typed about the policy."""

    name: str
    server: str | None
    mode: str
    temperature: float
    max_new_tokens: int
    device: str
    guide: bool

    def open(self, suite: Suite) -> tuple[Policy, dict[str, Any]]:
        """The policy, and what of it stands in the run card."""
        from agentgym_ig.baselines import SearchFirst
        from agentgym_ig.commands.parts import SCRIPTED, open_policy, open_scripted
        from agentgym_ig.envs.rollout import prompts_of

        if self.name in SCRIPTED and self.server is None:
            if self.mode != "agent":
                raise ValueError(f"--mode is for models; {self.name} is a script")
            return open_scripted(self.name, suite), {"name": self.name, "kind": "script"}
        acting = open_policy(
            self.name,
            device=self.device,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            server=self.server,
        )
        card = {
            **({"name": self.name, "server": self.server} if self.server else _revision(self.name, acting)),
            "kind": "server" if self.server else "transformers",
            "mode": self.mode,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "guide": self.guide,
        }
        return (SearchFirst(acting, prompts_of(suite.env(1))) if self.mode == "retrieve-once" else acting), card


def evaluate(
    policy: Annotated[
        str,
        typer.Option(
            help="oracle, closed-book, retrieve-once, multi-hop, random; or a model: tinywiki, a folder, a hub name."
        ),
    ] = "tinywiki",
    model: Annotated[str | None, typer.Option(help="A model's name or folder; the same as --policy with it.")] = None,
    server: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible server that has the model; key: OPENAI_API_KEY.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="What a model may do: agent, closed-book (no search), retrieve-once (RAG).")
    ] = "agent",
    suite: Annotated[
        str, typer.Option(help="tinywiki, miniwiki, igpo, search-r1, or a YAML file of your own.")
    ] = "tinywiki",
    questions: QuestionsOption = None,
    index: IndexOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per dataset (tinywiki: 150 unless set).")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the episodes, figures, tables (Markdown, CSV) and the run card.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --out; nothing is played again.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin anew in an --out that is in use.")] = False,
    tries: Annotated[int, typer.Option(min=1, help="Episodes per question; several give pass@k and best-of-n.")] = 1,
    gain_model: Annotated[
        str | None, typer.Option(help="Read information gain under this model (folder or hub name); self: the policy.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible server that judges answers.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="That server's name for the judge's model.")] = "default",
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the most probable token.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per action.")] = 256,
    top_k: TopKOption = None,
    max_turns: MaxTurnsOption = None,
    prompt: PromptOption = None,
    guide: Annotated[
        bool, typer.Option("--guide", help="Ask for self-assessment, as training by self-guide does.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Episodes side by side.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of all random draws, and of TinyWiki's test world.")] = 0,
    device: DeviceOption = "cpu",
) -> None:
    """Evaluate a policy on a suite: per dataset, in-domain and out-of-domain, with confidence intervals."""
    from agentgym_ig.commands.parts import how_questions_were_made, open_suite, places_of, prepare_for_small_models
    from agentgym_ig.envs.results import claim
    from agentgym_ig.envs.run_card import run_card

    _check(mode, max_turns, prompt, resume=resume, out=out)
    rules = MODES[mode] | rules_set_by_user(top_k, max_turns, prompt, guide=guide)
    asked = open_suite(suite, questions, index, limit, rules, seed)
    if suite == "tinywiki":
        prepare_for_small_models()
        max_new_tokens = min(max_new_tokens, 16)
    _say_what_is_left_out(asked)
    folder, places = places_of(suite, questions, index)
    acting = _Acting(
        name=model or policy, server=server, mode=mode, temperature=temperature, max_new_tokens=max_new_tokens,
        device=device, guide=guide,
    )  # fmt: skip
    playing, card = acting.open(asked)
    reader = _reader(gain_model, playing, device)
    card = run_card(
        asked, card, seed=seed, tries=tries, index=places or (), questions=how_questions_were_made(folder, asked),
        command=[Path(sys.argv[0]).name, *(each for each in sys.argv[1:] if each not in ("--resume", "--force"))],
        judge=judge and f"{judge_model} at {judge}", gain_model=_revision(gain_model, reader) if gain_model else None,
    )  # fmt: skip
    if out is not None:
        claim(out, card, resume=resume, force=force)
    result = _play(playing, asked, out, seed=seed, tries=tries, batch=batch)
    if reader is not None:
        result = _with_gains(result, asked, out, reader)
    if judge is not None:
        result = _judged(result, out, judge, judge_model)
    _finish(result, card, out)


def _check(mode: str, max_turns: int | None, prompt: str | None, *, resume: bool, out: Path | None) -> None:
    """Refuse options that contradict each other."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    named = {"--max-turns": max_turns, "--prompt": prompt}
    own = {f"--{name.replace('_', '-')}" for name in MODES[mode]}
    if given := [option for option, value in named.items() if value is not None and option in own]:
        raise ValueError(f"--mode {mode} has a {given[0][2:]} of its own; leave out {given[0]}, or --mode")
    if resume and out is None:
        raise ValueError("--resume goes on with a folder; name it by --out")


def _say_what_is_left_out(asked: Suite) -> None:
    if lacking := [name for name in asked.domains if name not in asked.questions]:
        console.print(f"[yellow]no questions of {', '.join(lacking)}: the means are over the others[/]")


def _play(playing: Policy, asked: Suite, out: Path | None, *, seed: int, tries: int, batch: int) -> Evaluation:
    from agentgym_ig.envs.evaluate import evaluate as run_evaluation
    from agentgym_ig.envs.results import note_time
    from agentgym_ig.records import EPISODES_FILE

    total = tries * sum(len(own) for own in asked.questions.values())
    advice = (
        "Every whole episode is saved; go on with the same command and --resume."
        if out
        else "Nothing was written; with --out FOLDER a stopped evaluation can go on."
    )
    begun = time.perf_counter()
    with interruptible(advice), bar("episodes", total) as advance:
        result = run_evaluation(
            playing, asked, seed=seed, tries=tries, num_envs=batch, out=out and out / EPISODES_FILE, progress=advance
        )
    seconds = round(time.perf_counter() - begun, 1)
    console.print(f"{total:,} episodes in {seconds} s")
    if out is not None:
        note_time(out, seconds)
    return result


def _reader(name: str | None, playing: Policy, device: str) -> Any:
    """The model that information gain is read under, opened before anything is played; None for none."""
    from agentgym_ig.baselines import SearchFirst
    from agentgym_ig.commands.parts import open_policy

    if name is None:
        return None
    own = playing.policy if isinstance(playing, SearchFirst) else playing
    reader = own if name == "self" else open_policy(name, device=device, temperature=1.0, max_new_tokens=1)
    if not hasattr(reader, "encoder"):
        raise ValueError("--gain-model self needs a policy that is a transformers model; name a model to read with")
    return reader


def _revision(name: str, acting: Any) -> dict[str, str]:
    """What pins the model of a policy that has one here."""
    from agentgym_ig.envs.run_card import model_revision

    config = getattr(getattr(acting, "model", None), "config", None)
    folder, commit = (getattr(config, own, None) for own in ("_name_or_path", "_commit_hash"))
    return {"name": name, **model_revision(folder or name, commit)}


def _with_gains(result: Evaluation, asked: Suite, out: Path | None, reader: Any) -> Evaluation:
    """The episodes with their belief in the gold answer after every turn, read by a model; once is enough."""
    from agentgym_ig.records import EPISODES_FILE, write_episodes
    from agentgym_ig.trainers.scoring import Scorer

    scorer = Scorer(reader.model, reader.encoder, asked.rules.texts)
    scored = list(result.episodes)
    missing = [place for place, episode in enumerate(scored) if not episode.belief]
    advice = "The episodes are saved; go on with the same command and --resume."
    with interruptible(advice), bar("information gain", len(missing)) as advance:
        for first in range(0, len(missing), 64):
            places = missing[first : first + 64]
            for place, episode in zip(places, scorer.with_beliefs([scored[own] for own in places]), strict=True):
                scored[place] = episode
            advance(first + len(places))
    if out is not None:
        write_episodes(out / EPISODES_FILE, scored)
    return replace(result, episodes=scored)


def _judged(result: Evaluation, out: Path | None, address: str, model: str) -> Evaluation:
    """The evaluation with a judge's verdicts; those of an earlier go are kept."""
    import os

    from agentgym_ig.envs.results import read_verdicts, write_verdicts
    from agentgym_ig.remote import Judge, OpenAIServer

    cases = [(own.question.text, own.question.answers, own.answer) for own in result.episodes]
    verdicts: list[float | None] = [None] * len(cases)
    if out is not None:
        verdicts = read_verdicts(out, result.episodes)
    missing = [place for place, verdict in enumerate(verdicts) if verdict is None]
    advice = "All verdicts so far are saved; go on with the same command and --resume."
    server = OpenAIServer(address, model, api_key=os.environ.get("OPENAI_API_KEY"))
    with server, interruptible(advice), bar("verdicts", len(missing)) as advance:
        ask = Judge(server)
        for first in range(0, len(missing), 256):
            places = missing[first : first + 256]
            for place, verdict in zip(places, ask([cases[own] for own in places]), strict=True):
                verdicts[place] = verdict
            advance(first + len(places))
            if out is not None:
                write_verdicts(out, result.episodes, verdicts)
    if unclear := verdicts.count(None):
        again = "; --resume asks again" if out else ""
        console.print(f"[yellow]The judge gave no verdict on {unclear} answers, which its column leaves out{again}.[/]")
    return replace(result, verdicts=verdicts)


def _finish(result: Evaluation, card: Mapping[str, Any], out: Path | None) -> None:
    from agentgym_ig.envs.results import save

    figures = {"card": dict(card), **result.as_dict()} if out is None else save(out, result, card)
    console.print(figures_table(figures))
    if failed := [episode for episode in result.episodes if episode.stop.failed]:
        again = "; --resume plays them again" if out else ""
        console.print(f"[yellow]{len(failed)} episodes failed ({failed[0].error}) and count as wrong{again}.[/]")
    for name, own in figures.get("pass", {}).items():
        shown = "  ".join(f"pass@{k} {100 * value:.1f}" for k, value in own["pass_at"].items())
        console.print(f"{name}: {shown}  best of {figures['tries']}: F1 {100 * own['best_of']['f1']:.1f}")
    if out is not None:
        console.print(f"figures, tables, episodes and run card: {out}")


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two folders of `agentgym-ig eval --out`.")],
    metric: Annotated[
        str, typer.Option(help="em, f1, cover_em, em_igpo, f1_igpo, recall, judge, searches, ...")
    ] = "em",
    out: Annotated[Path | None, typer.Option(help="Write the comparison to this JSON file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over --out.")] = False,
) -> None:
    """Compare two evaluations question by question: difference with its interval, McNemar's test."""
    from dataclasses import asdict

    from agentgym_ig.envs.evaluate import compare_evaluations
    from agentgym_ig.envs.results import load
    from agentgym_ig.headings import PLAIN
    from agentgym_ig.records import write_json

    if len(runs) != 2:
        raise ValueError(f"found {len(runs)} folders, wanted two: agentgym-ig compare RUN_A RUN_B")
    if out is not None and out.exists() and not force:
        raise FileExistsError(f"{out} is there already; give another file, or --force to write over it")
    first, second = (load(run) for run in runs)
    found = compare_evaluations(first, second, metric)
    scale, unit = (1.0, "") if metric in PLAIN else (100.0, ", percentage points")
    title = f"{metric} of {_name(runs[0])} less {_name(runs[1])}{unit}"
    console.print(comparison_table(title, found, scale=scale))
    if out is not None:
        rows = {name: asdict(own) for name, own in found.items()}
        write_json(out, {"metric": metric, "a": str(runs[0]), "b": str(runs[1]), "parts": rows})


def _name(run: Path) -> str:
    return run.resolve().name
