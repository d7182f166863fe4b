"""Two-word names of real-looking words, split for good into train, validation and test pools.

Every word is frequent in all pools; only the pair is new. So a policy can learn to copy any name but can
remember none of those that it will be tested on.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np

Pool = Literal["train", "validation", "test"]
POOLS: tuple[Pool, ...] = ("train", "validation", "test")

BASE_WORDS = 40
"""First and last words that the small policy knows; larger worlds draw on more."""

_FIRST = (
    "Amber Silver Quiet Golden Iron Crimson Hollow Winter Summer Marble Velvet Copper Scarlet Misty Ivory Cobalt "
    "Gentle Hidden Broken Distant Lucky Noble Rapid Silent Stormy Sunny Tall Wild Young Ancient Bright Clever "
    "Dusty Early Frozen Green Humble Jolly Lonely Mighty"
).split()
_STEMS = "Ash Bel Cald Dun Elm Fair Gran Har Ing Kel Lang Mar Nor Oak Pem Rad Stan Thorn Wex Yar".split()
_ENDINGS = (
    "ford wick ton ham bury worth field mere stead combe ley port gate cliff dale ridge moor shaw by thorpe".split()
)
_FIRST_ENDINGS = "ia en is or us el in an on ara eth ina olf ric win ya ius een old ira".split()


def _words(count: int, base: list[str], stems: list[str], endings: list[str]) -> list[str]:
    """The first `count` words: the base ones, then stem + ending in an order that varies both (20 of each)."""
    more = [stems[i % 20] + endings[(i + i // 20) % 20] for i in range(400)]
    return list(dict.fromkeys([*base, *more]))[:count]


LAST_WORDS = _words(400, [], _STEMS, _ENDINGS)
FIRST_WORDS = _words(400, _FIRST, _STEMS, _FIRST_ENDINGS)


def name_pool(pool: Pool, needed: int) -> list[str]:
    """All names of a pool, in a fixed shuffled order: half of the pairs for train, a quarter each for the others.

    The pool is made of the fewest words that hold `needed` names, from `BASE_WORDS` upwards, so that the
    usual worlds share one vocabulary. Raises ValueError when even all words are too few.
    """
    share = {"train": 2, "validation": 1, "test": 1}[pool]
    words = BASE_WORDS
    while words * words * share // 4 < needed:
        words *= 2
        if words > len(LAST_WORDS):
            most = len(LAST_WORDS) ** 2 * share // 4
            raise ValueError(
                f"a world of {needed} names does not fit the {pool} pool of {most}; choose a smaller scale"
            )
    pairs = [f"{first} {last}" for first, last in product(FIRST_WORDS[:words], LAST_WORDS[:words])]
    order = np.random.default_rng(words).permutation(len(pairs))
    quarter = len(pairs) // 4
    first = {"train": 0, "validation": 2 * quarter, "test": 3 * quarter}[pool]
    return [pairs[i] for i in order[first : first + share * quarter]]
