"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685), by peft, which is imported only when one is made or used.

A frozen weight W is read as W + alpha / rank B A, and B and A alone are trained. B begins at 0, so a fresh adapter
changes nothing.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from agentgym_ig.lm.alone import alone_with
from agentgym_ig.trainers.readout import Model


def with_lora(
    model: Model, *, rank: int = 16, alpha: int = 32, target: str | Sequence[str] = "all-linear", seed: int = 0
) -> Model:
    """The model with a fresh adapter: a PeftModel, whose adapter alone is trainable and drawn from the seed.

    target: the layers that get one, by name or as peft's regular expression; by default all linear ones but the
    output layer. Changes `model`, which is inside the result. There is no dropout: with it, what was sampled would
    be other than what the first update reads, and that update off-policy.

    Raises ImportError without peft, and ValueError for settings out of range, a model that has an adapter already,
    a target that it has not, or one that it uses twice, as an input and output embedding that are tied.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank={rank} must be at least 1 and alpha={alpha} above 0")
    if is_adapted(model):
        raise ValueError("the model has an adapter already; train that one, or take merged(model)")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'agentgym_ig[lora]'") from error
    target = target if isinstance(target, str) else list(target)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=target, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = _adapted(model, config)
    if _adapts_tied(adapted):
        adapted.unload()
        raise ValueError("input and output embedding are one tensor, which an adapter of either would split; leave out")
    return adapted.train(model.training)


def _adapted(model: Model, config: Any) -> Model:
    """The model with a fresh adapter of peft's, of that configuration."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft asks the model by a name that transformers 5.23 deprecates; a tied layer is refused by `with_lora`.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        return get_peft_model(model, config)


def with_weights(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """Another model with an adapter of the same shape, on the CPU, with these weights, by the names of both."""
    _require_adapted(model)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(model.get_base_model().config))
    twin = _adapted(base, copy.deepcopy(model.peft_config[model.active_adapter]))
    twin.load_state_dict(dict(weights))
    return twin


def _adapts_tied(model: Model) -> bool:
    """Whether an embedding has an adapter and is tied to the other: merging the one would change the other."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    inner = [getattr(end, "base_layer", end) for end in ends]
    return inner != ends and inner[0].weight is inner[1].weight


def is_adapted(model: Model) -> bool:
    """Whether it is a PeftModel."""
    peft = sys.modules.get("peft")  # not imported: no adapter
    return peft is not None and isinstance(model, peft.PeftModel)


@contextmanager
def without_adapter(model: Model) -> Iterator[None]:
    """Have the model be what it was without its adapter; no other thread can sample or score with it meanwhile."""
    _require_adapted(model)
    with alone_with(model):
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        try:
            with model.disable_adapter():
                yield
        finally:  # peft freezes an adapter that is off, and makes any trainable that it switches on
            model.requires_grad_(False)
            for weight in trainable:
                weight.requires_grad_(True)


def merged(model: Model) -> Model:
    """A copy on the CPU, as a plain transformers model, with the adapter added into its weights.

    In bfloat16 the sum is rounded to it. The model itself stays as it is, and no memory is taken on its device.
    """
    _require_adapted(model)
    with alone_with(model):
        tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        memo = {id(tensor): _on_cpu(tensor) for tensor in tensors}
        plain: Model = copy.deepcopy(model, memo).merge_and_unload().requires_grad_(True)
    # That of the model inside is lost as soon as the PeftModel, which has another, has sampled.
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def _on_cpu(tensor: Tensor) -> Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def adapter_state(model: Model) -> dict[str, Tensor]:
    """Copies on the CPU of the adapter's weights alone, by peft's names: what a checkpoint keeps."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _adapter(model).items()}


def load_adapter_state(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Put weights that `adapter_state` gave into the adapter. Raises ValueError when they are of another adapter."""
    wanted, found = ({name: tuple(own.shape) for name, own in each.items()} for each in (_adapter(model), tensors))
    if different := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        first = different[0]
        raise ValueError(
            f"the weights are of another adapter: {len(different)} of them differ, {first} has shape"
            f" {found.get(first)} and here {wanted.get(first)}; make this one with the same rank and target"
        )
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, dict(tensors), model.active_adapter)


def base_weights(model: Model) -> dict[str, Tensor]:
    """The weights that are not the adapter's, themselves, by the names that they had before there was one."""
    adapter = {tensor.data_ptr() for tensor in _adapter(model).values()}
    weights = model.get_base_model().state_dict()
    return {name.replace(".base_layer.", "."): own for name, own in weights.items() if own.data_ptr() not in adapter}


def _adapter(model: Model) -> dict[str, Tensor]:
    """The adapter's weights themselves."""
    _require_adapted(model)
    from peft import get_peft_model_state_dict

    # By default peft looks the model up at the hub, to see whether its embedding has grown.
    state: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    return state


def _require_adapted(model: Model) -> None:
    if not is_adapted(model):
        raise ValueError(f"{type(model).__name__} has no adapter; make one by with_lora(model)")
