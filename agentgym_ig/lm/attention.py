"""The attention kernel that a model computes by, by transformers' name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agentgym_ig.lm.alone import alone_with


def kernel_of(model: Any) -> str:
    """The attention kernel that a model computes by."""
    return str(model.config.get_text_config()._attn_implementation)


@contextmanager
def attending_by(model: Any, kernel: str) -> Iterator[None]:
    """Have a model compute by another attention kernel; nobody else reads it meanwhile."""
    with alone_with(model):
        before = kernel_of(model)
        if kernel != before:
            model.set_attn_implementation(kernel)
        try:
            yield
        finally:
            if kernel != before:
                model.set_attn_implementation(before)
