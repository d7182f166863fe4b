"""A model whose weights, gradients and optimiser state are divided among the ranks: PyTorch's FSDP2.

It is chosen by the launcher's configuration (`accelerate launch --config_file`, `distributed_type: FSDP`). In an update
layers gather their weights for the length of their use; a rollout gathers all of them once, in the type that the model
computes in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from agentgym_ig.trainers import ranks


def asked() -> bool:
    """Whether the launcher's configuration asks for shards."""
    return ranks.count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def shard(model: nn.Module, *, bf16: bool) -> None:
    """Divide the model among the ranks, in place, each decoder layer for itself. bf16: what layers compute in."""
    device = next(model.parameters()).device.type
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    mesh = init_device_mesh(device, (ranks.count(),))
    for layer in [own for own in model.modules() if type(own).__name__ in _layers(model)]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _layers(model: nn.Module) -> set[str]:
    """The names of the classes that a model of transformers says are never to be split."""
    return {name for own in model.modules() for name in getattr(own, "_no_split_modules", None) or ()}


def averaged_over(model: Any) -> int:
    """Over how many ranks a backward pass averages the model's gradients by itself; 1 where it does not."""
    return ranks.count() if isinstance(model, FSDPModule) else 1


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """All weights on every rank, so that each may read the model as often as it likes. Does nothing without shards."""
    modules = [own for own in model.modules() if isinstance(own, FSDPModule)]
    for own in modules:
        own.set_reshard_after_forward(False, recurse=False)
        own.unshard()
    try:
        yield
    finally:
        for own in modules:
            own.reshard()
            own.set_reshard_after_forward(own is not modules[0], recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together where it is divided: all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(divided: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which every rank has whole, divided as `divided` is."""
    if not isinstance(divided, DTensor):
        return tensor
    return distribute_tensor(tensor.to(divided.device), divided.device_mesh, divided.placements)


def whole_state(model: Any) -> dict[str, Tensor]:
    """The model's weights, put together on the CPU where they are divided: all ranks must ask. Tied ones stay one."""
    found: dict[tuple[int, torch.Size], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, own in model.state_dict().items():
        here = own.to_local() if isinstance(own, DTensor) else own
        place = here.data_ptr(), own.shape
        if place not in found:
            found[place] = whole(own.detach()).cpu()
        state[name] = found[place]
    return state


def load_whole_state(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put weights that `whole_state` gave into the model, which may be divided among other ranks than it was."""
    own = model.state_dict()
    model.load_state_dict({name: like(own[name], tensor) for name, tensor in tensors.items()})
