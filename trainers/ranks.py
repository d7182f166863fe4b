"""Several processes that train one model: who does which rows, and what they tell each other.

`accelerate launch` (or torchrun) starts the processes, `join` makes them a group, and `leave` ends it; without them
there is one rank, and everything here does nothing. Each rank plays its own groups of episodes. Then all of them know
all episodes, so that advantages, denominators and metrics are those of one process, and each learns from its own rows,
of about as many tokens as every other's. Nothing that is sent is pickled.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from agentgym_ig.records import plain_number

Row = TypeVar("Row")

_joined = False
"""Whether `join` has made this process one of several; a host such as TRL has processes that know nothing of this."""

BUCKET = 2**24
"""Gradients that are added up over ranks at once: 64 MB in float32."""


def join(device: str) -> str:
    """Become one of the ranks that the launcher has started, if one has; returns the device of this rank.

    device: as the user named it; of several GPUs, each rank takes its own.
    """
    global _joined
    if not dist.is_torchelastic_launched():
        return device
    from accelerate import PartialState

    _joined = True
    state = PartialState(cpu=device == "cpu")
    return device if device == "cpu" else str(state.device)


def leave() -> None:
    """End the group; for every rank, when none has more to say. Not after an error: others may wait for this one.

    A thread of gloo that gives a tensor back while Python shuts down aborts the process, and the launcher then takes a
    finished run for one that failed. The threads end with the last object that holds the group, as a module under DDP
    does: call this where the model is out of scope. DTensor's caches hold it for good; there the barrier, which has no
    tensors, is what the threads have done last.
    """
    global _joined
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()
    _joined = False


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _joined else 1


def own() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if _joined else 0


def first() -> bool:
    """Whether this rank is the one that writes files."""
    return own() == 0


def wait() -> None:
    """Until all ranks are here."""
    if count() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks: numbers, texts, lists and dicts of them, as JSON has them."""
    if count() == 1:
        return [value]
    payload = torch.tensor(np.frombuffer(json.dumps(value, default=plain_number).encode(), np.uint8)).to(_device())
    lengths = [torch.zeros(1, dtype=torch.long, device=payload.device) for _ in range(count())]
    dist.all_gather(lengths, torch.tensor([len(payload)], device=payload.device))
    longest = max(int(length) for length in lengths)
    found = [payload.new_zeros(longest) for _ in lengths]
    dist.all_gather(found, torch.nn.functional.pad(payload, (0, longest - len(payload))))
    return [json.loads(bytes(own[: int(n)].cpu().numpy())) for own, n in zip(found, lengths, strict=True)]


def any_of(flag: bool) -> bool:
    """Whether it is true on any rank; the same answer on all."""
    return any(gather(flag))


def sums(parts: Mapping[str, float]) -> dict[str, float]:
    """Named numbers added up over the ranks; one that a rank has not is 0 there."""
    every = gather(dict(parts))
    names = dict.fromkeys(name for part in every for name in part)
    return {name: math.fsum(part.get(name, 0.0) for part in every) for name in names}


def add_up(gradients: Iterable[Tensor | None]) -> None:
    """Put into each gradient its sum over the ranks. None, and there alike on all ranks, is left."""
    if count() == 1:
        return
    waiting: list[Tensor] = []
    for gradient in gradients:
        if gradient is not None:
            waiting.append(gradient)
        if sum(own.numel() for own in waiting) >= BUCKET:
            _add_up(waiting)
            waiting = []
    _add_up(waiting)


def _add_up(gradients: Sequence[Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([own.flatten() for own in gradients])
    dist.all_reduce(flat)
    for own, total in zip(gradients, flat.split([own.numel() for own in gradients]), strict=True):
        own.copy_(total.view_as(own))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def shares(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Rows for each of `parts`, all of them once, with about as many tokens in each: the longest row first, always to
    the part that has the fewest tokens yet.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        least = min(range(parts), key=lambda part: (tokens[part], part))
        found[least].append(row)
        tokens[least] += lengths[row]
    return [sorted(rows) for rows in found]


def read_rows(
    lengths: Sequence[int],
    read: Callable[[list[int]], Sequence[Row]],
    *,
    encode: Callable[[Row], Any],
    decode: Callable[[Any], Row],
) -> list[Row]:
    """What `read` makes of each row, where every rank reads its share; `encode` and `decode` make it JSON and back."""
    if count() == 1:
        return list(read(list(range(len(lengths)))))
    mine = shares(lengths, count())
    every = gather([encode(row) for row in read(mine[own()])])
    found = {
        row: value for rows, values in zip(mine, every, strict=True) for row, value in zip(rows, values, strict=True)
    }
    return [decode(found[row]) for row in range(len(lengths))]


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The rows of an update that this rank has, cut into passes of at most `size` rows of like length.

    All ranks have as many passes, since some engines meet in each; one that has fewer rows has empty ones.
    """
    mine = shares(lengths, count())
    passes = max(-(-len(rows) // size) for rows in mine)
    order = sorted(mine[own()], key=lambda row: lengths[row])
    return [part.tolist() for part in np.array_split(np.array(order, dtype=int), passes)]
