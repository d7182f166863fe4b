"""Scoring of information gain: packed and online beside one plain forward pass and beside a pass for every turn.

    python -m benchmarks.info_gain --out benchmarks/results/info_gain.json
    python -m benchmarks.info_gain --only tiny

An episode of T turns is a prompt of 200 tokens, then T times an action of about 40 and a reply of about 300, then an
answer of about 40: it has T + 1 beliefs. Forced answers are a prefix of 16 tokens and a gold answer of 8. Tokens are
random, and so are the weights; neither changes what is computed. What is timed, all in one process, in turns:

- forward          one plain pass over the padded episodes: all logits, and from them every token's log-probability
- forward_sampled  the same with logits at the sampled tokens alone
- packed           `Scorer.score`: the sampled tokens' log-probabilities and all beliefs
- online           `OnlineScorer.beliefs` at every turn, all turns together: beliefs alone
- naive            for every belief a pass over what stands before it and the answer: beliefs alone
- padded           the same with every row padded to the longest whole episode, as the IGPO release pads it

All passes use causal attention without a mask; `naive` and `padded` make logits for the gold answer alone. The models
are the TinyWiki policy (1 thread, 2 ragged episodes) and a random one of the size of Qwen2.5-0.5B (2
threads). The large one is compared with forward passes over 2 ragged episodes, and with the slow ways over one, once.
About twelve minutes on two cores that have nothing else to do.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from agentgym_ig.commands.console import console
from agentgym_ig.lm.encode import OBSERVED, Branch, Encoded
from agentgym_ig.lm.tiny import tiny_model
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.records import write_json
from agentgym_ig.trainers import OnlineScorer, Scorer, pad, token_logprobs
from agentgym_ig.trainers.batch import TokenBatch
from agentgym_ig.types import Conversation, Message
from benchmarks.measure import timed, where

PROMPT, ACTION, REPLY, PREFIX, ANSWER = 200, 40, 300, 16, 8
"""Tokens. Actions and replies differ in length by up to a fifth."""

TOLERANCE = 1e-4


def half_billion(dtype: torch.dtype) -> Any:
    """A random model of the size of Qwen2.5-0.5B (494 million parameters, of which 136 million embed tokens)."""
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval().to(dtype=dtype)


class Numbers:
    """Stands for the encoder: every message brings its tokens, and an answer is written as numbers."""

    def encode(self, conversation: Conversation) -> Encoded:
        ids: list[int] = []
        turns: list[int] = []
        decisions: list[int] = []
        for number, message in enumerate(conversation.messages):
            own = message.token_ids or ()
            ids += own
            turns += [number // 2 if message.role == "assistant" else OBSERVED] * len(own)
            if message.role != "assistant":
                decisions.append(len(ids))
        return Encoded(ids, turns, decisions)

    def branch(self, answer: str, prompt: Any) -> Branch:
        return Branch((*range(1, PREFIX + 1), *map(int, answer.split())), ANSWER)


@dataclass(frozen=True)
class Case:
    """A model and episodes of one number of turns."""

    model: Any
    conversations: list[Conversation]
    answers: list[list[str]]

    @property
    def encoded(self) -> list[Encoded]:
        return [Numbers().encode(own) for own in self.conversations]

    def scorer(self, kind: type[Scorer] = Scorer) -> Any:
        return kind(self.model, Numbers(), PROMPTS["search-r1"])  # type: ignore[arg-type]  # all that it is asked for

    @torch.no_grad()
    def forward(self) -> Tensor:
        batch = pad(self.encoded, self.model.device)
        logits = self.model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
        own = logits.gather(-1, batch.ids[:, 1:, None])[..., 0].float() - logits.float().logsumexp(-1)
        return (torch.nn.functional.pad(own, (1, 0)) * batch.sampled).cpu()

    @torch.no_grad()
    def forward_sampled(self) -> Tensor:
        batch = pad(self.encoded, self.model.device)
        return token_logprobs(self.model, batch, wanted=batch.sampled).cpu()

    def packed(self) -> tuple[Tensor, Tensor]:
        scored = self.scorer().score(self.encoded, self.answers)
        logprobs = torch.nn.utils.rnn.pad_sequence([own.logprobs for own in scored], batch_first=True)
        return logprobs.cpu(), torch.tensor([own.beliefs for own in scored])[..., 0]

    def online(self) -> Tensor:
        scorer = self.scorer(OnlineScorer)
        lengths = range(1, len(self.conversations[0].messages), 2)
        shown = [[Conversation(own.messages[:length]) for own in self.conversations] for length in lengths]
        return torch.tensor([scorer.beliefs(now, self.answers) for now in shown])[..., 0].T

    def naive(self) -> Tensor:
        return self.turn_by_turn(0)

    def padded(self) -> Tensor:
        return self.turn_by_turn(max(len(own.ids) for own in self.encoded) + PREFIX + ANSWER)

    @torch.no_grad()
    def turn_by_turn(self, width: int) -> Tensor:
        """A batched pass for every turn, at least `width` tokens wide; (episodes, beliefs)."""
        columns = []
        for decision in range(len(self.encoded[0].decisions)):
            rows = [
                [*own.ids[: own.decisions[decision]], *Numbers().branch(answer, None).ids]
                for own, (answer,) in zip(self.encoded, self.answers, strict=True)
            ]
            batch = pad([Encoded(row, [OBSERVED] * (len(row) - ANSWER) + [0] * ANSWER, []) for row in rows])
            more = (0, max(0, width - batch.ids.shape[1]))
            ids, real = (torch.nn.functional.pad(own, more).to(self.model.device) for own in (batch.ids, batch.real))
            turn = torch.nn.functional.pad(batch.turn, more, value=OBSERVED).to(self.model.device)
            batch = TokenBatch(ids, real, turn)
            columns.append(token_logprobs(self.model, batch, wanted=batch.sampled).double().sum(1) / ANSWER)
        return torch.stack(columns, 1).cpu()


def case(model: Any, turns: int, rows: int) -> Case:
    """Ragged episodes of random tokens; the same for the same numbers."""
    rng = random.Random(turns)
    top = min(model.config.vocab_size, 50_000) - 1

    def tokens(about: int) -> tuple[int, ...]:
        return tuple(rng.randint(1, top) for _ in range(round(about * rng.uniform(0.8, 1.2))))

    conversations = []
    for _ in range(rows):
        messages = [Message("user", "", tuple(rng.randint(1, top) for _ in range(PROMPT)))]
        for _ in range(turns):
            messages += [Message("assistant", "", tokens(ACTION)), Message("tool", "", tokens(REPLY))]
        conversations.append(Conversation((*messages, Message("assistant", "", tokens(ACTION)))))
    answers = [[" ".join(str(rng.randint(1, top)) for _ in range(ANSWER))] for _ in range(rows)]
    return Case(model, conversations, answers)


QUICK = ("forward", "forward_sampled", "packed")
ALL = (*QUICK, "online", "naive", "padded")


def measure(own: Case, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """The median, lowest and highest seconds of each way, their ratios, and how far their results lie apart."""
    took: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name in names:
            found[name], seconds = timed(getattr(own, name))
            took[name].append(seconds)
    logprobs, beliefs = found["packed"]
    gaps = [found[name] - logprobs for name in names if name.startswith("forward")]
    gaps += [found[name] - beliefs for name in names if name in ("online", "naive", "padded")]
    medians = {name: statistics.median(seconds) for name, seconds in took.items()}
    return {
        "episodes": len(own.conversations),
        "tokens": sum(len(encoded.ids) for encoded in own.encoded),
        "rounds": rounds,
        "seconds": {
            name: {"median": round(medians[name], 4), "low": round(min(seconds), 4), "high": round(max(seconds), 4)}
            for name, seconds in took.items()
        },
        "ratios": _ratios(medians),
        "largest_difference": max(float(gap.abs().max()) for gap in gaps),
    }


def _ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Those pairs of ways that were both timed."""
    pairs = [("packed", "forward"), ("packed", "forward_sampled")]
    pairs += [(name, "packed") for name in ("naive", "padded", "online")]
    return {
        f"{above}_over_{below}": round(seconds[above] / seconds[below], 3)
        for above, below in pairs
        if above in seconds and below in seconds
    }


