"""A small run in which one of several processes meets a value that is not finite. Started by a launcher:

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.rank_runs FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentgym_ig.trainers import ranks, recipe, train
from agentgym_ig.trainers.losses import clipped_loss
from tests.runs import fresh, paid_env, weights

FAILS = 1
"""The update, of three, that fails on the last rank."""


class Failing:
    """The clipped loss, of log-probabilities that are nan once, on one rank. It is called twice an update, the second
    time for its statistics.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logprobs: Tensor, old: Tensor, advantages: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and logprobs.requires_grad:
            self.calls += 1
            if ranks.own() == ranks.count() - 1 and self.calls == 2 * FAILS + 1:
                logprobs = logprobs * torch.nan
        return clipped_loss(logprobs, old, advantages, mask=mask)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.join("cpu")
    chosen: Any = replace(recipe("grpo"), loss=Failing(), kl=0.0)
    run = fresh(Path(sys.argv[1]) / "run", chosen, env=paid_env(), steps=3, group_size=4)
    train(run)
    total = sum(float(own.double().abs().sum()) for own in weights(run.policy.model).values())
    assert len(set(ranks.gather(total))) == 1, "the ranks' weights are no longer the same"
