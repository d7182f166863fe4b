"""Search results kept: in memory for those asked last, and in an SQLite file for the next run."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock

import orjson

from agentgym_ig.errors import IndexUnusable
from agentgym_ig.indexes.base import Index, check_k
from agentgym_ig.text import clean
from agentgym_ig.types import Hit, Passage

ASKED_AT_ONCE = 500
"""Keys per SQL statement; SQLite allows some thousands."""


class CachedIndex:
    """Answers a query that was asked before, with the same k, from what was found then. Failed searches are not kept.

    Args:
        index: what is asked otherwise; each batch asks it once, for the queries that are new in it.
        key: names what the results depend on (the index and its settings); results under another key are not seen.
        path: the SQLite file, made where there is none; None keeps results in memory only.
        entries: results that stay in memory, those used last.

    Raises IndexUnusable when the file is no SQLite database.
    """

    def __init__(self, index: Index, *, key: str = "", path: Path | None = None, entries: int = 100_000) -> None:
        if entries < 1:
            raise ValueError(f"entries={entries}: keep at least 1")
        self.index, self.key, self.entries = index, key, entries
        self.corpus_sha256: str | None = getattr(index, "corpus_sha256", None)
        self.hits = self.misses = 0
        self._recent: OrderedDict[tuple[str, int], list[Hit]] = OrderedDict()
        self._lock = Lock()
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sql(
                "CREATE TABLE IF NOT EXISTS results (key TEXT, k INTEGER, query TEXT, found BLOB, "
                "PRIMARY KEY (key, k, query)) WITHOUT ROWID"
            )

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Index.search`."""
        check_k(k)
        asked = list(map(clean, queries))  # as SQLite will hold them
        known = self._known(set(asked), k)
        new = list(dict.fromkeys(query for query in asked if query not in known))
        if new:
            found = dict(zip(new, self.index.search(new, k), strict=True))
            self._keep(found, k)
            known |= found
        self.misses += len(new)
        self.hits += len(asked) - len(new)
        return [list(known[query]) for query in asked]

    def _known(self, queries: set[str], k: int) -> dict[str, list[Hit]]:
        known: dict[str, list[Hit]] = {}
        with self._lock:
            for query in queries:
                if (hits := self._recent.get((query, k))) is not None:
                    self._recent.move_to_end((query, k))
                    known[query] = hits
        stored = self._read(sorted(queries - set(known)), k)
        self._remember(stored, k)
        return known | stored

    def _read(self, queries: Sequence[str], k: int) -> dict[str, list[Hit]]:
        stored: dict[str, list[Hit]] = {}
        if self._path is not None:
            for first in range(0, len(queries), ASKED_AT_ONCE):
                some = queries[first : first + ASKED_AT_ONCE]
                marks = ",".join("?" * len(some))
                statement = f"SELECT query, found FROM results WHERE key = ? AND k = ? AND query IN ({marks})"
                for query, found in self._sql(statement, [(self.key, k, *some)]):
                    stored[query] = [Hit(Passage(*row[:3]), row[3]) for row in orjson.loads(found)]
        return stored

    def _keep(self, found: dict[str, list[Hit]], k: int) -> None:
        self._remember(found, k)
        if self._path is not None:
            rows = [
                (self.key, k, query, orjson.dumps([(p.id, p.title, p.text, score) for p, score in hits]))
                for query, hits in found.items()
            ]
            self._sql("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", rows)

    def _remember(self, found: dict[str, list[Hit]], k: int) -> None:
        with self._lock:
            for query, hits in found.items():
                self._recent[query, k] = hits
            while len(self._recent) > self.entries:
                self._recent.popitem(last=False)

    def _sql(self, statement: str, rows: Iterable[Sequence[object]] = ((),)) -> list[tuple[str, bytes]]:
        """Run a statement once for each row of values, in one transaction, on a connection of its own."""
        try:
            with closing(sqlite3.connect(str(self._path), timeout=60)) as database, database:
                return [found for values in rows for found in database.execute(statement, values)]
        except sqlite3.DatabaseError as error:
            raise IndexUnusable(
                f"the cache {self._path} cannot be used ({error}); delete it, or name another"
            ) from error
