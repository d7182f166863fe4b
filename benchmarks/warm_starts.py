"""Policies for the benchmark of methods to begin with: they find the evidence far more often than they use it.

    python -m benchmarks.warm_starts --out DIR [NAME ...] [--measure]

`h3-s2` answers about 2 % of TinyWiki's 3-hop questions right when it is sampled at temperature 1, although it reads the
article with the answer in about a third of its episodes. `h3-guided` opens every action with Self-Guide's block (arXiv
2604.03098), `<guide>positive</guide>`, whose verdict is right in 70 % of the demonstrations. Two policies stand beside
it: `h3-unguided` was shown the same actions without the block, and ends up right half as often (0.9 % against 1.9 %);
`h3-s2` is right as often, from other demonstrations.

Each goes on from the shipped warm start for some more supervised steps under habits of its own, about a minute on one
core. Weights depend on the name alone (on one kind of processor, with one torch version and one thread). The habits
were chosen by `--measure`, in a validation world, which shares no name with training and test worlds.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from tokenizers import AddedToken

from agentgym_ig.answers import score
from agentgym_ig.commands.console import bar, console
from agentgym_ig.commands.parts import prepare_for_small_models
from agentgym_ig.envs.rollout import Start, rollout
from agentgym_ig.envs.search import SearchVectorEnv
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES, tinywiki_index, tinywiki_questions
from agentgym_ig.guide import VERDICTS, verdict
from agentgym_ig.records import write_json
from agentgym_ig.tinywiki import Path as WorldPath
from agentgym_ig.tinywiki import World
from agentgym_ig.trainers.checkpoint import save_model
from agentgym_ig.trainers.tinywiki import WARM_START, load_policy_model, tiny_policy
from agentgym_ig.trainers.warm_start import WarmStartConfig, imitate, true_verdict
from agentgym_ig.types import Trajectory
from benchmarks.learning import WARM_STARTS

GUIDE_TOKENS = ("<guide>", "</guide>", *VERDICTS)
"""What the small tokenizer lacks: without them a block would take 24 tokens, with them it takes 3."""

SETTINGS = "settings.json"


def _habits(hops: int, answer: float, *, steps: int = 160, right_verdict: float | None = None) -> WarmStartConfig:
    """Finding is as hard at any success, so only the share of right answers among those with the evidence differs."""
    moves: dict[int, dict[str, Any]] = {
        2: {"right": 0.25, "first": 0.20, "again": 0.10, "shares": (0.0, 0.0, 1.0)},
        3: {"right": 0.50, "first": 0.20, "again": 0.10, "shares": (0.0, 0.0, 0.2, 0.8)},
        4: {"right": 0.75, "first": 0.10, "again": 0.05, "shares": (0.0, 0.0, 0.1, 0.2, 0.7)},
    }
    return WarmStartConfig(
        **moves[hops],
        answer=answer,
        wrong_answer=round(0.7 - answer, 3),
        wrong_relation=True,
        right_verdict=right_verdict,
        steps=steps,
        lookup_steps=0,
        batch_size=32,
        seed=10 + hops,
    )


NAMES: dict[str, WarmStartConfig] = {
    "h3-s0.5": _habits(3, 0.0, steps=320),
    "h3-s2": _habits(3, 0.02),
    "h3-s8": _habits(3, 0.18),
    "h2-s0.5": _habits(2, 0.0, steps=400),
    "h2-s2": _habits(2, 0.02, steps=240),
    "h2-s8": _habits(2, 0.24),
    "h4-s0.5": _habits(4, 0.0, steps=310),
    "h4-s2": _habits(4, 0.02, steps=240),
    "h4-s8": _habits(4, 0.15),
    "h3-guided": _habits(3, 0.04, steps=480, right_verdict=0.7),
    "h3-unguided": _habits(3, 0.04, steps=480),
}
"""Name → how the policy is made. `hH-sS` answers about S % of questions of H hops."""


def add_guide_tokens(model: Any, tokenizer: Any, seed: int) -> None:
    """Give a small policy tokens for Self-Guide's block, in place; all it knew keeps its id and weights."""
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in GUIDE_TOKENS])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def make(name: str, folder: Path, *, progress: Callable[[int, float], None] = lambda step, loss: None) -> Path:
    """The policy's model folder, `folder / name`; made unless it is there and of the same settings.

    Raises ValueError for a name that is not in `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"no policy to begin with is called {name!r}; choose one of {', '.join(NAMES)}")
    config, target = NAMES[name], folder / name
    settings = json.loads(json.dumps(asdict(config)))  # tuples as they are read again
    if (target / SETTINGS).is_file() and json.loads((target / SETTINGS).read_text()) == settings:
        return target
    shutil.rmtree(target, ignore_errors=True)
    model, tokenizer = load_policy_model(WARM_START)
    if config.right_verdict is not None:
        add_guide_tokens(model, tokenizer, config.seed)
    imitate(model, tokenizer, config, progress=progress)
    save_model(target, model, tokenizer)
    write_json(target / SETTINGS, settings)  # last: only a whole folder has it
    return target


def hops_of(name: str) -> int:
    """How many hops the questions have that a policy is for."""
    return int(name[1])


def measure(model: Path, hops: int, *, questions: int = 400, samples: int = 4, seed: int = 0) -> dict[str, float]:
    """Shares and means over `questions * samples` sampled episodes in a validation world, and the greedy EM."""
    world = World(seed + 500, "validation")
    asked = tinywiki_questions(world, f"hop{hops}", questions)
    env = SearchVectorEnv(tinywiki_index(world), list(asked), min(512, questions * samples), TINYWIKI_RULES)
    policy = tiny_policy(*load_policy_model(str(model)))
    starts = [
        Start(question.id, group, group * samples + i) for group, question in enumerate(asked) for i in range(samples)
    ]
    episodes = rollout(env, policy, starts)
    policy.temperature = 0
    greedy = _figures(rollout(env, policy, starts[::samples]))["em"]
    verdicts = [right for episode in episodes for right in _verdicts(episode, asked[episode.question], world)]
    share = sum(verdicts) / len(verdicts) if verdicts else math.nan
    return _figures(episodes) | {"right verdicts": share, "greedy EM": greedy}


def _verdicts(episode: Trajectory, path: WorldPath, world: World) -> list[bool]:
    """Whether each verdict of the episode is the true one."""
    names = {passage: name for name, passage in world.passage_ids.items()}
    seen: list[str] = []
    right: list[bool] = []
    for turn in episode.turns:
        given = verdict(turn.action.text)
        right += [] if given is None else [given == true_verdict(path, seen)]
        seen += [names[passage] for passage in turn.retrieved]
    return right


def _figures(episodes: list[Trajectory]) -> dict[str, float]:
    turns = [turn for episode in episodes for turn in episode.turns]
    found = [any(episode.question.supporting[-1] in turn.retrieved for turn in episode.turns) for episode in episodes]
    right = [score("em", episode.answer, episode.question.answers) for episode in episodes]
    counts = {
        "em": sum(right),
        "found": sum(found),
        "em without": sum(own for own, seen in zip(right, found, strict=True) if not seen),
        "turns": len(turns),
        "malformed": sum(any(turn.rewards["format"] < 0 for turn in episode.turns) for episode in episodes),
    }
    return {name: count / len(episodes) for name, count in counts.items()} | {
        "tokens": sum(len(turn.action.token_ids) for turn in turns) / len(turns),
        "guided": sum(verdict(turn.action.text) is not None for turn in turns) / len(turns),
    }


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Policies to make; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of all of them.")] = WARM_STARTS,
    measured: Annotated[
        bool, typer.Option("--measure", help="Play 1,600 episodes with each, and show how well.")
    ] = False,
) -> None:
    """Make the policies that are missing."""
    prepare_for_small_models()
    table = Table("policy")
    for name in names or NAMES:
        with bar(name, NAMES[name].steps if name in NAMES else None) as advance:
            folder = make(name, out, progress=lambda step, loss: advance(step + 1, f"loss {loss:.3f}"))
        if measured:
            row = measure(folder, hops_of(name))
            if not table.row_count:
                for heading in row:
                    table.add_column(heading)
            shares = {
                key: f"{value:.2f}" if key in ("turns", "tokens") else f"{value:.2%}" for key, value in row.items()
            }
            table.add_row(name, *shares.values())
    if measured:
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