def growth(cases: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, float]:
    """For each way the exponent p of seconds per episode ~ T^p, by least squares on the logarithms."""
    exponents = {}
    for name in ALL:
        points = [
            (math.log(turns), math.log(figures["seconds"][name]["median"] / figures["episodes"]))
            for turns, figures in cases
            if name in figures["seconds"]
        ]
        if len({turns for turns, _ in points}) > 1:
            exponents[name] = round(statistics.linear_regression(*zip(*points, strict=True)).slope, 3)
    return exponents


def tiny() -> dict[str, Any]:
    """The TinyWiki policy, everything at every T."""
    return _table(tiny_model(0).eval(), 1, [(turns, 2, ALL, 3) for turns in (2, 4, 8, 16)])


def half() -> dict[str, Any]:
    """The large model: each way where it tells something, or this would take an hour."""
    slow = ("packed", "online", "naive", "padded")
    plan = [(8, 2, QUICK, 2), (8, 1, slow, 1), (4, 1, ("forward_sampled", *slow[:3]), 1), (2, 1, ALL, 1)]
    return _table(half_billion(torch.float32), 2, plan)


def half_bfloat16() -> dict[str, Any]:
    """What halving the precision changes; results agree to bfloat16 only."""
    return _table(half_billion(torch.bfloat16), 2, [(8, 2, QUICK, 2)])


