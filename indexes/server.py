"""An index as an HTTP service, in the wire format of Search-R1's retrieval server.

`POST /retrieve` takes `{"queries": [...], "topk": 3, "return_scores": true}` and answers
`{"result": [[{"document": {"id", "title", "text", "contents"}, "score"}, ...], ...]}`, or the bare documents without
scores. `query`, `k` and `top_k` are understood too. Requests that arrive while a search is running are merged
into the next one, one call of the index per k.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentgym_ig.data.passages import join_contents
from agentgym_ig.errors import SearchFailed
from agentgym_ig.indexes.base import Index
from agentgym_ig.types import Hit


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask."""

    queries: int = 1024
    k: int = 1000
    query_characters: int = 100_000
    body_bytes: int = 16_000_000
    default_k: int = 3
    """Passages where a request names no number."""


class RetrieveRequest(BaseModel):
    """The body of `POST /retrieve`. Unknown fields are an error."""

    model_config = ConfigDict(extra="forbid")

    queries: list[str] = Field(validation_alias=AliasChoices("queries", "query"))
    k: int | None = Field(default=None, validation_alias=AliasChoices("topk", "top_k", "k"))
    return_scores: bool = False

    @field_validator("queries", mode="before")
    @classmethod
    def one_is_a_list_of_one(cls, given: Any) -> Any:
        """A single query may stand without a list."""
        return [given] if isinstance(given, str) else given


@dataclass(slots=True)
class _Waiting:
    """One request's queries, and where its hits will be put."""

    queries: Sequence[str]
    k: int
    done: asyncio.Future[list[list[Hit]]]


@dataclass
class Merger:
    """Runs searches one after the other in a thread; all that arrives meanwhile goes into the next one."""

    index: Index
    merge: bool = True
    """False makes every request a search of its own: for comparison."""
    batches: deque[int] = field(default_factory=lambda: deque(maxlen=10_000))
    _queue: asyncio.Queue[_Waiting] = field(default_factory=asyncio.Queue)

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """As `Index.search`, merged with what others ask at the same time."""
        waiting = _Waiting(queries, k, asyncio.get_running_loop().create_future())
        await self._queue.put(waiting)
        return await waiting.done

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        while True:
            together = [await self._queue.get()]
            while self.merge and not self._queue.empty():
                together.append(self._queue.get_nowait())
            for k in dict.fromkeys(waiting.k for waiting in together):
                await self._search_batch([waiting for waiting in together if waiting.k == k], k)

    async def _search_batch(self, together: list[_Waiting], k: int) -> None:
        queries = [query for waiting in together for query in waiting.queries]
        self.batches.append(len(queries))
        try:
            found = await asyncio.to_thread(self.index.search, queries, k)
        except Exception as error:  # whatever it is, it belongs to these requests and not to the server
            for waiting in together:
                if not waiting.done.done():
                    waiting.done.set_exception(error)
            return
        for waiting in together:
            own, found = found[: len(waiting.queries)], found[len(waiting.queries) :]
            if not waiting.done.done():  # its client may have gone
                waiting.done.set_result(own)


class Statistics:
    """Counts and latencies, for `/stats` and for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.queries = Counter("retrieval_queries", "Queries answered", registry=self.registry)
        self.requests = Counter("retrieval_requests", "Requests by status", ["status"], registry=self.registry)
        self.seconds = Histogram("retrieval_request_seconds", "Time per request", registry=self.registry)
        self.recent: deque[float] = deque(maxlen=10_000)
        self.answered = 0

    def note(self, queries: int, seconds: float) -> None:
        """Count the queries of one request that was answered."""
        self.queries.inc(queries)
        self.seconds.observe(seconds)
        self.recent.append(seconds)
        self.answered += queries


class StatusCount:
    """Counts requests to `/retrieve` by the status they end with, whoever gives it: refusals and failures too."""

    def __init__(self, app: ASGIApp, requests: Counter) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, reading the status on its way back."""
        status = 500  # what the server makes of an error that nothing below has answered

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            if scope["type"] == "http" and scope["path"] == "/retrieve":
                self.requests.labels(str(status)).inc()


class BodyLimit:
    """Ends a request whose body grows over a number of bytes, whether or not it says its length beforehand."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, f"the body is over {self.most} bytes; send fewer queries at a time")
            return message

        await self.app(scope, counted, send)


def leave_cores_to_others() -> None:
    """Let the threads of OpenMP sleep while they wait, where nobody has said otherwise.

    Spinning, as they do by default, they take the cores from the threads that speak HTTP. Has an effect only before
    torch or FAISS is loaded.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def document(hit: Hit) -> dict[str, Any]:
    """A passage as Search-R1 sends it."""
    passage = hit.passage
    contents = join_contents(passage.title, passage.text)
    return {"id": passage.id, "title": passage.title, "text": passage.text, "contents": contents}


def _with_score(hit: Hit) -> dict[str, Any]:
    return {"document": document(hit), "score": hit.score}


def create_app(index: Index, *, limits: Limits | None = None, token: str | None = None, merge: bool = True) -> FastAPI:
    """The service over an index. With `token`, requests need `Authorization: Bearer TOKEN`."""
    limits = limits or Limits()
    merger, statistics = Merger(index, merge), Statistics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(merger.run())
        yield
        worker.cancel()

    async def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "this server needs the header 'Authorization: Bearer TOKEN'")

    app = FastAPI(title="agentgym_ig retrieval", lifespan=lifespan)
    app.add_middleware(BodyLimit, most=limits.body_bytes)
    app.add_middleware(StatusCount, requests=statistics.requests)

    @app.post("/retrieve", dependencies=[Depends(allowed)])
    async def retrieve(asked: RetrieveRequest) -> Response:
        started = time.perf_counter()
        k = limits.default_k if asked.k is None else asked.k
        _check(asked.queries, k, limits)
        try:
            found = await merger.search(asked.queries, k)
        except SearchFailed as error:
            raise HTTPException(503, str(error)) from error
        statistics.note(len(asked.queries), time.perf_counter() - started)
        entry = _with_score if asked.return_scores else document
        # Straight to bytes: FastAPI would look at every value again, which takes longer than most searches.
        content = orjson.dumps(
            {"result": [[entry(hit) for hit in hits] for hits in found]}, option=orjson.OPT_SERIALIZE_NUMPY
        )
        return Response(content, media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/stats", dependencies=[Depends(allowed)])
    async def stats() -> dict[str, Any]:
        return _summary(statistics, merger)

    @app.get("/metrics", dependencies=[Depends(allowed)])
    async def metrics() -> Response:
        return Response(generate_latest(statistics.registry), media_type="text/plain; version=0.0.4")

    return app


def _check(queries: Sequence[str], k: int, limits: Limits) -> None:
    if len(queries) > limits.queries:
        raise HTTPException(413, f"{len(queries)} queries in one request; at most {limits.queries}")
    if not 1 <= k <= limits.k:
        raise HTTPException(422, f"topk={k} must lie between 1 and {limits.k}")
    longest = max(map(len, queries), default=0)
    if longest > limits.query_characters:
        raise HTTPException(413, f"a query has {longest} characters; at most {limits.query_characters}")


def _summary(statistics: Statistics, merger: Merger) -> dict[str, Any]:
    recent, batches = np.array(statistics.recent), np.array(merger.batches)
    percentiles = {f"p{share}": float(np.percentile(recent, share)) if recent.size else None for share in (50, 90, 99)}
    return {
        "queries": statistics.answered,
        "searches": len(batches),
        "latency_s": percentiles,
        "batch_size": {"mean": float(batches.mean()), "max": int(batches.max())} if batches.size else None,
    }
