"""64 clients over HTTP beside the index in process, and merged requests beside one search a request."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp

from agentgym_ig.indexes import open_index
from benchmarks.corpora import queries
from benchmarks.measure import fresh
from benchmarks.retrieval_speed import bm25s_index, faiss_index, minilm_index

CLIENTS = 64
SECONDS = 10.0
K = 3


def server(scratch: Path) -> dict[str, Any]:
    """Queries per second; all on one machine, so clients and server share its cores."""
    figures: dict[str, Any] = {"clients": CLIENTS, "k": K}
    for name, folder in (("bm25s 1,000,000", bm25s_index(scratch, 1_000_000)), ("bm25s 60,000", bm25s_index(scratch))):
        in_process = fresh(_in_process, folder)[0]
        row = {"in process, batches of 64": round(in_process, 1)}
        for each in (1, 16):
            rate = _over_http(folder, each, merge=True)
            row[f"over http, {each} queries a request"] = round(rate, 1)
            row[f"ratio, {each} queries a request"] = round(rate / in_process, 3)
        figures[name] = row
    for name, folder in (("torch", minilm_index(scratch)), ("faiss Flat", faiss_index(scratch, "Flat"))):
        merged, alone = (_over_http(folder, 1, merge=merge) for merge in (True, False))
        row = {"merged": round(merged, 1), "one search a request": round(alone, 1), "ratio": round(merged / alone, 2)}
        figures[f"minilm {name} 60,000"] = row
    return figures


def _in_process(folder: Path) -> float:
    index, asked = open_index(folder, threads=os.cpu_count() or 1), queries(4096)
    index.search(asked[:64], K)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        index.search([asked[(done + i) % len(asked)] for i in range(64)], K)
        done += 64
    return done / (time.perf_counter() - started)


def _over_http(folder: Path, each: int, *, merge: bool) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(folder, port, merge))
    process.start()
    try:
        return float(fresh(_clients, port, each)[0])
    finally:
        process.terminate()
        process.join()


def _serve(folder: Path, port: int, merge: bool) -> None:
    import uvicorn

    from agentgym_ig.indexes.server import create_app, leave_cores_to_others

    leave_cores_to_others()
    index = open_index(folder, threads=os.cpu_count() or 1)
    index.search(["warm", "up"], K)
    uvicorn.run(create_app(index, merge=merge), port=port, log_level="error")


def _clients(port: int, each: int) -> float:
    return asyncio.run(_ask_all(f"http://127.0.0.1:{port}", each))


async def _ask_all(url: str, each: int) -> float:
    """With aiohttp, whose parser is compiled: httpx itself would be the limit, long before the server is."""
    asked = queries(4096)
    connector = aiohttp.TCPConnector(limit=CLIENTS)
    async with aiohttp.ClientSession(url, connector=connector) as client:
        await _wait_until_up(client)
        done = 0
        end = time.perf_counter() + SECONDS

        async def one(number: int) -> None:
            nonlocal done
            first = number * 61
            while time.perf_counter() < end:
                some = [asked[(first + i) % len(asked)] for i in range(each)]
                async with client.post("/retrieve", json={"queries": some, "topk": K}) as answer:
                    answer.raise_for_status()
                    await answer.read()
                first += each
                done += each

        await asyncio.gather(*(one(number) for number in range(CLIENTS)))
        return done / (SECONDS + time.perf_counter() - end)


async def _wait_until_up(client: aiohttp.ClientSession) -> None:
    for _ in range(600):
        try:
            async with client.get("/health") as answer:
                answer.raise_for_status()
        except aiohttp.ClientError:
            await asyncio.sleep(0.2)
        else:
            return
    raise TimeoutError("the server did not start within two minutes")
