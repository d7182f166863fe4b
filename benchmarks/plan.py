"""Planned memory against measured memory.

    python -m benchmarks.plan --out benchmarks/results/plan.json

Each case is a process of its own on one thread: a random model, the real learner, and a real rollout, scoring pass and
optimiser step on made-up episodes. `bytes`: weights, gradients and optimiser state as the tensors that are there then
have them; they must be equal to the plan's. `phases`: what the process held at the most in a phase, beyond what it held
before the model was made, in MB; planned over measured is `ratio`. On a GPU: not yet measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from agentgym_ig.commands.console import console
from agentgym_ig.lm.encode import Encoded
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.lm.tiny import tiny_tokenizer
from agentgym_ig.records import write_json
from agentgym_ig.trainers import TrainConfig, recipe
from agentgym_ig.trainers.adapters import with_lora
from agentgym_ig.trainers.critic import Critic
from agentgym_ig.trainers.experience import Experience
from agentgym_ig.trainers.footprint import Sketch
from agentgym_ig.trainers.learner import make_learner, precision
from agentgym_ig.trainers.modes import read_tokens
from agentgym_ig.trainers.plan import Job, plan
from agentgym_ig.trainers.recipes import with_kl
from agentgym_ig.trainers.reference import reference_of
from agentgym_ig.trainers.scoring import token_logprobs
from agentgym_ig.trainers.update import Update
from benchmarks.engines import conversations, endless, played
from benchmarks.measure import fresh, where

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8_000, "tie_word_embeddings": True,
    },
    "0.1b": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4, "vocab_size": 16_000, "tie_word_embeddings": False,
    },
}  # fmt: skip


NEW = 16
"""Tokens of an action."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    family: str = "qwen3"
    shape: str = "0.1b"
    lora_rank: int | None = None
    bf16: bool = False
    checkpointing: bool = False
    reference: bool = False
    critic: bool = False
    rows: int = 2
    tokens: int = 512

    @property
    def turn(self) -> int:
        """Tokens of an episode's opening, and of its one reply."""
        return (self.tokens - 2 * NEW) // 2

    @property
    def settings(self) -> str:
        """The model's configuration."""
        config = AutoConfig.for_model(self.family, max_position_embeddings=4096, **SHAPES[self.shape])
        return str(config.to_json_string(use_diff=False))

    @property
    def job(self) -> Job:
        """What is planned: two micro-batches."""
        return Job(
            model=Sketch(self.settings, self.lora_rank), context=self.tokens, episodes=2 * self.rows,
            micro_batch=self.rows, rollout_batch=self.rows, bf16=self.bf16, checkpointing=self.checkpointing,
            reference=self.reference, critic=self.critic, turn=self.turn,
        )  # fmt: skip


CASES = [
    Case(shape="small"),
    Case(shape="small", bf16=True),
    Case(shape="small", bf16=True, checkpointing=True),
    Case(shape="small", bf16=True, lora_rank=16, checkpointing=True),
    Case(shape="small", checkpointing=True),
    Case(shape="small", lora_rank=16),
    Case(shape="small", reference=True, family="qwen2"),
    Case(shape="small", critic=True, family="llama"),
    Case(),
    Case(family="qwen2", lora_rank=16),
    Case(family="llama", checkpointing=True),
    Case(bf16=True, checkpointing=True),
]


class Resident:
    """This process's memory beyond what it had at first, in bytes."""

    def __init__(self) -> None:
        # Freed blocks go back at once, or what is held would be hidden by what malloc keeps.
        ctypes.CDLL(None).mallopt(-3, 65_536)
        self.first = 0
        self.restart()
        self.first = self.now()

    def restart(self) -> None:
        """Have the peak begin again."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> int:
        """Bytes held."""
        return self._read("VmRSS")

    def peak(self) -> int:
        """The most bytes held since `restart`."""
        return self._read("VmHWM")

    def _read(self, name: str) -> int:
        rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
        return int(rows[name].split()[0]) * 1024 - self.first


def measured(case: Case) -> dict[str, dict[str, int]]:
    """Bytes of a case's tensors, and of the process in each phase."""
    torch.set_num_threads(1)
    # Libraries load, and kernels choose, at their first call.
    _play(replace(case, shape="small", rows=1, tokens=2 * NEW + 16))
    resident = Resident()
    return _play(case, resident)


