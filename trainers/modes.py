"""How a model is run: with a gradient but without chance, and without a gradient some episodes at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig

from agentgym_ig.lm.alone import reading
from agentgym_ig.lm.encode import Encoded
from agentgym_ig.trainers.batch import TokenBatch, pad

_CHANCE = re.compile("drop|jitter")
"""In the names of the settings by which training mode differs from evaluation mode in transformers models."""


def without_dropout(model: nn.Module) -> None:
    """Set all dropout to 0, for good, so that the model computes in training mode what it does in evaluation mode.

    Training mode is what transformers checkpoints activations in. Set are dropout modules, and in modules and their
    configurations the numbers named after dropout, or after the jitter of a router: many modules keep a number of
    their own, and some (Falcon, GPT-J) read the configuration each time.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _without_chance(module)
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            _without_chance(config)


def _without_chance(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and _CHANCE.search(name):
            setattr(owner, name, 0.0)


@torch.no_grad()
def read_tokens(
    model: nn.Module, read: Callable[[TokenBatch], Tensor], encoded: Sequence[Encoded], *, batch_size: int
) -> list[Tensor]:
    """What `read` makes of padded episodes, (B, T), cut to (T,) for each, in the order given.

    Without a gradient, the model in evaluation mode, `batch_size` episodes at a time, those of like length together.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row].ids))  # little padding
    found: dict[int, Tensor] = {}
    with reading(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found |= zip(rows, read(pad([encoded[row] for row in rows], device)), strict=True)
    return [found[row][: len(own.ids)] for row, own in enumerate(encoded)]
