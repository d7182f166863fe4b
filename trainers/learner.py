"""All that training changes: made together, saved together and restored together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from agentgym_ig.lm.attention import kernel_of
from agentgym_ig.lm.encode import Encoded
from agentgym_ig.trainers import ranks, sharding
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.critic import Critic
from agentgym_ig.trainers.experience import Experience
from agentgym_ig.trainers.memory import Portion
from agentgym_ig.trainers.modes import without_dropout

Reference = Callable[[Sequence[Encoded]], list[Tensor]]
"""From conversations to the (T,) log-probabilities that the policy's tokens have under the reference model."""


@dataclass(frozen=True)
class Learner:
    """A model in training: the model with its tokenizer, the optimiser and its learning-rate schedule, PPO's critic,
    the reference that it is held to, the batches that are still learned from, oldest first, and how many episodes each
    phase takes in a pass.
    """

    model: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    critic: Critic | None = None
    reference: Reference | None = None
    replay: list[Experience] = field(default_factory=list)
    playing: Portion = field(default_factory=lambda: Portion("rollout", 1))
    scoring: Portion = field(default_factory=lambda: Portion("score", 1))
    updating: Portion = field(default_factory=lambda: Portion("update", 1))

    @property
    def parameters(self) -> list[list[Tensor]]:
        """What is trained: the policy's parameters, then the critic's; each has its gradients clipped on its own."""
        return [group["params"] for group in self.optimizer.param_groups]


def make_learner(model: Any, tokenizer: Any, config: TrainConfig, *, critic: Critic | None = None) -> Learner:
    """A learner at its first step, with AdamW on all parameters that want a gradient.

    With several ranks, and a launcher that asks for it, the model is divided among them (`sharding`).

    The model is left in evaluation mode: with dropout the first update would not be on-policy. Gradient checkpointing
    works in training mode alone, so for that all dropout is taken out instead.
    """
    model.eval()
    if config.gradient_checkpointing:
        for own in [model] if critic is None else [model, critic.trunk]:
            checkpoint_layers(own)
    _check_precision([model] if critic is None else [model, critic])
    if (kernel := kernel_of(model)).startswith("flash") and not config.bf16:
        raise ValueError(f"{kernel} computes in half precision alone: set bf16 (--bf16), or take another kernel")
    if sharding.asked():
        for own in [model] if critic is None else [model, critic]:
            sharding.shard(own, bf16=config.bf16)
    groups = [{"params": [own for own in model.parameters() if own.requires_grad], "lr": config.learning_rate}]
    if critic is not None:
        groups.append({"params": list(critic.parameters()), "lr": config.critic_learning_rate})
    fused = model.device.type == "cuda" or None  # on a GPU: a pass over the parameters, and no copies of them
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    schedule = get_scheduler(config.schedule, optimizer, config.warmup_steps, config.steps)
    if config.warmup_steps:
        next_rate(schedule)  # it begins at 0, which would waste the first batch
    scoring, updating = Portion("score", config.micro_batch), Portion("update", config.micro_batch)
    return Learner(model, tokenizer, optimizer, schedule, critic, scoring=scoring, updating=updating)


def checkpoint_layers(model: Any) -> None:
    """Have a model keep only what goes into each layer for the backward pass, and make the rest anew; no dropout."""
    without_dropout(model)
    with warnings.catch_warnings():  # transformers 5.23 prefers a name that 5.17 has not
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def _check_precision(models: Sequence[Any]) -> None:
    types = {str(own.dtype) for model in models for own in model.parameters() if own.requires_grad}
    types -= {"torch.float32", "torch.float64"}
    if types:
        raise ValueError(
            f"weights to be trained are {', '.join(sorted(types))}, in which small steps round away; load the model"
            " with dtype='float32', and compute in bfloat16 by TrainConfig(bf16=True)"
        )


def next_rate(schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Move a learning-rate schedule on by one step, whether or not the optimiser took one: an update may be skipped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler", UserWarning)
        schedule.step()


def take_step(learner: Learner, losses: Sequence[float], max_grad_norm: float) -> list[float]:
    """Clip the gradients of the policy, and of the critic if there is one, and take the optimiser's step.

    Returns their norms before the clip. Raises FloatingPointError, before any weight has changed, when one of them or
    of the losses is not finite.
    """
    if sharding.averaged_over(learner.model) == 1:
        ranks.add_up(own.grad for group in learner.parameters for own in group)
    clipped = (torch.nn.utils.clip_grad_norm_(own, max_grad_norm) for own in learner.parameters)
    norms = [float(sharding.whole(norm)) for norm in clipped]
    if not all(map(math.isfinite, (*losses, *norms))):
        raise FloatingPointError(f"losses {list(losses)} or gradient norms {norms} are not finite")
    learner.optimizer.step()
    return norms


def precision(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Forward passes in bfloat16 where the config asks for it, the weights and the optimiser staying as they are.

    One context for each phase of a step: within one, autocast keeps its bfloat16 copies of the weights.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16)
