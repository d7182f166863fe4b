"""What the benchmarks share: fresh processes, best times, and where the figures were measured."""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any


def where() -> dict[str, Any]:
    """Date, machine, and the commit that is checked out."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"date": date.today().isoformat(), "machine": machine, "commit": commit()}


def commit() -> str:
    """The commit that is checked out, with a plus where files differ from it; empty outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def fresh(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Run a module's function in a process of its own; its result, and the process's peak memory in MB."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_with_peak, function, *arguments).result()


def _with_peak(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    result = function(*arguments)
    # Not getrusage: its figure begins with what the process that started this one had.
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return result, round(int(status["VmHWM"].split()[0]) * 1024 / 1e6, 1)


def pin(threads: int) -> None:
    """Keep this process, and those that it starts, on so many cores, whatever its libraries think that they have."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the seconds it took."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def side_by_side(functions: dict[str, Callable[[], Any]], rounds: int = 5, *, warm: bool = False) -> dict[str, float]:
    """The best time in seconds of each function, run in turns so that a busy moment hits all of them alike.

    warm: they have been called before; else each is called once more, first.
    """
    best = dict.fromkeys(functions, float("inf"))
    for function in () if warm else functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            best[name] = min(best[name], timed(function)[1])
    return best
