"""The retrieval server as a real process on loopback, and the client that talks to it."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentgym_ig.errors import SearchFailed, SearchRefused, SearchTimeout, SearchUnavailable
from agentgym_ig.indexes import Bm25Index, Index
from agentgym_ig.indexes.http import HttpIndex
from agentgym_ig.indexes.server import Merger, create_app
from agentgym_ig.types import Hit
from tests.fakes import PASSAGES, BrokenIndex, ListIndex

Served = tuple[str, subprocess.Popen[str]]


_FIRST = 20_000 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
PORTS = iter(range(_FIRST, _FIRST + 500))
"""Each worker of the tests has its own, below those that the system gives out: none is taken before it is served."""


def free_port() -> int:
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


@contextmanager
def serving(folder: Path, *more: str, port: int | None = None) -> Iterator[Served]:
    """A server process that answers; whatever happens, it does not outlive the block."""
    port = port or free_port()
    command = [
        sys.executable,
        "-m",
        "agentgym_ig",
        "index",
        "serve",
        "--index",
        str(folder),
        "--port",
        str(port),
        *more,
    ]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not answers(url):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.05)
            yield url, process
        finally:
            process.terminate()
            process.communicate(timeout=60)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "index"
    Bm25Index.build(PASSAGES, path)
    return path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder, "--max-queries", "8", "--max-k", "5") as (address, _):
        yield address


def post(url: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/retrieve", json=body, **options)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_the_wire_format_is_search_r1s(url: str, folder: Path, count: int) -> None:
    queries = ["radium", "capital of Poland", "zzz", "longest river", "Warsaw"][:count]
    local = Bm25Index.open(folder).search(queries, 2)
    scored = post(url, {"queries": queries, "topk": 2, "return_scores": True})
    assert scored.status_code == 200
    bare = post(url, {"queries": queries, "topk": 2, "return_scores": False})
    for answer, pick in ((scored, lambda e: (e["document"], e["score"])), (bare, lambda e: (e, None))):
        result = answer.json()["result"]
        assert len(result) == count
        for entries, hits in zip(result, local, strict=True):
            for (document, score), hit in zip(map(pick, entries), hits, strict=True):
                assert document["id"] == hit.passage.id
                assert document["contents"] == f'"{hit.passage.title}"\n{hit.passage.text}'
                assert score is None or score == pytest.approx(hit.score)


def test_other_spellings_are_understood(url: str) -> None:
    wanted = post(url, {"queries": ["Warsaw"], "topk": 1}).json()
    for body in ({"query": "Warsaw", "k": 1}, {"query": ["Warsaw"], "top_k": 1}):
        assert post(url, body).json() == wanted
    assert len(post(url, {"queries": ["Poland Curie Vistula"]}).json()["result"][0]) == 3


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"queries": ["a"] * 9}, 413, "at most 8"),
        ({"queries": ["a"], "topk": 0}, 422, "between 1 and 5"),
        ({"queries": ["a"], "topk": 6}, 422, "between 1 and 5"),
        ({"queries": ["a" * 100_001]}, 413, "at most 100000"),
        ({"queries": "a", "nonsense": 1}, 422, "nonsense"),
        ({"topk": 3}, 422, "queries"),
        ({"queries": [1, None]}, 422, "string"),
        ({"queries": ["x" * 90_000] * 200}, 413, "body is over"),
    ],
)
def test_what_is_too_much_or_wrong_is_refused(url: str, body: Any, status: int, message: str) -> None:
    answer = post(url, body)
    assert answer.status_code == status
    assert message in answer.text
    assert post(url, {"queries": ["Warsaw"], "topk": 1}).status_code == 200


def test_a_body_without_a_length_is_bounded_too(url: str) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"queries": ["'
        for _ in range(40):
            yield b"x" * 1_000_000

    assert httpx.post(f"{url}/retrieve", content=endless(), timeout=60).status_code == 413
    assert httpx.post(f"{url}/retrieve", content=b"{no json").status_code == 422


def test_odd_queries_have_defined_results(url: str) -> None:
    answer = post(url, {"queries": ["", "\x00\x07", "the", "‮Warsaw"], "topk": 1, "return_scores": True})
    assert [len(hits) for hits in answer.json()["result"]] == [0, 0, 0, 1]


def test_statistics_and_metrics_count(url: str) -> None:
    before = httpx.get(f"{url}/stats").json()
    post(url, {"queries": ["Warsaw", "Curie"], "topk": 1})
    after = httpx.get(f"{url}/stats").json()
    assert after["queries"] == before["queries"] + 2
    assert after["latency_s"]["p50"] > 0
    assert "retrieval_queries_total" in httpx.get(f"{url}/metrics").text


def test_every_request_is_counted_with_its_status(folder: Path) -> None:
    with serving(folder, "--token", "secret", "--max-queries", "2") as (address, _):
        allowed = {"Authorization": "Bearer secret"}

        def counts() -> dict[int, int]:
            lines = httpx.get(f"{address}/metrics", headers=allowed).text.splitlines()
            found = (re.fullmatch(r'retrieval_requests_total\{status="(\d+)"\} (.+)', line) for line in lines)
            return {int(line[1]): int(float(line[2])) for line in found if line}

        assert counts() == {}
        post(address, {"queries": ["Warsaw"]})  # without the token
        for queries in (["Warsaw"], ["Warsaw", "Curie"], ["a"] * 3, [1], ["x" * 90_000] * 200):
            post(address, {"queries": queries}, headers=allowed)
        post(address, {"queries": ["a"], "topk": 0}, headers=allowed)
        httpx.post(f"{address}/retrieve", content=b"{no json", headers=allowed)
        assert counts() == {200: 2, 401: 1, 413: 2, 422: 3}
        assert httpx.get(f"{address}/retrieve").status_code == 405
        assert httpx.get(f"{address}/health").status_code == 200
        assert counts() == {200: 2, 401: 1, 405: 1, 413: 2, 422: 3}


def test_failed_searches_and_errors_are_counted_too() -> None:
    class Wrong(ListIndex):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            raise RuntimeError("a bug")

    async def statuses(index: Index) -> tuple[int, str]:
        app = create_app(index)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as own:
            answer = await own.post("/retrieve", json={"queries": ["a"]})
            return answer.status_code, (await own.get("/metrics")).text

    for index, status in ((BrokenIndex(), 503), (Wrong(), 500)):
        seen, metrics = asyncio.run(statuses(index))
        assert seen == status
        assert f'retrieval_requests_total{{status="{status}"}} 1.0' in metrics


def test_the_client_is_an_index_like_the_one_behind_the_server(url: str, folder: Path) -> None:
    local = Bm25Index.open(folder)
    queries = ["radium", "", "capital of Poland", "x\ud800y", "river Vistula"] * 4
    with HttpIndex(url, batch=8) as client:
        assert isinstance(client, Index)
        assert client.search([], 3) == []
        for own, other in zip(client.search(queries, 3), local.search(queries, 3), strict=True):
            assert [hit.passage for hit in own] == [hit.passage for hit in other]
            assert [hit.score for hit in own] == pytest.approx([hit.score for hit in other])
        with pytest.raises(ValueError, match="k=0"):
            client.search(["a"], 0)

    async def both() -> list[list[list[Hit]]]:
        client = HttpIndex(url, batch=8)
        found = await asyncio.gather(client.asearch(queries, 2), client.asearch(queries[:3], 1))
        await client.aclose()
        return list(found)

    two, one = asyncio.run(both())
    assert [len(hits) for hits in two] == [len(hits) for hits in local.search(queries, 2)]
    assert [hits[0].passage.id for hits in one if hits] == ["p1", "p2"]


def test_a_token_is_asked_for(folder: Path) -> None:
    with serving(folder, "--token", "secret") as (address, _):
        assert post(address, {"queries": ["Warsaw"]}).status_code == 401
        assert httpx.get(f"{address}/stats").status_code == 401
        with HttpIndex(address, token="wrong", pause=0.01) as client, pytest.raises(SearchRefused, match="401"):
            client.search(["Warsaw"], 1)
        with HttpIndex(address, token="secret") as client:
            assert client.search(["Warsaw"], 1)[0][0].passage.id == "p2"


def test_the_client_fails_over_and_comes_back(folder: Path) -> None:
    dead, port = f"http://127.0.0.1:{free_port()}", free_port()
    with HttpIndex([dead, f"http://127.0.0.1:{port}"], pause=0.01) as client:
        with serving(folder, port=port):
            assert client.search(["Warsaw"], 1)[0][0].passage.id == "p2"
        with pytest.raises(SearchUnavailable, match="cannot be reached"):
            client.search(["Warsaw"], 1)
        with serving(folder, port=port):
            assert client.search(["Warsaw"], 1)[0][0].passage.id == "p2"


def test_a_server_that_never_answers_is_a_time_out() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = HttpIndex(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2, attempts=2, pause=0.01)
        with client, pytest.raises(SearchTimeout, match="in time"):
            client.search(["a"], 1)


def test_what_is_accepted_is_answered_before_the_server_stops(folder: Path) -> None:
    def ask(address: str) -> tuple[int, float]:
        try:
            answer = post(address, {"queries": ["Warsaw Curie"] * 500, "topk": 3}, timeout=60)
            return answer.status_code, time.monotonic()
        except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):
            return 0, 0.0  # came when the door was shut

    with serving(folder) as (address, process), ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, address) for _ in range(64)]
        while not any(own.done() for own in asked):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        answered = [own.result() for own in asked]
    assert {status for status, _ in answered} <= {200, 0}
    assert any(status == 200 and when > stopped for status, when in answered)


class SlowIndex(ListIndex):
    """Waits in every search, and notes how many queries each had."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []
        self.lock = threading.Lock()

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        assert self.lock.acquire(blocking=False), "two searches at the same time"
        self.sizes.append((len(queries), k))
        time.sleep(0.02)
        self.lock.release()
        return super().search(queries, k)


