"""Forward and backward passes without padding: all episodes of a batch stand in one row, one behind the other.

Everything that treats each token alone, which is nearly all of a model, then computes on real tokens only. With `sdpa`
attention alone puts the episodes side by side again, padded. FlashAttention (`flash_attention_2`, ...) and
`flex_attention` take the row as it is, as transformers hands it to them: an episode begins where positions begin at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agentgym_ig.lm.alone import alone_with
from agentgym_ig.lm.attention import attending_by, kernel_of
from agentgym_ig.trainers.readout import Model

PACKED = "agentgym_ig_packed"
"""The name under which transformers knows our attention, which takes the place of `sdpa`."""

KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager")
"""Those that read a row of several episodes rightly. FlashAttention never makes a mask; `eager` makes one of all pairs
of tokens, and is there to compare with.
"""

_KINDS = {"full_attention", "sliding_attention"}

_INSIDE: WeakSet[Any] = WeakSet()
"""Models that are read without padding at this moment."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each of N tokens of a row stands when its B episodes are side by side, with T the longest.

    place: (N,) long, of each token in the flat (B T). token: (B T,) long, the other way; where no token stands, on the
    right of an episode, it is any. rows: B.
    """

    place: Tensor
    token: Tensor
    rows: int

    @staticmethod
    def of(real: Tensor) -> Layout:
        """That of (B, T) bool, true on tokens and with padding on the right."""
        place = real.flatten().nonzero()[:, 0]
        token = (real.flatten().cumsum(0) - 1).clamp(min=0)
        return Layout(place, token, len(real))

    def side_by_side(self, packed: Tensor) -> Tensor:
        """(1, heads, N, width) to (B, heads, T, width)."""
        _, heads, _, width = packed.shape
        spread = packed[0].transpose(0, 1).index_select(0, self.token)  # (B T, heads, width)
        return spread.view(self.rows, -1, heads, width).transpose(1, 2)

    def packed(self, spread: Tensor) -> Tensor:
        """(B, T, heads, width) to (1, N, heads, width)."""
        return spread.flatten(0, 1).index_select(0, self.place)[None]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention by `scaled_dot_product_attention`, of each episode in itself."""
    query, key, value = (layout.side_by_side(own) for own in (query, key, value))
    mask = _window(query, sliding_window)
    settings.pop("position_ids", None)
    out, _ = sdpa_attention_forward(module, query, key, value, mask, is_causal=mask is None, **settings)
    return layout.packed(out), None


AttentionInterface.register(PACKED, _attention)


def _window(query: Tensor, width: int | None) -> Tensor | None:
    """(1, 1, T, T) bool: what each token sees if it looks back so far, itself included; None where that is all."""
    length = query.shape[2]
    if width is None or width >= length:
        return None
    place = torch.arange(length, device=query.device)
    back = place[:, None] - place
    return ((back >= 0) & (back < width))[None, None]


def can_pack(model: Model) -> bool:
    """Whether it is known of the model that its layers mix tokens by attention alone, through transformers' interface.

    It is not of models with a state (Mamba), with other kinds of layers, or with a kernel not among `KERNELS`.
    """
    return (
        model._supports_attention_backend
        and not getattr(model, "_is_stateful", False)
        and kernel_of(model) in (*KERNELS, PACKED)
        and set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= _KINDS
    )


@contextmanager
def packing(*models: Model | None) -> Iterator[None]:
    """Have these models read without padding by `token_logprobs`, `token_entropies` and a critic, where `can_pack`.

    The backward pass belongs inside as well: with gradient checkpointing it runs the layers again. None is no model.
    """
    with ExitStack() as stack:
        for model in models:
            if model is not None and can_pack(model):
                stack.enter_context(alone_with(model))
                if model not in _INSIDE:
                    kernel = kernel_of(model)
                    stack.enter_context(attending_by(model, PACKED if kernel == "sdpa" else kernel))
                    stack.callback(_INSIDE.discard, model)
                    _INSIDE.add(model)
        yield


def inputs_of(
    model: Model, ids: Tensor, real: Tensor, places: tuple[Tensor, Tensor]
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """What a model is called with for (B, T) ids, padded on the right, and the row and column of its output at which
    the outputs for `places`, rows and columns of the ids, stand: in one row inside `packing`, else where they were.
    """
    if model not in _INSIDE:
        # No attention mask: padding stands on the right, where causal attention does not look.
        return {"input_ids": ids, "use_cache": False}, places
    layout = Layout.of(real)
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    inputs = {"input_ids": ids[real][None], "position_ids": position[real][None], "use_cache": False}
    if (kernel := kernel_of(model)) == PACKED:
        inputs["layout"] = layout
    elif kernel.startswith("flash"):
        inputs |= _bounds(real)
    return inputs, (torch.zeros_like(places[0]), layout.token.view_as(ids)[places])


def _bounds(real: Tensor) -> dict[str, Any]:
    """Where episodes of a row begin and end, by transformers' names: FlashAttention looks for it in every layer."""
    lengths = real.sum(1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
