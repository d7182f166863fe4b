"""One made batch for two libraries: given to TRL's real trainers as a rollout, and read with our own functions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.lm.tiny import tiny_tokenizer
from agentgym_ig.trainers.batch import TokenBatch, pad
from agentgym_ig.trainers.scoring import token_logprobs
from tests.tiny import untrained

QUESTIONS, EACH = 2, 3
TEMPERATURE = 0.8
LONGEST = 16
"""TRL's `max_completion_length`, the constant of its dr_grpo."""

BEHAVIOUR, CURRENT = 1, 2
"""Seeds of the noise that makes of the reference the policy which sampled, and of that one the policy which learns."""


@dataclass(frozen=True)
class Written:
    """An episode. own: for each token of the completion whether the policy wrote it; the others are a tool's."""

    prompt: list[int]
    completion: list[int]
    own: list[bool]
    outcome: float

    @property
    def encoded(self) -> Encoded:
        """A new turn after every hole."""
        turn, turns = 0, []
        for place, own in enumerate(self.own):
            turn += own and place > 0 and not self.own[place - 1]
            turns.append(turn if own else OBSERVED)
        return Encoded(self.prompt + self.completion, [OBSERVED] * len(self.prompt) + turns, [])


def episodes(*, holes: bool = True) -> list[Written]:
    """`EACH` of each question, of unequal lengths; with holes, two of three have tokens of a tool in two places."""
    draw = random.Random(3)
    found = []
    for length in (3, 5):
        prompt = draw.choices(range(3, 200), k=length)
        for size in (6, 9, 12):
            gap = {2, 3, 7} if holes and size > 6 else set()
            completion = draw.choices(range(3, 200), k=size)
            own = [place not in gap for place in range(size)]
            found.append(Written(prompt, completion, own, draw.choice((0.0, 0.25, 0.5, 1.0)) + size / 16))
    return found


def outcomes(batch: Sequence[Written]) -> tuple[Tensor, Tensor]:
    """(B,) outcomes, (B,) ids of the questions."""
    return torch.tensor([each.outcome for each in batch]), torch.arange(len(batch)) // EACH


def stir(model: Any, seed: int, size: float) -> None:
    """Move all weights, the same way for the same seed."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn(weight.shape, generator=drawn)


def policy(*moves: tuple[int, float]) -> Any:
    """Our copy of the reference, moved by seeds and sizes in turn. TRL never has it in its hands."""
    model = deepcopy(untrained("llama"))
    for seed, size in moves:
        stir(model, seed, size)
    return model


def read(model: Any, batch: TokenBatch) -> Tensor:
    """(B, T) log-probabilities of the policy's own tokens."""
    return token_logprobs(model, batch, TEMPERATURE, wanted=batch.sampled)


def padded(batch: Sequence[Written]) -> TokenBatch:
    return pad([each.encoded for each in batch])


def gradient(loss: Tensor, model: Any) -> Tensor:
    """By all weights, as one vector."""
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])


def weights(model: Any) -> Tensor:
    return torch.cat([each.detach().flatten().clone() for each in model.parameters()])


def reward(outcome: list[float], **_: Any) -> list[float]:
    """A TRL reward function: the outcome that stands in the row."""
    return outcome


def trl_trainer(kind: Any, config: Any, folder: Path, batch: Sequence[Written] | None = None, **settings: Any) -> Any:
    """A trainer of TRL that starts from the reference, and whose rollouts are the batch. Without one it samples.

    It takes its own reference policy from the folder. settings: those of its config.
    """
    untrained("llama").save_pretrained(folder / "reference")
    model = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype="float32")
    common: dict[str, Any] = {
        "num_generations": EACH,
        "per_device_train_batch_size": QUESTIONS * EACH,
        "per_device_eval_batch_size": QUESTIONS * EACH,
        "num_iterations": 2,  # with one, TRL takes what it learns from to be on policy and reads no old likelihoods
        "max_completion_length": LONGEST,
        "temperature": TEMPERATURE,
        "shuffle_dataset": False,
        "beta": 0.0,
    }
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    optimizer = settings.pop("optimizer", None)
    hook = {} if batch is None else {"rollout_func": _Rollout(batch)}
    return kind(
        model=model,
        reward_funcs=reward,
        args=config(str(folder / "out"), **(common | quiet | plain | settings)),
        train_dataset=Dataset.from_dict({"prompt": [f"question {i}" for i in range(QUESTIONS)]}),
        processing_class=tiny_tokenizer(),
        optimizers=(optimizer and optimizer(model.parameters()), None),
        **hook,
    )


@dataclass(frozen=True)
class _Rollout:
    """What TRL calls in place of sampling."""

    batch: Sequence[Written]

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        assert len(prompts) == len(self.batch)
        return {
            "prompt_ids": [each.prompt for each in self.batch],
            "completion_ids": [each.completion for each in self.batch],
            "logprobs": None,  # only vLLM's correction, which is off, would look at them
            "env_mask": [[int(own) for own in each.own] for each in self.batch],
            "outcome": [each.outcome for each in self.batch],
        }


def trl_batch(trainer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """What the trainer itself makes of a batch of rows: tokens, masks, likelihoods, advantages.

    In evaluation, where TRL's loss is that of one batch: in training it belongs to a loop that sets what to divide by.
    """
    trainer.model.eval()
    made: dict[str, Tensor] = trainer._generate_and_score_completions([dict(row) for row in rows])
    return made


def trl_mask(made: dict[str, Tensor]) -> Tensor:
    """(B, C) bool over the completions: the policy's own tokens, in the order of ours."""
    return (made["completion_mask"] * made.get("tool_mask", 1)).bool()