def merged(index: Index, asked: list[tuple[list[str], int]], merge: bool = True) -> list[Any]:
    async def run() -> list[Any]:
        merger = Merger(index, merge)
        worker = asyncio.create_task(merger.run())
        found = await asyncio.gather(*(merger.search(*own) for own in asked), return_exceptions=True)
        worker.cancel()
        return list(found)

    return asyncio.run(run())


def test_requests_are_merged_by_k_and_get_their_own_hits() -> None:
    index = SlowIndex()
    words = ["Warsaw", "Curie", "Vistula", "zzz"]
    asked = [([words[i % 4], words[(i + 1) % 4]][: 1 + i % 2], 1 + i % 3) for i in range(30)]
    assert merged(index, asked) == [ListIndex().search(queries, k) for queries, k in asked]
    assert sum(size for size, _ in index.sizes) == sum(len(queries) for queries, _ in asked)
    assert len(index.sizes) <= 6
    alone = SlowIndex()
    merged(alone, asked, merge=False)
    assert len(alone.sizes) == 30


def test_a_failed_search_reaches_those_who_asked_and_nobody_else() -> None:
    failed = merged(BrokenIndex(), [(["a"], 1), (["b"], 2)])
    assert all(isinstance(error, SearchFailed) for error in failed)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`agentgym-ig index` with arguments."""
    command = [sys.executable, "-m", "agentgym_ig", "index", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


def test_the_command_line_checks_and_measures_an_index(folder: Path, tmp_path: Path) -> None:
    assert json.loads(run("info", "--index", str(folder)).stdout)["passages"] == 3
    assert run("verify", "--index", str(folder)).returncode == 0
    rows = [
        {"id": "1", "question": "capital of Poland", "answers": ["Warsaw"], "supporting": ["p2"]},
        {"id": "2", "question": "radium Vistula", "answers": ["polonium"], "supporting": ["p1", "p3", "p9"]},
        {"id": "3", "question": "no gold", "answers": ["x"]},
    ]
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run("eval", "--index", str(folder), "--questions", str(tmp_path / "toy.jsonl"), "--k", "1,3", "--json")
    figures = json.loads(done.stdout)
    assert figures["questions"] == 2
    assert figures["recall"] == pytest.approx({"1": (1 + 1 / 3) / 2, "3": (1 + 2 / 3) / 2})
    assert figures["all_gold"] == {"1": 0.5, "3": 0.5}
    assert figures["answer"]["3"] == 1.0
    assert run("eval", "--index", str(folder), "--questions", str(tmp_path / "toy.jsonl"), "--k", "x").returncode == 1
