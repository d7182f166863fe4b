"""Checkpoints: all that a run needs to go on as if it had never stopped, in safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from agentgym_ig.errors import CheckpointError
from agentgym_ig.trainers import ranks
from agentgym_ig.trainers.adapters import is_adapted, load_adapter_state, merged, with_weights
from agentgym_ig.trainers.experience import Experience
from agentgym_ig.trainers.learner import Learner
from agentgym_ig.trainers.sharding import averaged_over, like, load_whole_state, whole, whole_state

FORMAT = 2


def model_fingerprint(model: Any) -> str:
    """A digest of the names, shapes and types of all weights: equal for models that can take each other's."""
    shapes = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in sorted(model.state_dict().items())]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def save_checkpoint(folder: Path, step: int, learner: Learner, settings: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `folder/step-XXXXXX`; it appears only when it is whole. Older ones past the last `keep` go.

    With several ranks all must call it, the first writes, and another number of ranks can go on from it.

    The model can be loaded with `AutoModelForCausalLM.from_pretrained`; of one with adapters it is the adapter, which
    that finds the base model for. Random states and the place in the data are no part of it: both are functions of the
    seed, which is among the settings, and the step.
    """
    target = folder / f"step-{step:06d}"
    weights = _divided_weights(learner.model)
    critic = None if learner.critic is None else whole_state(learner.critic)
    state = learner.optimizer.state_dict()
    tensors = {f"{i}.{name}": whole(value) for i, own in state["state"].items() for name, value in own.items()}
    if not ranks.first():
        return target
    partial = _empty(folder / ".partial")
    _write_model(partial, learner.model, learner.tokenizer, weights)
    save_file({name: own.contiguous() for name, own in tensors.items()}, partial / "optimizer.safetensors")
    if critic is not None:
        save_file(_apart(critic), partial / "critic.safetensors")
    for number, batch in enumerate(learner.replay):
        save_file(batch.tensors(), partial / f"replay-{number}.safetensors")
    about = {
        "format": FORMAT,
        "step": step,
        "settings": settings,
        "model": model_fingerprint(learner.model),
        "param_groups": state["param_groups"],
        "schedule": learner.schedule.state_dict(),
        "replay": len(learner.replay),
    }
    (partial / "state.json").write_text(json.dumps(about, indent=1) + "\n")
    _put(partial, target)
    for old in checkpoints(folder)[:-keep]:
        _put(old, folder / ".old")  # renamed first: killed half-way, it would be no checkpoint and never go
        shutil.rmtree(folder / ".old")
    return target


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Model and tokenizer in the layout of the Hugging Face hub, adapters merged into the weights.

    The folder is replaced, and only by a whole one.
    """
    weights = _divided_weights(model)
    if ranks.first():
        plain = model
        if is_adapted(model):
            plain, weights = merged(model if weights is None else with_weights(model, weights)), None
        partial = _empty(folder.with_name(f".{folder.name}.partial"))
        _write_model(partial, plain, tokenizer, weights)
        _put(partial, folder)
    ranks.wait()


def _divided_weights(model: Any) -> dict[str, torch.Tensor] | None:
    """The whole weights of a model that is divided among the ranks, all of which must ask; None where it is whole."""
    return whole_state(model) if averaged_over(model) > 1 else None


def _write_model(folder: Path, model: Any, tokenizer: Any, weights: dict[str, torch.Tensor] | None) -> None:
    # Without the keyword peft looks the base model up at the hub, to see whether its embedding has grown.
    own = {"save_embedding_layers": False} if is_adapted(model) else {}
    model.save_pretrained(folder, state_dict=weights, **own)
    tokenizer.save_pretrained(folder)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that share no memory, as safetensors wants them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _put(partial: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint. Raises CheckpointError when it is missing, damaged or of another format."""
    path = folder / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        found = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no usable checkpoint ({error!r}); delete it to go on from an older one"
        ) from error
    if found != FORMAT:
        raise CheckpointError(f"{folder} is of format {found}, wanted {FORMAT}; it was written by another version")
    return state


def restore(folder: Path, learner: Learner, settings: dict[str, Any]) -> int:
    """Load a checkpoint into the learner; returns the steps done.

    Raises CheckpointError when it is of another model, or of a run with other settings.
    """
    state = read_state(folder)
    if state["model"] != model_fingerprint(learner.model):
        raise CheckpointError(
            f"{folder} is of another model than the one given; name the model that the run began with"
        )
    different = sorted(key for key in settings | state["settings"] if settings.get(key) != state["settings"].get(key))
    if different:
        was = ", ".join(f"{key}={state['settings'].get(key)!r} (now {settings.get(key)!r})" for key in different)
        raise CheckpointError(
            f"{folder} is of a run with other settings: {was}; repeat them, or start in another folder"
        )
    _read_weights(folder, learner)
    own: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        place, _, key = name.partition(".")
        own.setdefault(int(place), {})[key] = tensor
    for weight, kept in zip((own for group in learner.parameters for own in group), own.values(), strict=False):
        kept |= {key: like(weight, tensor) for key, tensor in kept.items() if tensor.shape == weight.shape}
    learner.optimizer.load_state_dict({"state": own, "param_groups": state["param_groups"]})
    learner.schedule.load_state_dict(state["schedule"])
    replayed = (load_file(folder / f"replay-{number}.safetensors") for number in range(state["replay"]))
    learner.replay[:] = map(Experience.from_tensors, replayed)
    return int(state["step"])


def _read_weights(folder: Path, learner: Learner) -> None:
    model = learner.model
    if is_adapted(model):
        load_adapter_state(model, load_file(folder / "adapter_model.safetensors"))
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        load_whole_state(model, plain.state_dict())
    if learner.critic is not None:
        load_whole_state(learner.critic, load_file(folder / "critic.safetensors"))
