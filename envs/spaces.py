"""A Gymnasium space for ordinary prose."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces
from gymnasium.error import CustomSpaceError
from gymnasium.vector.utils import create_shared_memory


class Prose(spaces.Text):
    """Any string up to a length, in any script.

    Gymnasium's `Text` admits only a fixed set of characters, by default letters and digits; this one samples
    from those and contains every string.
    """

    def __init__(self, max_length: int = 10_000_000) -> None:
        super().__init__(max_length=max_length, min_length=0)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a string that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A short random string; `mask` and `probability` are not supported."""
        if mask is not None or probability is not None:
            raise ValueError("Prose draws without a mask or probabilities")
        length = int(self.np_random.integers(1, 41))
        return "".join(self.np_random.choice(list(" <>/abcdeghinorst"), size=length))

    def __repr__(self) -> str:
        return f"Prose({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prose) and self.max_length == other.max_length

    __hash__ = None  # type: ignore[assignment]  # as Gymnasium's own spaces: equal by value, mutable generator


@create_shared_memory.register(Prose)
def _no_shared_memory(space: Prose, n: int = 1, ctx: Any = None) -> Any:
    """Gymnasium would keep texts as indices into a fixed set of characters, and fail at the first that is not in it."""
    raise CustomSpaceError("texts of any script and length have no place in shared memory; give shared_memory=False")
