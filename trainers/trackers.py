"""Metrics sent to TensorBoard, Weights & Biases or Trackio while a run trains, through accelerate's trackers.

The tracker classes are used without an `Accelerator`, which would set this process's device and mixed precision.
What they do need is accelerate's `PartialState`; outside a distributed launch it notes that there is one process.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import (
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
    get_available_trackers,
)

TRACKERS = ("tensorboard", "wandb", "trackio")
"""The names that `trackers` takes, which are also the packages to install."""

Log = Callable[[Mapping[str, Any], int], None]


@contextmanager
def trackers(
    names: Sequence[str], out: Path, project: str, settings: Mapping[str, Any], *, begun: int = 0
) -> Iterator[Log]:
    """Start the named trackers and yield `log(metrics, step)`; they are finished when the context ends in any way.

    out: the run's folder. Below `out/trackers` lie TensorBoard's events, wandb's own files, and the id by which a
        resumed run finds itself again. Trackio keeps its data where its own settings say.
    project: the heading under which wandb and Trackio file the run.
    settings: of the run, shown beside its metrics; nested ones are named as `log` does it. TensorBoard keeps the first.
    begun: steps that a resumed run has behind it; 0 for a new one.

    `log` names nested metrics with "/" and sends the numbers, booleans as 0 and 1. It leaves out all that is no number
    (text, lists, None), and `step`, which is the axis.

    A run resumed from a checkpoint does the steps after it again. TensorBoard then drops what it had of them; wandb,
    which takes no step before its last, keeps the first; Trackio shows both. As a resumed run repeats its steps bit
    for bit, only the times differ.

    Raises, before anything is started, ValueError for an unknown name and ImportError for a package not installed.
    """
    check_trackers(names)
    folder = out / "trackers"
    with ExitStack() as stack:
        started = [_start(name, folder, project, settings, begun, stack) for name in dict.fromkeys(names)]

        def log(metrics: Mapping[str, Any], step: int) -> None:
            values = dict(_flat(metrics))
            values.pop("step", None)  # Trackio reserves the name
            numbers = {
                name: int(value) if isinstance(value, Integral) else float(value)
                for name, value in values.items()
                if isinstance(value, Real)
            }
            for tracker in started:
                tracker.log(numbers, step=step)

        yield log


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for an unknown name, and ImportError for a package that is not installed."""
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ValueError(f"unknown tracker {unknown[0]!r}; choose from {', '.join(TRACKERS)}")
    installed = {str(own) for own in get_available_trackers()}
    missing = [name for name in dict.fromkeys(names) if name not in installed]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}; type: pip install {' '.join(missing)}")


def _start(
    name: str, folder: Path, project: str, settings: Mapping[str, Any], begun: int, stack: ExitStack
) -> GeneralTracker:
    """A tracker at work, which `stack` will finish."""
    PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / f"{name}.id"
    resumed = noted.exists()
    identity = noted.read_text() if resumed else uuid.uuid4().hex
    tracker = _tracker(name, identity, folder, project, begun)
    tracker.start()
    stack.callback(tracker.finish)
    if name != "tensorboard" or not resumed:  # it would list them twice; a resumed Trackio run lost them
        tracker.store_init_configuration({key: _plain(value) for key, value in _flat(settings)})
    noted.write_text(identity)
    return tracker


def _tracker(name: str, identity: str, folder: Path, project: str, begun: int) -> GeneralTracker:
    run = folder.resolve().parent.name
    if name == "tensorboard":
        return TensorBoardTracker(name, folder, purge_step=begun + 1)
    if name == "wandb":
        return WandBTracker(project, name=run, id=identity, resume="allow", dir=str(folder))
    return TrackioTracker(project, name=f"{run}-{identity[:8]}", resume="allow")  # its names are its ids


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of all that is not itself a mapping; nested names are joined by "/"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


def _plain(value: Any) -> Any:
    """The value, or as text what no table of settings can hold."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
