"""The memory that a model takes in training, from its configuration alone: its code is run on fake tensors.

A fake tensor has a shape, a type and a device but no values, so a 7B model's forward and backward pass take seconds and
no memory. What they would hold at the most is added up as storages come and go. So any architecture is counted as its
own code has it: grouped heads, tied embeddings, experts, what autograd keeps, what checkpointing saves, the bfloat16
copies that autocast makes. Attention is PyTorch's own (`sdpa`); what a kernel takes inside of a call is not seen, nor
the masks of layers with a sliding window.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agentgym_ig.lm.arguments import with_cache
from agentgym_ig.trainers.adapters import with_lora
from agentgym_ig.trainers.learner import checkpoint_layers

_KERNEL = "agentgym_ig_planned"
"""Attention as it is by default, where a batch without a mask is causal. On fake tensors transformers would make a mask
of all pairs of tokens for it, as it does for models that are compiled.
"""
AttentionInterface.register(_KERNEL, sdpa_attention_forward)
AttentionMaskInterface.register(_KERNEL, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class Sketch:
    """A model that is not loaded. settings: its transformers configuration in JSON; lora_rank: of an adapter."""

    settings: str
    lora_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """How many parameters: all, those trained, those of the largest layer, and those outside of layers (embeddings, the
    output layer). multiplied: those that every token is multiplied by, so without an input embedding that is only
    looked up. trunk: those of a critic, which is the model without its output layer and adapter. attention: layers
    times the width of all their heads. vocabulary, width: of the output layer.
    """

    parameters: int
    trained: int
    layer: int
    outside: int
    multiplied: int
    trunk: int
    attention: int
    vocabulary: int
    width: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A forward pass without a gradient: bytes that it holds at most beside the key-value cache, and how many numbers
    are in that.
    """

    beside: int
    cached: int


def sketch(name: str, *, lora_rank: int | None = None) -> Sketch:
    """A model by its folder, which needs to hold its `config.json` alone, or by its name at the hub.

    Raises FileNotFoundError for a name that is neither.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no configuration of a model at {name!r}: {error}; give a folder with a config.json, or a hub name"
        ) from error
    return Sketch(config.to_json_string(use_diff=False), lora_rank)


def configuration(own: Sketch) -> Any:
    """Its transformers configuration."""
    return AutoConfig.for_model(**json.loads(own.settings))


class Held(TorchDispatchMode):
    """Adds up the bytes of the storages that are made under it, as long as each is alive; those of a model's weights,
    of which views are made, are none of them. peak: the most so far.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known = {own.untyped_storage()._cdata for own in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it made."""
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._note(made.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _on_meta(own: Sketch, dtype: torch.dtype = torch.float32) -> Any:
    """The model, its adapter really made, without memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(own), dtype=dtype, attn_implementation=_KERNEL)
        return model if own.lora_rank is None else with_lora(model, rank=own.lora_rank, alpha=2 * own.lora_rank)


@contextmanager
def _faked(model: Any) -> Iterator[None]:
    """Its weights as fake tensors on the CPU; peft cannot be put on a model of fake tensors, hence this way round."""
    made: dict[int, Tensor] = {}
    with FakeTensorMode():
        for module in model.modules():
            for place in (module._parameters, module._buffers):
                for name, tensor in place.items():
                    if tensor is not None:
                        place[name] = made.setdefault(id(tensor), _fake(tensor))
        yield


def _fake(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@cache
def counts(own: Sketch) -> Counts:
    """The model's parameters, counted on a model without memory."""
    model = _on_meta(own)
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(layers, key=_size, default=nn.ModuleList())
    parameters, plain = _size(model), _size(model) if own.lora_rank is None else _size(_on_meta(Sketch(own.settings)))
    looked_up, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = looked_up is output
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Counts(
        parameters=parameters,
        trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        layer=max(map(_size, blocks), default=0),
        outside=parameters - _size(blocks),
        multiplied=parameters - (0 if tied else looked_up.numel()),
        trunk=plain - (0 if tied else output.numel()) + output.shape[1] + 1,
        attention=len(blocks) * config.num_attention_heads * head,
        vocabulary=output.shape[0],
        width=output.shape[1],
    )


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@cache
def activations(
    own: Sketch, rows: int, tokens: int, *, bf16: bool = False, checkpointing: bool = False, sharded: bool = False
) -> int:
    """Bytes that forward and backward through the layers of (rows, tokens) hold at the most, beside the weights and the
    gradients: what autograd keeps and what is made on the way, copies of weights in bfloat16 included.

    Without the output layer, whose logits are read in chunks. sharded: in bfloat16 the layers compute on gathered
    bfloat16 weights, as FSDP2 has it, and not on copies that autocast makes.
    """
    plain = bf16 and sharded

    def stages(part: Sketch) -> tuple[int, ...]:
        model = _on_meta(part, torch.bfloat16 if plain else torch.float32).eval()
        if checkpointing:
            checkpoint_layers(model)
        with _faked(model):
            ids = torch.zeros(rows, tokens, dtype=torch.long)
            return _update_stages(model, ids, torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not plain))

    return max(_at_full_depth(own, stages))


