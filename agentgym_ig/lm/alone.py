"""One user of a model at a time: sampling and scoring both change the model for the length of a call."""

from __future__ import annotations

from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_MAKING = Lock()


def alone_with(model: Any) -> Any:
    """The model's own lock, to be used as a context manager; the same thread may take it again."""
    with _MAKING:
        return _LOCKS.setdefault(model, RLock())
