"""What a launcher starts in several processes: `agentgym-ig`, or a small run in which one of them meets a value that is
not finite. At their end they print which threads of their group are left.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.rank_runs train ...
python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.rank_runs failing FOLDER
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentgym_ig.commands.main import main
from agentgym_ig.trainers import ranks, recipe, train
from agentgym_ig.trainers.losses import clipped_loss
from tests.runs import fresh, paid_env, weights

FAILS = 1
"""The update, of three, that fails on the last rank."""

LEFT = "threads of the group that are left:"

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
"""Starts a module in two processes."""


def run_in_two(module: str, *words: object, timeout: float) -> None:
    """To its end, which both reach rightly and without a thread of their group."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*TWO, module, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{LEFT} []") == 2, done.stdout


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


def failing(folder: Path) -> None:
    """Three steps, the second of which fails on the last rank."""
    torch.set_num_threads(1)
    ranks.join("cpu")
    chosen: Any = replace(recipe("grpo"), loss=Failing(), kl=0.0)
    run = fresh(folder / "run", chosen, env=paid_env(), steps=3, group_size=4)
    train(run)
    total = sum(float(own.double().abs().sum()) for own in weights(run.policy.model).values())
    assert len(set(ranks.gather(total))) == 1, "the ranks' weights are no longer the same"
    ranks.leave()


def print_threads_left() -> None:
    """Threads of gloo: one that gives a tensor back while Python shuts down aborts the process, now and then."""
    names = [own.read_text().strip() for own in Path("/proc/self/task").glob("*/comm")]
    line = f"{LEFT} {[name for name in names if 'gloo' in name]}\n"
    os.write(sys.stdout.fileno(), line.encode())  # at once: the processes have one pipe


if __name__ == "__main__":
    atexit.register(print_threads_left)  # the first that registers is the last that is called
    failing(Path(sys.argv[2])) if sys.argv[1] == "failing" else main()
