"""How indexes grow from 100,000 to 1,000,000 passages, and a build that is killed again and again."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from agentgym_ig.indexes import BuildOptions, build_index, open_index, read_corpus
from agentgym_ig.indexes.build import Kind
from agentgym_ig.provenance import file_sha256
from benchmarks.corpora import queries, spliced
from benchmarks.measure import fresh, timed

MEMORY = 1 << 30
"""The stated limit for every build here."""
WIKI_18 = 21_015_324
SIZES = (100_000, 1_000_000)


def kinds() -> dict[str, Kind]:
    """The two kinds that hold words."""
    from agentgym_ig.indexes import Bm25Settings
    from agentgym_ig.indexes.lucene import Lucene

    return {"bm25s": Bm25Settings(), "lucene": Lucene()}


def growth(scratch: Path) -> dict[str, Any]:
    """Per kind and size: building, disk, memory, opening, searching; and what follows for all of wiki-18 on paper."""
    asked = queries(1000)
    figures: dict[str, Any] = {"max_memory_mb": MEMORY / 1e6, "k": 10}
    for name in kinds():
        rows: dict[str, Any] = {}
        for size in SIZES:
            corpus = spliced(size, scratch)
            folder = scratch / f"{name}-{size}"
            shutil.rmtree(folder, ignore_errors=True)
            seconds, peak = fresh(_build, name, corpus, folder)
            disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            opened, searched_peak = fresh(_search, folder, asked)
            rows[str(size)] = {"build_s": round(seconds, 1), "build_peak_mb": peak, "disk_mb": round(disk / 1e6, 1)}
            rows[str(size)] |= opened | {"search_peak_mb": searched_peak}
        figures[name] = rows | {f"{WIKI_18} (on paper)": _on_paper(rows)}
    return figures


def _build(name: str, corpus: Path, folder: Path) -> float:
    return timed(lambda: build_index(read_corpus(corpus), folder, kinds()[name], BuildOptions(memory=MEMORY)))[1]


def _search(folder: Path, asked: list[str]) -> dict[str, float]:
    import agentgym_ig.indexes.bm25  # noqa: F401 - importing is not opening

    process = psutil.Process()
    index, opened = timed(lambda: open_index(folder))
    resident = process.memory_info().rss / 1e6
    index.search(asked[:200], 10)
    before = process.cpu_times()
    seconds = timed(lambda: index.search(asked, 10))[1]
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    return {
        "open_s": round(opened, 3),
        "open_mb": round(resident, 1),
        "queries_per_s": round(len(asked) / seconds, 1),
        "cpu_ms_per_query": round(1000 * used / len(asked), 3),
    }


def _on_paper(rows: dict[str, Any]) -> dict[str, float]:
    """Growth by the same power of N as from the smaller to the larger size, for what grows."""
    small, large = (rows[str(size)] for size in SIZES)
    paper: dict[str, float] = {}
    for figure in ("build_s", "disk_mb", "cpu_ms_per_query"):
        power = math.log(large[figure] / small[figure]) / math.log(SIZES[1] / SIZES[0])
        paper[figure] = round(large[figure] * (WIKI_18 / SIZES[1]) ** power, 2)
        paper[f"{figure} power"] = round(power, 2)
    return paper


def kills(scratch: Path, times: int = 10) -> dict[str, Any]:
    """SIGKILL a build of a million passages at random moments, resume it, and compare every file."""
    corpus, whole, killed = spliced(1_000_000, scratch), scratch / "never-killed", scratch / "killed"
    for folder in (whole, killed, scratch / "killed.partial"):
        shutil.rmtree(folder, ignore_errors=True)
    seconds = timed(lambda: _run(corpus, whole).wait())[1]
    rng, moments = random.Random(0), []
    for _ in range(times):
        build = _run(corpus, killed)
        # A resumed build is quicker: it does not do again what is done. Most kills should still hit it at work.
        moments.append(round(rng.uniform(1, seconds / 4), 1))
        time.sleep(moments[-1])
        if build.poll() is not None:
            break
        build.kill()
        build.wait()
    _run(corpus, killed).wait()
    hashes = [
        {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}
        for folder in (whole, killed)
    ]
    return {
        "uninterrupted_s": round(seconds, 1),
        "killed_after_s": moments,
        "files": len(hashes[0]),
        "files_that_differ": sum(hashes[0].get(name) != hashes[1].get(name) for name in hashes[0] | hashes[1]),
    }


def _run(corpus: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "agentgym_ig.commands.main", "index", "build", "--kind", "bm25s"]
    command += ["--corpus", str(corpus), "--out", str(out), "--max-memory", "1GB"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)