def on(device: str, episodes: int = 8) -> dict[str, Any]:
    """The large model on another device, in both precisions, everything at every T: what `benchmarks.gpu` runs."""
    plan = [(turns, episodes, ALL, 5) for turns in (2, 4, 8, 16)]
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {name: _table(half_billion(dtype).to(device), 1, plan) for name, dtype in types.items()}


def _table(model: Any, threads: int, plan: Sequence[tuple[int, int, Sequence[str], int]]) -> dict[str, Any]:
    """What the plan's rows of turns, episodes, ways and rounds give; the ratios at T = 8 once more in front."""
    torch.set_num_threads(threads)
    case(model, 1, 1).packed()  # whatever is made at the first call
    cases = [(turns, measure(case(model, turns, rows), names, rounds)) for turns, rows, names, rounds in plan]
    ratios = {name: ratio for turns, figures in cases if turns == 8 for name, ratio in figures["ratios"].items()}
    table = [{"turns": turns, **figures} for turns, figures in cases]
    return {"threads": threads, **ratios, "growth_exponent": growth(cases), "cases": table}


MODELS: dict[str, Callable[[], dict[str, Any]]] = {"tiny": tiny, "0.5B": half, "0.5B bfloat16": half_bfloat16}
USUAL = ("tiny", "0.5B")


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures here; models not run keep theirs.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Models: {', '.join(MODELS)}; the first two by default.")
    ] = None,
) -> None:
    """Time the models and print their figures. Ends with an error if the ways disagree in float32."""
    figures: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {"models": {}}
    for name in only or USUAL:
        console.rule(name)
        table, seconds = timed(MODELS[name])
        figures["models"][name] = where() | {"benchmark_seconds": round(seconds, 1)} | table
        console.print_json(data=figures["models"][name])
    if "0.5B" in figures["models"]:
        figures |= {name: ratio for name, ratio in figures["models"]["0.5B"].items() if "_over_" in name}
    figures |= where()
    exact = [table["cases"] for name, table in figures["models"].items() if "bfloat16" not in name]
    gaps = [own["largest_difference"] for cases in exact for own in cases]
    figures |= {"largest_difference": max(gaps, default=None), "equal": all(gap <= TOLERANCE for gap in gaps)}
    if out is not None:
        write_json(out, figures)
    if not figures["equal"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