def _update_stages(model: Any, ids: Tensor, precision: Any) -> tuple[int, ...]:
    """The peaks of the forward pass, of the backward pass through the layers, and of what follows those."""
    peaks: list[int] = []

    def next_stage(*_: Any) -> None:
        peaks.append(held.peak)
        held.peak = held.now

    for weight in model.parameters():
        if weight.requires_grad:  # all gradients are counted elsewhere; here one lives until it is added to them
            weight.register_post_accumulate_grad_hook(_drop_gradient)

    def watch(_: nn.Module, __: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(next_stage)

    hook = model.get_input_embeddings().register_forward_hook(watch)
    with Held(model) as held:
        with precision:
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        next_stage()
        hidden.backward(torch.empty_like(hidden))
        next_stage()
    hook.remove()
    return tuple(peaks)


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


@cache
def reading(own: Sketch, rows: int, tokens: int, *, bf16: bool, masked: bool, dtype: str = "float32") -> Reading:
    """What reading (rows, tokens) without a gradient into a key-value cache takes.

    masked: with an attention mask, as a batch has one whose rows are padded on the left; its size grows with the square
    of the tokens. dtype: of the weights.
    """

    def stages(part: Sketch) -> tuple[int, ...]:
        model = _on_meta(part, getattr(torch, dtype)).eval()
        with _faked(model), torch.no_grad():
            mask = torch.empty(rows, 1, tokens, tokens, dtype=torch.bool) if masked else None
            ids = torch.zeros(rows, tokens, dtype=torch.long)
            with Held(model) as held, torch.autocast("cpu", torch.bfloat16, enabled=bf16 and dtype == "float32"):
                decoder, cache = model.get_decoder(), DynamicCache(config=model.config)
                decoder(input_ids=ids, attention_mask=mask, **with_cache(decoder, cache))
            layers: Any = cache.layers  # transformers types them as any kind of layer
            kept = [own for layer in layers for own in (layer.keys, layer.values)]
        beside = held.peak - sum(own.nbytes for own in kept) + (0 if mask is None else mask.nbytes)
        return beside, sum(own.numel() for own in kept)

    return Reading(*_at_full_depth(own, stages))


def _at_full_depth(own: Sketch, stages: Callable[[Sketch], tuple[int, ...]]) -> list[int]:
    """What `stages` gives for the model, from models of three and four of its layers if all of them are alike.

    Within a stage the peak is at the last layer, on top of what each layer before it has left: so it grows by the same
    amount with each layer. Which stage is the highest can change with depth, hence each by itself.
    """
    depth = _alike(own)
    if depth <= 4:
        return list(stages(own))
    three, four = stages(_cut(own, 3)), stages(_cut(own, 4))
    return [last + (depth - 4) * (last - before) for before, last in zip(three, four, strict=True)]


def _alike(own: Sketch) -> int:
    """How many layers the model has; 0 if they differ."""
    config = configuration(own).get_text_config()
    layers = getattr(_on_meta(Sketch(own.settings)).get_decoder(), "layers", ())
    shapes = {tuple((name, weight.shape) for name, weight in layer.named_parameters()) for layer in layers}
    return len(layers) if len(shapes) == 1 and len(set(getattr(config, "layer_types", None) or ())) <= 1 else 0


def _cut(own: Sketch, depth: int) -> Sketch:
    """The model with its first layers alone."""
    settings = json.loads(own.settings)
    full = settings["num_hidden_layers"]
    lists = {key: value[:depth] for key, value in settings.items() if isinstance(value, list) and len(value) == full}
    return Sketch(json.dumps(settings | lists | {"num_hidden_layers": depth}), own.lora_rank)
