"""The trainer beside others, on a CPU.

    python -m benchmarks.trainer --out benchmarks/results/trainer.json

- update: an optimiser step of GRPO on the same model, episodes and token ids as TRL's GRPOTrainer takes it, of a small
  policy (TinyWiki's, on episodes that it has played) and of a random model of 0.1 billion parameters on episodes of
  one to five turns with replies of some 250 tokens, and on episodes of one length, which have no padding. Both in one
  pass over the batch, with AdamW; losses are compared.
- engines: tokens per second of a rollout over those of the bare engine (`benchmarks/engines.py` has more).
- memory: what log-probabilities of 32,768 tokens over 152,064 words, and their gradient, add to the memory's peak.
- steps: where the time of a step goes, with BM25 over 60,000 passages (`benchmarks/trainer_step.py`), and the power of
  turns, group size and tokens per action that its time grows as.

`update_over_trl`, `rollout_over_engine` and `environment_share` are the worst of each.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from torch import Tensor

from agentgym_ig.commands.console import console
from agentgym_ig.envs.rollout import rollout
from agentgym_ig.indexes import Bm25Index, read_corpus
from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.records import write_json
from agentgym_ig.trainers import Scorer, TrainConfig, recipe
from agentgym_ig.trainers.collect import draw_starts
from agentgym_ig.trainers.experience import Experience
from agentgym_ig.trainers.learner import make_learner
from agentgym_ig.trainers.readout import logprobs_and_entropies
from agentgym_ig.trainers.tinywiki import (
    WARM_START,
    load_policy_model,
    tiny_config,
    tiny_policy,
    training_env,
    training_world,
)
from agentgym_ig.trainers.update import Update
from benchmarks.corpora import PASSAGES
from benchmarks.engines import MODELS, engines
from benchmarks.measure import fresh, side_by_side, where
from benchmarks.trainer_step import model_of as trained_model
from benchmarks.trainer_step import phases

EPISODES = {"tiny": 96, "0.1B": 4, "0.1B, equal lengths": 4}
LENGTHS = {
    "0.1B": ((150, 250), (40, 120), (200, 300), (1, 5)),
    "0.1B, equal lengths": ((200, 200), (80, 80), (250, 250), (2, 2)),
}
"""Tokens of made-up episodes' openings, actions and replies, and turns before the answer: from, to."""
RATE = 1e-6
ROUNDS = {"tiny": 7, "0.1B": 1, "0.1B, equal lengths": 1}


def model_of(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer; that of the larger one is only there to be asked for its padding."""
    small, tokenizer = load_policy_model(WARM_START)
    if name == "tiny":
        return small, tokenizer
    return trained_model(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id), tokenizer


def episodes_of(name: str, vocabulary: int) -> list[Encoded]:
    """Episodes played by the small policy; or made up, with a last action for the answer."""
    if name == "tiny":
        env, policy = training_env(training_world(0), EPISODES[name]), tiny_policy(*load_policy_model(WARM_START))
        starts = draw_starts(sorted(env.questions), tiny_config(0), 0)
        return [policy.encoder.encode(own.conversation) for own in rollout(env, policy, starts)]
    draw, found = random.Random(0), []
    prompt, action, reply, most = LENGTHS[name]
    for _ in range(EPISODES[name]):
        turns = draw.randint(*most)
        parts = [(OBSERVED, draw.randint(*prompt))]
        for turn in range(turns):
            parts += [(turn, draw.randint(*action)), (OBSERVED, draw.randint(*reply))]
        parts[-1] = (turns, draw.randint(*action))
        written = [own for own, length in parts for _ in range(length)]
        found.append(Encoded([draw.randrange(10, vocabulary) for _ in written], written, []))
    return found


def advantages_of(count: int) -> Tensor:
    """(B,) as GRPO would give them: of equal size, half of them below 0."""
    return torch.tensor([1.0, -1.0]).repeat(count // 2)


def ours(name: str) -> tuple[Callable[[], float], Any]:
    """A step of our trainer, which returns its loss; and its model."""
    model, tokenizer = model_of(name)
    encoded = episodes_of(name, model.config.vocab_size)
    config = TrainConfig(micro_batch=len(encoded), learning_rate=RATE)
    learner = make_learner(model, tokenizer, config)
    old = Scorer(model, None, None, batch_size=len(encoded)).score(encoded, [[]] * len(encoded))  # type: ignore[arg-type]
    columns = {
        "old": [own.logprobs for own in old],
        "advantages": [
            torch.full((len(own.ids),), float(a)) for own, a in zip(encoded, advantages_of(len(encoded)), strict=True)
        ],
    }
    learned = Experience(encoded, columns)
    update = Update(learner, replace(recipe("grpo"), kl=0.0, entropy=0.0), config, temperature=1.0, longest=1)
    return lambda: update.step(learned, range(len(encoded)))["policy_loss"], model


def theirs(name: str, folder: Path) -> tuple[Callable[[], float], Any]:
    """The same step of TRL's trainer: its loss, the gradient, the clip and AdamW."""
    import trl

    model, tokenizer = model_of(name)
    encoded = episodes_of(name, model.config.vocab_size)
    begins = [next(place for place, turn in enumerate(own.turn) if turn != OBSERVED) for own in encoded]
    played = {
        "prompt_ids": [own.ids[:at] for own, at in zip(encoded, begins, strict=True)],
        "completion_ids": [own.ids[at:] for own, at in zip(encoded, begins, strict=True)],
        "env_mask": [
            [int(turn != OBSERVED) for turn in own.turn[at:]] for own, at in zip(encoded, begins, strict=True)
        ],
        "logprobs": None,
    }
    config = trl.GRPOConfig(
        str(folder), num_generations=2, per_device_train_batch_size=len(encoded), num_iterations=2, beta=0.0,
        per_device_eval_batch_size=len(encoded), max_completion_length=100_000, loss_type="grpo", learning_rate=RATE,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda prompts, **_: advantages_of(len(prompts)).tolist(), args=config,
        train_dataset=Dataset.from_dict({"prompt": ["."] * len(encoded)}), processing_class=tokenizer,
        rollout_func=lambda prompts, trainer: played,
    )  # fmt: skip
    model.eval()
    made = trainer._generate_and_score_completions([{"prompt": "."} for _ in encoded])
    made["advantages"] = advantages_of(len(encoded))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> float:
        optimizer.zero_grad()
        loss = trainer._compute_loss(model, made)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return step, model


def update(name: str) -> dict[str, Any]:
    """Seconds of a step of both, and what the first two have for losses."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (own, model), (other, _) = ours(name), theirs(name, Path(folder))
        losses = [(own(), other()) for _ in range(2)]
        best = side_by_side({"ours": own, "trl": other}, rounds=ROUNDS[name], warm=True)
    encoded = episodes_of(name, model.config.vocab_size)
    lengths = [len(each.ids) for each in encoded]
    return {
        "parameters": sum(own.numel() for own in model.parameters()),
        "episodes": len(encoded),
        "tokens": sum(lengths),
        "sampled_tokens": sum(turn != OBSERVED for each in encoded for turn in each.turn),
        "padding_share": round(1 - sum(lengths) / (len(lengths) * max(lengths)), 3),
        "seconds": {who: round(took, 4) for who, took in best.items()},
        "tokens_per_s": {who: round(sum(lengths) / took, 1) for who, took in best.items()},
        "over_trl": round(best["trl"] / best["ours"], 3),
        "losses": losses,
    }


WIDTH, VOCABULARY, READ = 896, 152_064, 32_768
"""Of Qwen2.5-0.5B, with the larger models' vocabulary; and the tokens whose log-probabilities are read."""


def read_gradients(tokens: int) -> dict[str, Any]:
    """In a process of its own: MB that log-probabilities of so many tokens, a loss and its gradients add to the peak,
    beyond the hidden states and the weights; computed in bfloat16 over float32 weights, as in training.
    """
    hidden = torch.randn(READ, WIDTH).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5).requires_grad_()
    chosen = torch.randint(VOCABULARY, (READ,))
    before, begun = _memory("VmRSS"), time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        read = hidden[:tokens]
        logprobs, _ = logprobs_and_entropies(read, weight, None, chosen[:tokens])
    loss = -logprobs.mean()
    loss.backward()
    return {
        "tokens": tokens,
        "extra_mb": round(_memory("VmHWM") - before),
        "of_which_gradients_mb": round((weight.nbytes + hidden.nbytes) / 1e6),
        "whole_logits_mb": round(tokens * VOCABULARY * 4 / 1e6),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _memory(name: str) -> float:
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows[name].split()[0]) * 1024 / 1e6


