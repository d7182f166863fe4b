"""What a model's forward pass takes, by name."""

from __future__ import annotations

import inspect
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")
"""Of the key-value cache: from transformers 5.24 on, and before that, or in older code of a model from the hub."""


def accepted(model: Any) -> frozenset[str]:
    """The arguments that the model's forward pass has a name for; an adapter passes all on."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(base.forward).parameters)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments that have a model read behind a key-value cache, and add to it what it reads.

    Raises ValueError for a model that has no such argument.
    """
    known = accepted(model)
    name = next((own for own in CACHE_NAMES if own in known), None)
    if name is None:
        raise ValueError(
            f"{type(model).__name__} keeps no keys and values between tokens; serve it, and take OpenAIPolicy"
        )
    return {name: cache, "use_cache": True}
