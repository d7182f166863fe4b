"""An index on the other side of HTTP: any server that speaks Search-R1's `POST /retrieve`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import orjson
from tenacity import AsyncRetrying, Retrying, retry_if_not_exception_type, stop_after_attempt, wait_random_exponential

from agentgym_ig.data.passages import split_contents
from agentgym_ig.errors import SearchRefused, SearchTimeout, SearchUnavailable
from agentgym_ig.indexes.base import check_k
from agentgym_ig.text import clean
from agentgym_ig.types import Hit, Passage


class HttpIndex:
    """Searches through one or several equal endpoints.

    A failed attempt goes on to the next endpoint, with growing pauses; what the server refuses is not tried
    again. `search` is for threads and `asearch` for event loops. Close it, or use it as a context manager.

    Args:
        urls: base addresses, such as `http://127.0.0.1:8000`; the first that works is kept.
        timeout: seconds for one attempt.
        attempts: how often a request is tried in all.
        token: sent as `Authorization: Bearer TOKEN`.
        batch: queries per request; more are sent in several.
        pause: seconds before the second attempt; doubles with each.

    Raises SearchTimeout, SearchUnavailable or SearchRefused, all of them SearchFailed.
    """

    def __init__(
        self,
        urls: Sequence[str] | str,
        *,
        timeout: float = 30.0,
        attempts: int = 4,
        token: str | None = None,
        batch: int = 512,
        pause: float = 0.2,
    ) -> None:
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        if not self.urls or attempts < 1 or batch < 1:
            raise ValueError(f"urls={self.urls}, attempts={attempts}, batch={batch}: give at least one of each")
        self.attempts, self.batch, self.pause = attempts, batch, pause
        self._options: dict[str, Any] = {
            "timeout": timeout,
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
        }
        self._client = httpx.Client(**self._options)
        self._async_client: httpx.AsyncClient | None = None  # most users never need one, and it costs a TLS context
        self._chosen = 0

    def __enter__(self) -> HttpIndex:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that `search` keeps."""
        self._client.close()

    async def aclose(self) -> None:
        """Close the connections that `asearch` keeps, in the event loop that made them; the next one makes new ones."""
        if self._async_client is not None:
            await self._async_client.aclose()
            self._async_client = None

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Index.search`."""
        found: list[list[Hit]] = []
        for body in self._bodies(queries, k):
            for attempt in Retrying(**self._policy()):
                with attempt, self._reaching() as url:
                    found += self._parse(url, self._client.post(url, json=body), len(body["queries"]))
        return found

    async def asearch(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The same without blocking the event loop."""
        found: list[list[Hit]] = []
        client = self._async_client = self._async_client or httpx.AsyncClient(**self._options)
        for body in self._bodies(queries, k):
            async for attempt in AsyncRetrying(**self._policy()):
                with attempt, self._reaching() as url:
                    response = await client.post(url, json=body)
                    found += self._parse(url, response, len(body["queries"]))
        return found

    def _bodies(self, queries: Sequence[str], k: int) -> list[dict[str, Any]]:
        check_k(k)
        asked = list(map(clean, queries))
        return [
            {"queries": asked[first : first + self.batch], "topk": k, "return_scores": True}
            for first in range(0, len(asked), self.batch)
        ]

    def _policy(self) -> dict[str, Any]:
        return {
            "stop": stop_after_attempt(self.attempts),
            "wait": wait_random_exponential(multiplier=self.pause, max=10.0),
            "retry": retry_if_not_exception_type((SearchRefused, ValueError)),
            "reraise": True,
        }

    @contextmanager
    def _reaching(self) -> Iterator[str]:
        """The endpoint to ask; when it cannot be reached or fails, the next attempt gets the next one."""
        url = f"{self.urls[self._chosen % len(self.urls)].rstrip('/')}/retrieve"
        try:
            yield url
        except httpx.TimeoutException as error:
            self._chosen += 1
            raise SearchTimeout(f"{url} did not answer in time ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            self._chosen += 1
            raise SearchUnavailable(f"{url} cannot be reached: {error}") from error
        except SearchUnavailable:
            self._chosen += 1
            raise

    def _parse(self, url: str, response: httpx.Response, wanted: int) -> list[list[Hit]]:
        if response.status_code >= 500 or response.status_code in (404, 429):  # 404: a gateway with nothing behind it
            raise SearchUnavailable(f"{url} answered {response.status_code}: {response.text[:200]}")
        if response.status_code != 200:
            raise SearchRefused(f"{url} answered {response.status_code}: {response.text[:200]}")
        try:
            found = [[_hit(entry) for entry in hits] for hits in orjson.loads(response.content)["result"]]
        except (ValueError, KeyError, TypeError) as error:
            raise SearchRefused(f"{url} answered something else than search results: {error!r}") from error
        if len(found) != wanted:
            raise SearchRefused(f"{url} answered {len(found)} results for {wanted} queries")
        return found


def _hit(entry: dict[str, Any]) -> Hit:
    row = entry["document"]
    if "text" in row and "title" in row:
        title, text = row["title"], row["text"]
    else:
        title, text = split_contents(row["contents"])
    return Hit(Passage(str(row["id"]), title, text), float(entry["score"]))
