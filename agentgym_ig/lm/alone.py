"""One user of a model at a time: sampling and scoring both change the model for the length of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_MAKING = Lock()


def alone_with(model: Any) -> Any:
    """The model's own lock, to be used as a context manager; the same thread may take it again."""
    with _MAKING:
        return _LOCKS.setdefault(model, RLock())


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """Alone with a model in evaluation mode, whatever mode its modules are in before and after.

    In training mode dropout would be read along, and gradient checkpointing keeps no keys and values.
    """
    with alone_with(model):
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
