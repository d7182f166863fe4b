"""What a run has done so far, in its folder: a line of metrics for each step, and checkpoints to go on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentgym_ig.errors import CheckpointError
from agentgym_ig.records import METRICS_FILE, write_whole
from agentgym_ig.trainers import ranks
from agentgym_ig.trainers.checkpoint import checkpoints, restore
from agentgym_ig.trainers.learner import Learner

CHECKPOINTS = "checkpoints"


def begin(out: Path, learner: Learner, settings: dict[str, Any], *, resume: bool = False) -> list[dict[str, Any]]:
    """Prepare a run's folder, restore its newest checkpoint if asked to, and return the metrics of the steps done.

    Lines of steps after the checkpoint go: those steps will be done again.

    Raises FileExistsError when `out` already holds a run and `resume` is not set, FileNotFoundError when there is
    nothing to resume, and CheckpointError when what is there does not fit this run, or lacks metrics of its steps.
    """
    found, log = checkpoints(out / CHECKPOINTS), out / METRICS_FILE
    lines = log.read_bytes().splitlines() if log.exists() else None
    ranks.wait()  # until all have looked
    if not resume:
        if found or lines is not None:
            raise FileExistsError(f"{out} already holds a run; add --resume to go on with it, or give another folder")
        if ranks.first():
            write_whole(log, b"")  # from now on there is a run, if one without a step
        return []
    if not found and lines is None:
        raise FileNotFoundError(f"{out} holds no run to resume; start it without --resume")
    begun = restore(found[-1], learner, settings) if found else 0
    lines = (lines or [])[:begun]
    if len(lines) < begun:
        raise CheckpointError(
            f"{log} has {len(lines)} lines and {found[-1].name} is of step {begun}; put the whole file back"
        )
    if ranks.first():
        write_whole(log, b"".join(line + b"\n" for line in lines))
    return [json.loads(line) for line in lines]


def append(out: Path, row: dict[str, Any]) -> None:
    """Add a step's metrics to the file in the run's folder, if this is the rank that writes."""
    if not ranks.first():
        return
    with (out / METRICS_FILE).open("a") as log:
        log.write(json.dumps(row) + "\n")


def stop_if_not_finite(history: Sequence[dict[str, Any]], limit: int) -> None:
    """Raise FloatingPointError when more than `limit` updates of the run were skipped."""
    skipped = sum(int(row.get("skipped_updates", 0)) for row in history)
    if skipped > limit:
        raise FloatingPointError(
            f"{skipped} updates were skipped because their loss or gradient was not finite, more than"
            f" max_skipped_updates={limit}; begin anew with a lower learning rate, or resume with a higher limit"
        )
