"""The reference policy that KL terms keep a model close to: the model as it was when training began."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from agentgym_ig.lm.alone import alone_with
from agentgym_ig.lm.encode import Encoded
from agentgym_ig.trainers.adapters import adapter_state, base_weights, is_adapted, without_adapter
from agentgym_ig.trainers.modes import read_tokens
from agentgym_ig.trainers.packing import packing
from agentgym_ig.trainers.readout import Model
from agentgym_ig.trainers.scoring import token_logprobs

SAMPLE = 65_536
"""Of a larger tensor, `weights_digest` reads between half as many values and this many."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What `reference_of` makes. model: a frozen copy, or the model that is trained, read without its adapter."""

    model: Model

    def logprobs(self, encoded: Sequence[Encoded], *, temperature: float, batch_size: int = 64) -> list[Tensor]:
        """(T,) log-probability of the tokens that the policy wrote, in nats, for each episode; 0 at all others.

        Without a gradient. temperature: that of the policy, or the KL would be between other distributions than
        those that were sampled from.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        with without_adapter(self.model) if is_adapted(self.model) else nullcontext(), packing(self.model):
            return read_tokens(
                self.model,
                lambda batch: token_logprobs(self.model, batch, temperature, wanted=batch.sampled),
                encoded,
                batch_size=batch_size,
            )


def reference_of(model: Model) -> Reference:
    """The model as it is now, as a reference: to be made before training, and before a checkpoint is restored.

    A model with a fresh adapter is its own reference, with the adapter off; any other is copied, on its own device.
    Raises ValueError for an adapter that has been trained, since without it the model is another.
    """
    if is_adapted(model):
        if any("lora_B" in name and tensor.any() for name, tensor in adapter_state(model).items()):
            raise ValueError("the adapter has been trained; begin from merged(model) with a fresh one")
        return Reference(model)
    with alone_with(model):
        return Reference(copy.deepcopy(model).eval().requires_grad_(False))


def weights_digest(model: Model) -> str:
    """SHA-256 of the values of a model's weights, by name, shape and type; of one with an adapter, without that.

    Of a tensor of more than `SAMPLE` values it reads every n-th in the order of memory, with n odd so that all
    columns of a matrix are met. It tells models apart, also after training, but not a change made to hide from it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((base_weights(model) if is_adapted(model) else model.state_dict()).items()):
        values = tensor.detach().flatten()[:: tensor.numel() // SAMPLE | 1]
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