def _play(case: Case, resident: Resident | None = None) -> dict[str, dict[str, int]]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**json.loads(case.settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if case.lora_rank is not None:
        model = with_lora(model, rank=case.lora_rank, alpha=2 * case.lora_rank)
    settings = TrainConfig(micro_batch=case.rows, bf16=case.bf16, gradient_checkpointing=case.checkpointing)
    chosen = with_kl(recipe("grpo"), 0.001 if case.reference else 0.0)
    reference = reference_of(model) if case.reference else None
    learner = make_learner(model, None, settings, critic=Critic(model) if case.critic else None)
    encoded, columns = _episodes(case, config.vocab_size)
    update = Update(learner, chosen, settings, temperature=1.0, longest=case.tokens)
    phases: dict[str, int] = {}

    def phase(name: str, run: Any) -> None:
        if resident is not None:
            resident.restart()
        run()
        if resident is not None:
            phases[name] = resident.peak()

    def score() -> None:
        with precision(settings, torch.device("cpu")):
            for own in [model] if reference is None else [model, reference.model]:
                _read(own, encoded, case.rows)

    def rollout() -> None:
        policy = endless(TransformersPolicy(model, tiny_tokenizer(), max_new_tokens=NEW, batch_size=case.rows))
        with precision(settings, torch.device("cpu")):
            length = (case.turn, case.turn)
            played(policy, conversations(2 * case.rows, length), 2, length)

    update(Experience(encoded, columns), 0)  # the optimiser's state is made
    gradients = sum(own.nbytes for group in learner.parameters for own in group)
    phase("rollout", rollout)
    phase("scoring", score)
    phase("update", lambda: update(Experience(encoded, columns), 1))
    state = [own for each in learner.optimizer.state.values() for own in each.values()]
    sizes = {
        "weights": sum(own.nbytes for own in model.parameters()),
        "gradients": gradients,
        "optimizer": sum(own.nbytes for own in state if own.dim()),
    }
    return {"bytes": sizes, "phases": phases}


def _read(model: Any, encoded: list[Encoded], rows: int) -> None:
    read_tokens(model, lambda batch: token_logprobs(model, batch, wanted=batch.sampled), encoded, batch_size=rows)


def _episodes(case: Case, vocabulary: int) -> tuple[list[Encoded], dict[str, list[torch.Tensor]]]:
    """Made-up episodes of two micro-batches, all of whose tokens but the first are the policy's."""
    rows = 2 * case.rows
    ids = torch.randint(vocabulary, (rows, case.tokens)).tolist()
    encoded = [Encoded(row, [-1] + [0] * (case.tokens - 1), []) for row in ids]
    ones = [torch.ones(case.tokens) for _ in range(rows)]
    names = ["advantages", "reference", "values", "returns"]
    return encoded, {"old": [-9 * own for own in ones]} | dict.fromkeys(names, ones)


def compared(case: Case) -> dict[str, Any]:
    """A case with what was planned and measured, in MB, and planned over measured."""
    (found, _), asked = fresh(measured, case), plan(case.job)
    critics = {"gradients": 0, "optimizer": 8 * asked.counts.trunk if case.critic else 0}
    planned = {"weights": asked.weights, "gradients": asked.gradients, "optimizer": asked.optimizer}
    planned = {name: own + critics.get(name, 0) for name, own in planned.items()}
    phases = {
        name: {
            "planned_mb": round(asked.phases[name] / 1e6, 1),
            "measured_mb": round(own / 1e6, 1),
            "ratio": round(asked.phases[name] / own, 3),
        }
        for name, own in found["phases"].items()
    }
    said = {name: own for name, own in asdict(case).items() if own}
    return said | {"bytes_equal": planned == found["bytes"], "phases": phases}


def main(out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None) -> None:
    """Measure all cases."""
    rows: list[dict[str, Any]] = []
    for case in CASES:
        rows.append(compared(case))
        console.print_json(data=rows[-1])
        ratios = [own["ratio"] for row in rows for own in row["phases"].values()]
        figures = where() | {"device": "cpu", "cases": rows, "lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
        if out is not None:
            write_json(out, figures)
    console.print(f"planned / measured: {min(ratios)} to {max(ratios)}; GPU: not yet measured")


if __name__ == "__main__":
    typer.run(main)
