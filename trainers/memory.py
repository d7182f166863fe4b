"""When memory runs out: the phase that it happened in is done again with half as many episodes in a pass, once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from agentgym_ig.errors import OutOfMemory
from agentgym_ig.trainers import ranks

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WHAT_TO_LOWER = {
    "rollout": "--rollout-batch, --max-cached-tokens, --max-new-tokens or --max-turns",
    "score": "--micro-batch, --max-new-tokens or --max-turns; --bf16 helps as well",
    "update": "--micro-batch, --max-new-tokens or --max-turns; --gradient-checkpointing, --bf16 and --lora-rank help as"
    " well",
}
"""Phase of a step → the options that its memory depends on."""


@dataclass
class Portion:
    """How many episodes a phase takes in a pass. It is halved once in a run at most."""

    phase: str
    size: int
    halved: bool = False

    def of(self, act: Callable[[int], Result]) -> Result:
        """What `act` gives for the size; where memory runs out, for half of it from then on, with a warning.

        `act` must be one that can be done again. Raises OutOfMemory, which says what to lower, where half is too much
        as well, where there is no half, and with several ranks, which would lose each other.
        """
        try:
            return act(self.size)
        except Exception as error:
            if not ran_out(error):
                raise
            if self.halved or self.size == 1 or ranks.count() > 1:
                raise OutOfMemory(
                    f"memory ran out in the {self.phase} with {self.size} episodes in a pass; lower"
                    f" {WHAT_TO_LOWER[self.phase]}; --dry-run says what each takes. The run can be resumed"
                ) from error
            self.size, self.halved = self.size // 2, True
            logger.warning(
                "memory ran out in the %s; it goes on with %d episodes in a pass. To be safe, lower %s",
                self.phase,
                self.size,
                WHAT_TO_LOWER[self.phase],
            )
        gc.collect()  # the tensors of the failed pass went with its traceback
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.of(act)


def ran_out(error: BaseException) -> bool:
    """Whether an error is that of an allocator: CUDA's, the CPU's or Python's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
