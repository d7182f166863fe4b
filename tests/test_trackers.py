"""Trackers: what TensorBoard's files hold when read back, what a resumed run leaves in them, and what is refused."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from agentgym_ig.trainers.trackers import TRACKERS, trackers

INSTALLED = {str(own) for own in get_available_trackers()}
ABSENT = [name for name in TRACKERS if name not in INSTALLED]


def read_back(out: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(out / "trackers" / "tensorboard"))
    events.Reload()
    return {tag: [(own.step, own.value) for own in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def stored_settings(out: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted((out / "trackers" / "tensorboard").glob("*/events*")):
        events = EventAccumulator(str(path))
        events.Reload()
        data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        hparams = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info.hparams
        found.append({key: getattr(value, value.WhichOneof("kind")) for key, value in hparams.items()})
    return found


def test_numbers_alone_are_logged_and_nested_ones_by_their_path(tmp_path: Path) -> None:
    with trackers(("tensorboard",), tmp_path, "project", {}) as log:
        log(
            {
                "step": 1,
                "em": 0.25,
                "episodes": 96,
                "skipped": True,
                "norm": np.float32(0.5),
                "evaluation": {"em": 0.75, "by_hops": {"2": 1}, "model": "tiny"},
                "alarms": ["entropy_collapse"],
                "recipe": "igpo",
                "kl": None,
            },
            1,
        )
        log({"step": 2, "em": 0.5, "skipped": False}, 2)
    assert read_back(tmp_path) == {
        "em": [(1, 0.25), (2, 0.5)],
        "episodes": [(1, 96.0)],
        "skipped": [(1, 1.0), (2, 0.0)],
        "norm": [(1, 0.5)],
        "evaluation/em": [(1, 0.75)],
        "evaluation/by_hops/2": [(1, 1.0)],
    }


def test_a_number_that_is_not_finite_is_shown_as_such(tmp_path: Path) -> None:
    with trackers(("tensorboard",), tmp_path, "project", {}) as log:
        log({"kl": float("nan")}, 1)
        log({"kl": float("inf")}, 2)
    (_, first), (_, second) = read_back(tmp_path)["kl"]
    assert np.isnan(first)
    assert second == float("inf")


def test_a_resumed_run_replaces_the_steps_it_does_again(tmp_path: Path) -> None:
    with trackers(("tensorboard",), tmp_path, "project", {"seed": 0}) as log:
        for step in (1, 2, 3, 4, 5):
            log({"em": step / 8, "seconds": 1.0}, step)
    # saved after step 3
    with trackers(("tensorboard",), tmp_path, "project", {"seed": 0}, begun=3) as log:
        for step in (4, 5, 6):
            log({"em": step / 8, "seconds": 2.0}, step)
    found = read_back(tmp_path)
    assert found["em"] == [(step, step / 8) for step in (1, 2, 3, 4, 5, 6)]
    assert found["seconds"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_settings_are_stored_once(tmp_path: Path) -> None:
    settings = {"recipe": "igpo", "loss": {"clip": 0.25, "joint": True}, "layers": (1, 2), "reference": None}
    for begun in (0, 4):
        with trackers(("tensorboard",), tmp_path, "project", settings, begun=begun):
            pass
    # TensorBoard has no None, and all its numbers are floating
    assert stored_settings(tmp_path) == [
        {"recipe": "igpo", "loss/clip": 0.25, "loss/joint": True, "layers": "(1, 2)"},
    ]


def test_what_was_logged_is_kept_and_writing_ends_when_training_breaks(tmp_path: Path) -> None:
    threads = threading.active_count()
    with contextlib.suppress(FloatingPointError), trackers(("tensorboard",), tmp_path, "project", {}) as log:
        log({"em": 0.5}, 1)
        assert threading.active_count() > threads
        raise FloatingPointError
    assert threading.active_count() == threads
    assert read_back(tmp_path) == {"em": [(1, 0.5)]}


def test_a_name_given_twice_is_one_tracker(tmp_path: Path) -> None:
    with trackers(("tensorboard", "tensorboard"), tmp_path, "project", {}) as log:
        log({"em": 0.5}, 1)
    assert read_back(tmp_path) == {"em": [(1, 0.5)]}
    assert len(list((tmp_path / "trackers" / "tensorboard").glob("events*"))) == 1


def test_no_tracker_leaves_no_trace(tmp_path: Path) -> None:
    with trackers((), tmp_path, "project", {"seed": 0}) as log:
        log({"em": 0.5}, 1)
    assert not list(tmp_path.iterdir())


def test_this_process_stays_as_it_was(tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        return dict(AcceleratorState._shared_state), torch.get_num_threads(), torch.get_default_dtype()

    before = state()
    with trackers(("tensorboard",), tmp_path, "project", {}) as log:
        log({"em": 0.5}, 1)
        assert state() == before
    assert state() == before
    assert not torch.distributed.is_initialized()


def test_an_unknown_tracker_is_refused_before_another_starts(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"unknown tracker 'mlflow'; choose from tensorboard, wandb, trackio"),
        trackers(("tensorboard", "mlflow"), tmp_path, "project", {}),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not ABSENT, reason="all trackers are installed")
def test_packages_not_installed_are_named_before_another_starts(tmp_path: Path) -> None:
    listed = f"not installed: {', '.join(ABSENT)}; type: pip install {' '.join(ABSENT)}"
    with (
        pytest.raises(ImportError, match=f"^{listed}$"),
        trackers(("tensorboard", *ABSENT), tmp_path, "project", {}),
    ):
        pass
    assert not list(tmp_path.iterdir())
