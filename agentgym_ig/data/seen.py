"""A set for millions of digests."""

from __future__ import annotations

import struct
from array import array

_TWO = struct.Struct("<QQ")
FIRST = 1 << 10


class Digests:
    """A set of 16-byte digests in 24 to 48 bytes for each; one of Python's takes some 110.

    Open addressing with linear probing: digests are spread evenly as they are.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(16 * FIRST))
        self._mask, self._count = FIRST - 1, 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: bytes) -> bool:
        first, second = _numbers(digest)
        return bool(self._slots[self._place(first, second) + 1])

    def add(self, digest: bytes) -> bool:
        """Put a digest in; whether it is new."""
        first, second = _numbers(digest)
        place = self._place(first, second)
        if self._slots[place + 1]:
            return False
        self._slots[place], self._slots[place + 1] = first, second
        self._count += 1
        if 3 * self._count > 2 * (self._mask + 1):
            self._grow()
        return True

    def _place(self, first: int, second: int) -> int:
        """Where these two numbers are, or would be put."""
        slots, place = self._slots, 2 * (first & self._mask)
        while slots[place + 1] and (slots[place + 1] != second or slots[place] != first):
            place = (place + 2) & (2 * self._mask + 1)
        return place

    def _grow(self) -> None:
        old = self._slots
        self._mask = 2 * self._mask + 1
        self._slots = array("Q", bytes(16 * (self._mask + 1)))
        for at in range(0, len(old), 2):
            if old[at + 1]:
                place = self._place(old[at], old[at + 1])
                self._slots[place], self._slots[place + 1] = old[at], old[at + 1]


def _numbers(digest: bytes) -> tuple[int, int]:
    first, second = _TWO.unpack(digest)
    return first, second or 1  # 0 marks an empty slot
