"""One turn of several episodes: their actions read, all their queries searched in one call, their turns closed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice

from agentgym_ig.envs.episode import Episode, Reply
from agentgym_ig.errors import SearchFailed, SearchRefused
from agentgym_ig.indexes.base import Index
from agentgym_ig.types import Action, Hit

Found = list[list[Hit]]


def check_actions(actions: Sequence[object]) -> None:
    """Raise TypeError for an action that is neither a string nor an `Action`."""
    for action in actions:
        if not isinstance(action, str | Action):
            raise TypeError(f"the action is a {type(action).__name__}, wanted a string such as '<search>…</search>'")


def take_turns(index: Index, k: int, episodes: Sequence[Episode], actions: Sequence[str | Action]) -> list[Reply]:
    """One turn of each episode, with a single search, `k` passages a query, for all of their queries.

    Raises TypeError for an action that is no string, before any episode has changed, and ValueError for an index
    that does not answer every query.
    """
    check_actions(actions)
    asked = [episode.ask(action) for episode, action in zip(episodes, actions, strict=True)]
    return _close(episodes, _find(index, asked, k))


async def atake_turns(
    index: Index, k: int, episodes: Sequence[Episode], actions: Sequence[str | Action]
) -> list[Reply]:
    """The same without blocking the event loop: through the index's `asearch`, or in a thread where it has none."""
    check_actions(actions)
    asked = [episode.ask(action) for episode, action in zip(episodes, actions, strict=True)]
    search, queries = getattr(index, "asearch", None), [query for own in asked for query in own]
    found: list[Found | None]
    if search is None or not queries:
        found = await asyncio.to_thread(_find, index, asked, k)
    else:
        try:
            found = list(_split(await search(queries, k), asked))
        except SearchRefused:
            found = await asyncio.to_thread(_find_each, index, asked, k)
        except SearchFailed:
            found = _none(asked)
    return _close(episodes, found)


def _find(index: Index, asked: Sequence[tuple[str, ...]], k: int) -> list[Found | None]:
    """The hits of every episode's queries; None where the search failed."""
    queries = [query for own in asked for query in own]
    if not queries:
        return [[] for _ in asked]
    try:
        return list(_split(index.search(queries, k), asked))
    except SearchRefused:
        return _find_each(index, asked, k)
    except SearchFailed:
        return _none(asked)


def _find_each(index: Index, asked: Sequence[tuple[str, ...]], k: int) -> list[Found | None]:
    """A search for each episode: a server that refuses one's query shall not fail the others."""
    if len(asked) == 1:
        return [None]
    return [_find(index, [own], k)[0] for own in asked]


def _none(asked: Sequence[tuple[str, ...]]) -> list[Found | None]:
    return [None if own else [] for own in asked]


def _split(found: Found, asked: Sequence[tuple[str, ...]]) -> list[Found]:
    wanted = sum(map(len, asked))
    if len(found) != wanted:
        raise ValueError(f"the index gave {len(found)} results for {wanted} queries; wanted one each")
    results = iter(found)
    return [list(islice(results, len(own))) for own in asked]


def _close(episodes: Sequence[Episode], found: Sequence[Found | None]) -> list[Reply]:
    return [episode.reply(own) for episode, own in zip(episodes, found, strict=True)]
