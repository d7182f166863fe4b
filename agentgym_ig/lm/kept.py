"""Keys and values of conversations, kept from one turn to the next."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def reasons_against(config: Any) -> list[str]:
    """Why keys and values of a model of this configuration are of no use in another place or batch; empty if they are.

    Kept ones stand beside those of other conversations with holes between them, and a window would count the holes.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    found = [f"layers of {kind}" for kind in sorted(kinds - {"full_attention"})]
    if not kinds and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        found.append("a sliding window")
    return found + odd_positions(config)


def odd_positions(config: Any) -> list[str]:
    """What makes positions depend on more than where a token stands: no kept keys and no tree can have that."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {own.get("rope_type") for own in (rope, *rope.values()) if isinstance(own, dict)}
    found = [f"RoPE of type {kind}" for kind in ("dynamic", "longrope") if kind in kinds]
    if getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt"):
        found.append("ALiBi")
    if hasattr(config, "attention_types"):
        found.append("local attention without layer_types")
    return found


class WeightWatch:
    """Tells whether a model's weights may have changed: a parameter or buffer was written to, moved or replaced, an
    adapter was switched, or an optimizer of this process took a step, which may leave no trace on a weight.
    """

    def __init__(self, model: Any) -> None:
        self.model, self._stepped, self._seen = model, False, _weights(model)
        self._hook = register_optimizer_step_post_hook(self._note_step)

    def _note_step(self, *_: object) -> None:
        self._stepped = True

    def changed(self) -> bool:
        """Since it was made, or last asked."""
        now, stepped = _weights(self.model), self._stepped
        changed = stepped or now != self._seen
        self._seen, self._stepped = now, False
        return changed

    def close(self) -> None:
        """Watch no more."""
        self._hook.remove()


class Kept:
    """What a model has read of conversations, found by their exact tokens; for the length of one session, and for as
    long as its weights stay the same.

    max_tokens: tokens kept at most. When they are used up, conversations that were not asked about the last time are
    forgotten, the oldest first; of the others as many as have room are kept.
    """

    def __init__(self, model: Any, max_tokens: int) -> None:
        self.max_tokens, self._watch = max_tokens, WeightWatch(model)
        self._states: OrderedDict[bytes, tuple[int, int, Tensor]] = OrderedDict()  # → call, tokens, states
        self._call = self.tokens = 0

    def close(self) -> None:
        """Forget everything, for good."""
        self._watch.close()
        self._clear()

    def _clear(self) -> None:
        self._states.clear()
        self.tokens = 0

    def begin(self, keys: Iterable[bytes]) -> None:
        """A call begins that asks about these; what other weights have read is gone."""
        if self._watch.changed():
            self._clear()
        self._call += 1
        for key in keys:
            if key in self._states:
                self._states[key] = (self._call, *self._states[key][1:])

    def take(self, key: bytes) -> Tensor | None:
        """The states of a conversation's beginning, (2 layers, heads, tokens, width), once; None if there are none."""
        found = self._states.pop(key, None)
        if found is None:
            return None
        self.tokens -= found[1]
        return found[2]

    def add(self, key: bytes, states: Tensor) -> None:
        """Keep a conversation's states if there is room, or can be made."""
        needed = states.shape[2]
        self.take(key)
        while self._states and self.tokens + needed > self.max_tokens:
            oldest = next(iter(self._states))
            if self._states[oldest][0] == self._call:
                return
            self.take(oldest)
        if self.tokens + needed <= self.max_tokens:
            self._states[key] = (self._call, needed, states)
            self.tokens += needed


def key_of(ids: Sequence[int]) -> bytes:
    """Tokens, exactly, as something that is quickly looked up."""
    return array("I", ids).tobytes()


def _weights(model: Any) -> list[Any]:
    """What changes when the model's weights do."""
    tensors = [*model.parameters(), *model.buffers()]
    switches = [
        (own.disable_adapters, tuple(own.active_adapters), tuple(own.merged_adapters))
        for own in model.modules()
        if hasattr(own, "disable_adapters") and hasattr(own, "merged_adapters")
    ]
    return [(id(own), own._version, own.data_ptr(), own.dtype) for own in tensors] + switches
