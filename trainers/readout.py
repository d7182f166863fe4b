"""From hidden states to the log-probabilities and entropies of tokens, without ever holding the logits of all of them.

32,000 tokens of a vocabulary of 152,000 have logits of 19 GB. Here a few hundred tokens have theirs at a time, once
forwards and once more backwards, and what stays is a number a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from agentgym_ig.lm.alone import alone_with

Model = Any
"""A transformers causal language model; its own classes are only partly typed."""

CHUNK_BYTES = 2**27
"""Of float32 logits at a time. Some four times as much is alive at once, in the update."""

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names by which families multiply their logits (Cohere, Muse, Falcon-H1)."""


@dataclass(frozen=True, slots=True)
class Finish:
    """What a model does to the output layer's logits: z = cap tanh(scale x / cap) / temperature, or without a cap."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits in float32 from those of the output layer, which may be overwritten."""
        logits = raw.float()
        logits = logits.mul_(self.scale) if self.scale != 1.0 else logits
        if self.cap is not None:
            logits = logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits.div_(self.temperature) if self.temperature != 1.0 else logits

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient by the output layer's logits, from that by `logits`, which it overwrites."""
        gradient.mul_(self.scale / self.temperature)
        if self.cap is not None:
            bent = logits.mul(self.temperature / self.cap).square_().neg_().add_(1.0)
            gradient.mul_(bent)
        return gradient


def finish_of(model: Model) -> Finish:
    """What the model's family does to its logits, as its configuration says it."""
    config = model.config.get_text_config()
    scale = next((float(own) for name in _SCALES if (own := getattr(config, name, None)) is not None), 1.0)
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Finish(scale, None if cap is None else float(cap))


class _Readout(torch.autograd.Function):
    """Log-probabilities (N,) and entropies (N,), float32, of tokens (N,) under hidden (N, H) @ weight (V, H)ᵀ + bias.

    With z the finished logits, p = softmax(z) and H the entropy: ∂ log p_t / ∂ z_j = [j = t] - p_j and
    ∂ H / ∂ z_j = - p_j (log p_j + H).
    """

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, finish: Finish
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        context.types = [None if own is None else own.dtype for own in (hidden, weight, bias)]
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        hidden, weight = hidden.to(computed), weight.to(computed)
        bias = None if bias is None else bias.to(computed)
        logprobs, entropies, totals = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        with torch.autocast(device, enabled=False):
            for rows in _chunks(len(hidden), len(weight)):
                logits = finish(nn.functional.linear(hidden[rows], weight, bias))
                highest = logits.amax(-1, keepdim=True)
                shares = logits.sub(highest).exp_()  # once, for the sum and for the entropy
                sums = shares.sum(-1)
                totals[rows] = highest[:, 0] + sums.log()
                logprobs[rows] = logits.gather(-1, tokens[rows, None])[:, 0] - totals[rows]
                entropies[rows] = totals[rows] - shares.mul_(logits).nansum(-1) / sums  # 0 of a logit at -inf is nan
        context.save_for_backward(hidden, weight, bias, tokens, totals, entropies)
        context.finish = finish
        context.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(context: Any, *by: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, totals, entropies = context.saved_tensors
        asked = zip((hidden, weight, bias), context.types, context.needs_input_grad[:3], strict=True)
        found = [torch.zeros_like(own, dtype=kept) if wanted else None for own, kept, wanted in asked]
        of_hidden, of_weight, of_bias = found
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), len(weight)):
                logits = context.finish(nn.functional.linear(hidden[rows], weight, bias))
                by_logprob, by_entropy = (None if own is None else own[rows, None] for own in by)
                gradient = _by_logits(
                    logits, tokens[rows, None], totals[rows, None], entropies[rows, None], by_logprob, by_entropy
                )
                gradient = context.finish.backward(gradient, logits).to(hidden.dtype)
                if of_hidden is not None:
                    of_hidden[rows] = (gradient @ weight).to(of_hidden.dtype)
                if of_weight is not None:
                    _add_product(of_weight, gradient.T, hidden[rows])
                if of_bias is not None:
                    of_bias += gradient.sum(0)
        return of_hidden, of_weight, of_bias, None, None


def _by_logits(
    logits: Tensor, token: Tensor, total: Tensor, entropy: Tensor, by_logprob: Tensor | None, by_entropy: Tensor | None
) -> Tensor:
    """(n, V) the gradient by finished logits, given those by log-probability and entropy; all others are (n, 1)."""
    logshares = logits - total
    shares = logshares.exp()
    gradient = torch.zeros_like(logits) if by_entropy is None else logshares.add_(entropy).mul_(by_entropy)
    if by_logprob is not None:
        gradient.add_(by_logprob)
    gradient.mul_(shares).neg_()
    return gradient if by_logprob is None else gradient.scatter_add_(-1, token, by_logprob)


def _chunks(count: int, vocabulary: int) -> Iterator[slice]:
    size = max(CHUNK_BYTES // (4 * vocabulary), 1)
    return (slice(first, first + size) for first in range(0, count, size))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left @ right, the sum in the type of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def read_tokens_at(
    model: Model, places: tuple[Tensor, Tensor], tokens: Tensor, temperature: float, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(N,) log-probability of each of `tokens` (N,), in nats, and (N,) the entropy of the distribution that it is from,
    under the output at its row and column, (N,) each. Both float32 and differentiable.

    One forward pass of the model with `inputs`. An output layer that is not a plain linear one, as one with an adapter,
    makes all N logits at once.

    Raises ValueError for a model that does to its logits what is not known here.
    """
    finish = finish_of(model)
    with alone_with(model), _reading_head(model, places, tokens, replace(finish, temperature=temperature)) as read:
        shown = model(**inputs).logits[0]
        logprobs, entropies, raw = read[0]
    if not torch.allclose(finish(raw.clone()), shown.detach().float(), rtol=0.02, atol=0.02, equal_nan=True):
        raise ValueError(
            f"{model.config.model_type} does more to its logits than its output layer and {finish}; it can be sampled"
            " from, but not trained or scored"
        )
    return logprobs, entropies


@contextmanager
def _reading_head(
    model: Model, places: tuple[Tensor, Tensor], tokens: Tensor, finish: Finish
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Have the output layer read the tokens, and give the model the first place's logits alone, which stand third.

    It is read within the model's own pass, and not after it: so an engine that gathers the weights of a layer for the
    length of its use has them there.
    """
    head, read = model.get_output_embeddings(), []
    plain, own = type(head) is nn.Linear, head.forward

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden[places]
        if plain:
            logprobs, entropies = _Readout.apply(rows, head.weight, head.bias, tokens, finish)  # type: ignore[no-untyped-call]
        else:
            every = finish(own(rows).clone()).log_softmax(-1)
            logprobs = every.gather(-1, tokens[:, None])[:, 0]
            entropies = -(every.exp() * every).sum(-1)
        with torch.no_grad():
            first: Tensor = own(rows[:1])
        read.append((logprobs, entropies, first))
        return first[None]

    head.forward = forward
    try:
        yield read
    finally:
        del head.forward
