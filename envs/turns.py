"""One turn of several episodes: their actions read, all their queries searched in one call, their turns closed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from agentgym_ig.envs.episode import Episode, Reply
from agentgym_ig.errors import SearchFailed, SearchRefused
from agentgym_ig.indexes.base import Index
from agentgym_ig.types import Action, Hit

Found = list[list[Hit]]


def _check_actions(actions: Sequence[object]) -> None:
    """Raise TypeError for an action that is neither a string nor an `Action` of one."""
    for action in actions:
        said = action.text if isinstance(action, Action) else action
        if not isinstance(said, str):
            raise TypeError(f"the action is a {type(said).__name__}, wanted a string such as '<search>…</search>'")


@contextmanager
def _asking(episodes: Sequence[Episode], actions: Sequence[str | Action]) -> Iterator[list[tuple[str, ...]]]:
    """The queries of every episode's action; whatever goes wrong before the turns are closed, nothing has changed."""
    _check_actions(actions)
    asked = [episode.ask(action) for episode, action in zip(episodes, actions, strict=True)]
    try:
        yield asked
    except BaseException:  # Ctrl-C and a cancelled task too
        for episode in episodes:
            episode.unask()
        raise


def take_turns(index: Index, k: int, episodes: Sequence[Episode], actions: Sequence[str | Action]) -> list[Reply]:
    """One turn of each episode, with a single search, `k` passages a query, for all of their queries.

    Raises TypeError for an action that is no string, and ValueError for an index that does not answer every query;
    no episode has changed then, nor after any other error.
    """
    with _asking(episodes, actions) as asked:
        found = _find(index, asked, k)
    return [episode.reply(own) for episode, own in zip(episodes, found, strict=True)]


async def atake_turns(
    index: Index, k: int, episodes: Sequence[Episode], actions: Sequence[str | Action]
) -> list[Reply]:
    """The same without blocking the event loop: through the index's `asearch`, or in a thread where it has none."""
    search = getattr(index, "asearch", None)
    with _asking(episodes, actions) as asked:
        found: list[Found | SearchFailed]
        queries = [query for own in asked for query in own]
        if search is None or not queries:
            found = await asyncio.to_thread(_find, index, asked, k)
        else:
            try:
                found = list(_split(await search(queries, k), asked))
            except SearchRefused as error:
                found = await asyncio.to_thread(_find_each, index, asked, k, error)
            except SearchFailed as error:
                found = _failed(asked, error)
    return [episode.reply(own) for episode, own in zip(episodes, found, strict=True)]


def _find(index: Index, asked: Sequence[tuple[str, ...]], k: int) -> list[Found | SearchFailed]:
    """The hits of every episode's queries, or why their search failed."""
    queries = [query for own in asked for query in own]
    if not queries:
        return [[] for _ in asked]
    try:
        return list(_split(index.search(queries, k), asked))
    except SearchRefused as error:
        return _find_each(index, asked, k, error)
    except SearchFailed as error:
        return _failed(asked, error)


def _find_each(
    index: Index, asked: Sequence[tuple[str, ...]], k: int, error: SearchRefused
) -> list[Found | SearchFailed]:
    """A search for each episode: a server that refuses one's query shall not fail the others."""
    if len(asked) == 1:
        return [error]
    return [_find(index, [own], k)[0] for own in asked]


def _failed(asked: Sequence[tuple[str, ...]], error: SearchFailed) -> list[Found | SearchFailed]:
    return [error if own else [] for own in asked]


def _split(found: Found, asked: Sequence[tuple[str, ...]]) -> list[Found]:
    wanted = sum(map(len, asked))
    if len(found) != wanted:
        raise ValueError(f"the index gave {len(found)} results for {wanted} queries; wanted one each")
    results = iter(found)
    return [list(islice(results, len(own))) for own in asked]