def memory() -> dict[str, Any]:
    """The same for a quarter of the tokens and for all of them: it should not grow with their number."""
    figures = [fresh(read_gradients, tokens)[0] for tokens in (READ // 4, READ)]
    return {"width": WIDTH, "vocabulary": VOCABULARY, "few": figures[0], "all": figures[1]}


def steps() -> dict[str, Any]:
    """Phases of a step on real text, and how its time grows with turns, group size and length of actions."""
    with tempfile.TemporaryDirectory() as scratch:
        index = Bm25Index.build(read_corpus(PASSAGES), Path(scratch) / "index")
        tiny = phases(index, questions=8, model="tiny", **STEP)
        first, *changed = [phases(index, **(STEP | own)) for own in ({}, *GROWTH)]
    laws = {}
    for (name, value), row in zip([pair for own in GROWTH for pair in own.items()], changed, strict=True):
        laws[name] = round(math.log(row["step_s"] / first["step_s"]) / math.log(value / STEP[name]), 2)
    rows = [tiny, first, *changed]
    return {"environment_share": max(row["environment_share"] for row in rows), "grows_as_power": laws, "rows": rows}


STEP: dict[str, Any] = {"turns": 2, "group": 4, "new": 32}
GROWTH: tuple[dict[str, int], ...] = ({"turns": 4}, {"group": 8}, {"new": 64})
"""A step's turns, episodes per question and tokens per action, and what is changed of it, one at a time."""


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="update, memory, steps, engines; all by default.")] = None,
) -> None:
    """Run everything and print it; what is done is written before the next part begins."""
    parts: dict[str, Callable[[], Any]] = {
        "update": lambda: {name: update(name) for name in EPISODES},
        "engines": lambda: {name: engines(make(), 16, 32, continuous=False) for name, make in MODELS.items()},
        "memory": memory,
        "steps": steps,
    }
    figures: dict[str, Any] = where() | {"threads": torch.get_num_threads()}
    if out is not None and out.exists() and only:
        figures |= {name: own for name, own in json.loads(out.read_text()).items() if name not in figures}
    for name in only or parts:
        figures[name] = parts[name]()
        console.print_json(data={name: figures[name]})
        figures |= headline(figures)
        if out is not None:
            write_json(out, figures)


def headline(figures: dict[str, Any]) -> dict[str, float]:
    """The worst of each, of what has been run."""
    found: dict[str, float] = {}
    if "update" in figures:
        found["update_over_trl"] = min(own["over_trl"] for own in figures["update"].values())
    if "engines" in figures:
        found["rollout_over_engine"] = min(own["rollout_over_engine"] for own in figures["engines"].values())
    if "steps" in figures:
        found["environment_share"] = figures["steps"]["environment_share"]
    return found


if __name__ == "__main__":
    typer.run(main)
