"""From hidden states to the log-probabilities and entropies of tokens, without ever holding the logits of all of them.

32,000 tokens of a vocabulary of 152,000 have logits of 19 GB. Here some tokens have theirs for some words at a time,
once forwards and once more backwards, and what stays is a few numbers a token.
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

TILE = 2**24
"""Logits that are there at a time, forwards and backwards: 64 MB in float32, and less than four times that with what is
made of them.
"""
ROWS = 2048
"""Tokens of a tile, if a vocabulary is too large for all its words to be in it: with few of them most of the time would
go into reading the output layer's weights again.
"""

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

    def slope(self, logits: Tensor) -> Tensor | None:
        """The derivative of `logits` by what the cap was put on; None without a cap."""
        return None if self.cap is None else logits.mul(self.temperature / self.cap).square_().neg_().add_(1.0)

    def backward(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """The gradient by the output layer's logits, from that by the finished ones, which it overwrites."""
        gradient.mul_(self.scale / self.temperature)
        return gradient if slope is None else gradient.mul_(slope)


def finish_of(model: Model) -> Finish:
    """What the model's family does to its logits, as its configuration says it."""
    config = model.config.get_text_config()
    scale = next((float(own) for name in _SCALES if (own := getattr(config, name, None)) is not None), 1.0)
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Finish(scale, None if cap is None else float(cap))


class _Readout(torch.autograd.Function):
    """`logprobs_and_entropies`, tile by tile: some tokens times some words, and the sums of a token's softmax carried
    from tile to tile (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").

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
            for rows, every in _tiles(len(hidden), len(weight)):
                sums = _Sums(tokens[rows])
                for words in every:
                    sums.add(finish(_raw(hidden[rows], weight, bias, words)), words)
                totals[rows] = sums.total
                logprobs[rows] = sums.chosen - totals[rows]
                entropies[rows] = totals[rows] - sums.moment / sums.shares
        context.save_for_backward(hidden, weight, bias, tokens, totals, entropies)
        context.finish = finish
        context.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(context: Any, *by: Tensor | None) -> tuple[Tensor | None, ...]:
        if by[0] is None and by[1] is None:
            return (None,) * 5
        hidden, weight, bias, tokens, totals, entropies = context.saved_tensors
        asked = zip((hidden, weight, bias), context.types, context.needs_input_grad[:3], strict=True)
        found = [torch.zeros_like(own, dtype=kept) if wanted else None for own, kept, wanted in asked]
        of_hidden, of_weight, of_bias = found
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, every in _tiles(len(hidden), len(weight)):
                by_logprob, by_entropy = (None if own is None else own[rows, None] for own in by)
                pulled = None if of_hidden is None else torch.zeros_like(of_hidden[rows], dtype=torch.float32)
                for words in every:
                    logits = context.finish(_raw(hidden[rows], weight, bias, words))
                    slope = context.finish.slope(logits)
                    gradient = _by_logits(
                        logits, _Place.of(tokens[rows], words), totals[rows, None], entropies[rows, None],
                        by_logprob, by_entropy,
                    )  # fmt: skip
                    gradient = context.finish.backward(gradient, slope).to(hidden.dtype)
                    if pulled is not None:
                        pulled += gradient @ weight[words]
                    if of_weight is not None:
                        _add_product(of_weight[words], gradient.T, hidden[rows])
                    if of_bias is not None:
                        of_bias[words] += gradient.sum(0)
                if of_hidden is not None and pulled is not None:
                    of_hidden[rows] = pulled
        return of_hidden, of_weight, of_bias, None, None


def _raw(hidden: Tensor, weight: Tensor, bias: Tensor | None, words: slice) -> Tensor:
    """(n, words) what the output layer makes of hidden states (n, H) for some words."""
    return nn.functional.linear(hidden, weight[words], None if bias is None else bias[words])


class _Sums:
    """Over the words so far, (n,) each: the highest logit, Σ exp(z - highest), Σ z exp(z - highest), and the logit of
    the token itself.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.shares, self.moment, self.chosen = (torch.zeros_like(tokens, dtype=torch.float32) for _ in range(3))
        self.highest = torch.full_like(self.shares, -torch.inf)

    def add(self, logits: Tensor, words: slice) -> None:
        """Take in the logits (n, words) of some more words."""
        highest = torch.maximum(self.highest, logits.amax(-1))
        shift = highest.masked_fill(highest == -torch.inf, 0.0)  # -inf less -inf would be nan
        shrunk = (self.highest - shift).exp_()
        shares = logits.sub(shift[:, None]).exp_()  # once, for the sum and for the entropy
        self.shares = self.shares * shrunk + shares.sum(-1)
        self.moment = self.moment * shrunk + shares.mul_(logits).nansum(-1)  # 0 of a logit at -inf is nan
        self.highest = highest
        place = _Place.of(self.tokens, words)
        self.chosen = torch.where(place.inside, logits.gather(-1, place.column)[:, 0], self.chosen)

    @property
    def total(self) -> Tensor:
        """(n,) log Σ exp z."""
        return self.highest + self.shares.log()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where (n,) tokens stand among some words: whether at all, (n,) bool, and the column, (n, 1)."""

    inside: Tensor
    column: Tensor

    @staticmethod
    def of(tokens: Tensor, words: slice) -> _Place:
        inside = (tokens >= words.start) & (tokens < words.stop)
        return _Place(inside, (tokens - words.start).clamp(0, words.stop - words.start - 1)[:, None])


def _by_logits(
    logits: Tensor, token: _Place, total: Tensor, entropy: Tensor, by_logprob: Tensor | None, by_entropy: Tensor | None
) -> Tensor:
    """(n, words) the gradient by finished logits, which it overwrites, given those by log-probability, by entropy, or
    both; all others are (n, 1).
    """
    logshares = logits.sub_(total)
    if by_entropy is None:
        assert by_logprob is not None
        gradient = logshares.exp_().mul_(by_logprob)
    else:
        shares = logshares.exp()
        gradient = logshares.add_(entropy).mul_(by_entropy)
        gradient = (gradient if by_logprob is None else gradient.add_(by_logprob)).mul_(shares)
    gradient.neg_()
    if by_logprob is None:
        return gradient
    return gradient.scatter_add_(-1, token.column, by_logprob * token.inside[:, None])


def _tiles(count: int, vocabulary: int) -> Iterator[tuple[slice, list[slice]]]:
    """Some rows after the other, and for each all words in parts."""
    words = min(vocabulary, max(TILE // ROWS, 1))
    rows = max(TILE // words, 1)
    every = [slice(first, min(first + words, vocabulary)) for first in range(0, vocabulary, words)]
    return ((slice(first, min(first + rows, count)), every) for first in range(0, count, rows))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left @ right, the sum in the type of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def logprobs_and_entropies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, finish: Finish = Finish()
) -> tuple[Tensor, Tensor]:
    """(N,) the log-probabilities, in nats, of tokens (N,) under hidden (N, H) @ weight (V, H)ᵀ + bias (V,), finished,
    and (N,) the entropies of the distributions that they are from. Both float32 and differentiable; under autocast the
    products are in its type.

    Beside inputs and gradients it holds `TILE` logits at a time, however many tokens and words there are.
    """
    read: tuple[Tensor, Tensor] = _Readout.apply(hidden, weight, bias, tokens, finish)  # type: ignore[no-untyped-call]
    return read


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
            logprobs, entropies = logprobs_and_entropies(rows, head.weight, head.bias, tokens, finish)
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
