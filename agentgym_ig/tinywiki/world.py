"""TinyWiki: a generated encyclopedia small enough that search agents learn on a laptop.

Films, persons, companies and cities point at each other; each has one short article. Questions follow one to
four links. All facts are drawn at random from a seed, so nothing about them can be known beforehand, and a
test world shares no name with a training world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from agentgym_ig.tinywiki.names import Pool, name_pool
from agentgym_ig.types import Passage, Question

SCHEMA: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "film": {"director": ("by", "person"), "star": ("with", "person"), "studio": ("from", "company")},
    "person": {"birthplace": ("from", "city"), "spouse": ("with", "person"), "employer": ("at", "company")},
    "company": {"headquarters": ("with", "city"), "founder": ("by", "person")},
    "city": {"mayor": ("under", "person"), "country": ("in", "country")},
    "country": {},
}
"""kind → relation → (the word before it in an article, kind of its value). Countries have no article."""

SIZES = {"film": 80, "person": 140, "company": 40, "city": 40, "country": 12}
"""Entities of each kind in a world of scale 1."""

RELATIONS = tuple(relation for relations in SCHEMA.values() for relation in relations)
STOPWORDS = (*RELATIONS, *SCHEMA, "what", "is", "the", "of", "a", "by", "with", "from", "at", "under", "in")
"""Words that say nothing about which article is meant; the TinyWiki index leaves them out."""

HELD_OUT = frozenset(
    {
        ("employer", "director"),
        ("spouse", "director"),
        ("birthplace", "founder"),
        ("birthplace", "spouse"),
        ("employer", "spouse"),
        ("birthplace", "star"),
        ("spouse", "star"),
    }
)
"""(outer, inner) pairs of relations that no training question contains."""

Chain = tuple[str, ...]
"""A kind, then the relations to follow from it, first hop first."""


def chains(hops: int, *, held_out: bool) -> list[Chain]:
    """All chains of that many hops: with a held-out pair somewhere, or with none."""
    found: list[tuple[Chain, str]] = [((kind,), kind) for kind in SCHEMA]
    for _ in range(hops):
        found = [
            ((*chain, relation), value_kind)
            for chain, kind in found
            for relation, (_, value_kind) in SCHEMA[kind].items()
        ]
    return [chain for chain, _ in found if _has_held_out_pair(chain) == held_out]


def _has_held_out_pair(chain: Chain) -> bool:
    relations = chain[1:]
    return any((outer, inner) in HELD_OUT for inner, outer in pairwise(relations))


@dataclass(frozen=True, slots=True)
class Path:
    """A question's way through the world: where it starts, what it follows, and every entity it meets."""

    kind: str
    relations: tuple[str, ...]
    entities: tuple[str, ...]

    @property
    def text(self) -> str:
        """The question in English, outermost relation first."""
        links = " of the ".join(reversed(self.relations))
        return f"What is the {links} of the {self.kind} {self.entities[0]}?"


class World:
    """All facts of one TinyWiki.

    `seed` draws the facts, `pool` says whose names are used, `scale` multiplies the number of entities.
    """

    def __init__(self, seed: int, pool: Pool = "train", scale: float = 1.0) -> None:
        if scale * min(SIZES.values()) < 2:
            raise ValueError(f"scale={scale} leaves too few entities; use {2 / min(SIZES.values()):.2f} or more")
        self.seed, self.pool, self.scale = seed, pool, scale
        rng = np.random.default_rng((seed, ["train", "validation", "test"].index(pool)))
        sizes = {kind: round(size * scale) for kind, size in SIZES.items()}
        names = name_pool(pool, sum(sizes.values()))
        chosen = iter(rng.permutation(len(names))[: sum(sizes.values())])
        self.members = {kind: [names[next(chosen)] for _ in range(size)] for kind, size in sizes.items()}
        self.kind_of = {name: kind for kind, members in self.members.items() for name in members}
        self.facts = {name: self._draw_facts(name, kind, rng) for name, kind in self.kind_of.items()}

    def _draw_facts(self, name: str, kind: str, rng: np.random.Generator) -> dict[str, str]:
        relations = list(SCHEMA[kind])
        rng.shuffle(relations)
        return {relation: self._draw_value(name, SCHEMA[kind][relation][1], rng) for relation in relations}

    def _draw_value(self, name: str, kind: str, rng: np.random.Generator) -> str:
        members = self.members[kind]
        value = members[rng.integers(len(members))]
        return value if value != name else self._draw_value(name, kind, rng)

    @cached_property
    def passages(self) -> list[Passage]:
        """One article per entity that has facts, in a fixed order."""
        named = [name for name, facts in self.facts.items() if facts]
        return [Passage(f"tiny-{i:05d}", name, self.article(name)) for i, name in enumerate(named)]

    @cached_property
    def passage_ids(self) -> dict[str, str]:
        """Article title → passage id."""
        return {passage.title: passage.id for passage in self.passages}

    def article(self, name: str) -> str:
        """The article's text: one sentence in which every value stands right behind its relation word."""
        kind = self.kind_of[name]
        facts = [f"{SCHEMA[kind][relation][0]} {relation} {value}" for relation, value in self.facts[name].items()]
        return f"{name} is a {kind}, {', '.join(facts)}."

    def path(self, chain: Chain, start: str) -> Path | None:
        """Follow a chain from an entity; None where it meets an entity twice."""
        entities = [start]
        for relation in chain[1:]:
            entities.append(self.facts[entities[-1]][relation])
        return Path(chain[0], chain[1:], tuple(entities)) if len(set(entities)) == len(entities) else None

    def draw_paths(self, chosen: Sequence[Chain], count: int, rng: np.random.Generator) -> list[Path]:
        """Draw different paths: the chain first, then where it starts, each with equal chances.

        Raises ValueError when the world holds fewer such paths than asked for.
        """
        found: dict[Path, None] = {}
        for _ in range(100 * count):
            chain = chosen[int(rng.integers(len(chosen)))]
            starts = self.members[chain[0]]
            path = self.path(chain, starts[rng.integers(len(starts))])
            if path is not None:
                found[path] = None
            if len(found) == count:
                return list(found)
        raise ValueError(
            f"found {len(found)} of {count} different questions in this world; ask for fewer or raise scale"
        )

    def question(self, path: Path, dataset: str) -> Question:
        """A path as a question.

        The answer may be given with its relation in front ("employer Amber Ashford") or without it; the
        supporting passages are those of every entity before the answer.
        """
        value = path.entities[-1]
        key = "-".join((*reversed(path.relations), path.entities[0].replace(" ", "-"))).lower()
        return Question(
            id=f"{dataset}-{key}",
            text=path.text,
            answers=(f"{path.relations[-1]} {value}", value),
            dataset=dataset,
            supporting=tuple(self.passage_ids[name] for name in path.entities[:-1]),
        )
