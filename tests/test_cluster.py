"""The retrieval server on a Ray cluster of two hosts, one of which dies.

The hosts are namespaces, for Ray opens ports on all addresses. This file is also the program that runs on them.
"""

import importlib.util
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

from agentgym_ig.errors import SearchFailed
from agentgym_ig.indexes import Bm25Index
from agentgym_ig.indexes.cluster import Cluster, cluster_app, merge_hits, serving
from agentgym_ig.indexes.http import HttpIndex
from agentgym_ig.indexes.splitting import split_index
from agentgym_ig.types import Passage
from tests.fakes import ListIndex
from tests.namespaces import Host, two_hosts, why_not

URL = "http://127.0.0.1:8000"
WORDS = [f"w{number}" for number in range(300)]
THREADS = 4
"""How many ask at the same time."""
SETTLED = 12.0
"""Seconds after which all must be well again."""
TIMEOUT = 5.0
"""What the server allows one search."""
HERE = "tests.test_cluster"
NO_RAY = None if importlib.util.find_spec("ray") else "needs ray: pip install 'agentgym_ig[ray]'"
UNFIT = NO_RAY or why_not()


def draw(seed: int, count: int, most: int) -> list[str]:
    """Texts of few different words, so that many scores are equal."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, most))) for _ in range(count)]


QUERIES = [*draw(1, 100, 5), "", "nothing-of-the-kind"]


def test_merging_parts_gives_what_the_whole_gives() -> None:
    whole = ListIndex([Passage(f"p{i:03d}", "", text) for i, text in enumerate(draw(2, 90, 30))])
    parts = [ListIndex(whole.passages[start::3]) for start in range(3)]
    for k in (1, 2, 10, 1000):
        merged = [merge_hits(hits, k) for hits in zip(*(part.search(QUERIES, k) for part in parts), strict=True)]
        assert merged == whole.search(QUERIES, k)


# pydantic calls the way in which Ray declares its settings outdated
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning")
def test_what_makes_no_service_is_refused() -> None:
    with pytest.raises(ValueError, match="replicas=0"):
        Cluster(replicas=0)
    if NO_RAY:
        pytest.skip(NO_RAY)
    for folders in ([], [Path("a"), Path("b"), Path("a")]):
        with pytest.raises(ValueError, match="at least one, and none twice"):
            cluster_app(folders)


def serve(folder: Path, replicas: str = "2") -> None:
    with serving([folder / "part-0", folder / "part-1"], Cluster(replicas=int(replicas), timeout=TIMEOUT)):
        print("ready", flush=True)
        threading.Event().wait()


def compare(folder: Path) -> None:
    """Ask the server what the whole index knows, in requests of all sizes."""
    whole = Bm25Index.open(folder / "whole")
    with HttpIndex(URL, attempts=1) as client:
        for k in (1, 2, 3, 10, 100, 1000):
            assert client.search(QUERIES, k) == whole.search(QUERIES, k)
        for query in QUERIES[:10]:
            assert client.search([query], 3) == whole.search([query], 3)
    bare = httpx.post(f"{URL}/retrieve", json={"queries": QUERIES[:2], "topk": 2}).json()["result"]
    assert [[row["id"] for row in rows] for rows in bare] == [
        [hit.passage.id for hit in hits] for hits in whole.search(QUERIES[:2], 2)
    ]
    for body, status in (({"queries": ["a"] * 2000}, 413), ({"queries": ["a"], "topk": 0}, 422), ({"q": 1}, 422)):
        assert httpx.post(f"{URL}/retrieve", json=body).status_code == status
    assert httpx.post(f"{URL}/retrieve", content=b"x" * 17_000_000, timeout=30).status_code == 413
    assert httpx.get(f"{URL}/stats").json()["queries"] >= 6 * len(QUERIES)
    assert 'retrieval_requests_total{status="413"}' in httpx.get(f"{URL}/metrics").text


def load(folder: Path, seconds: str) -> None:
    """Ask for some time from several threads; print when each request began and ended, and how."""
    whole = Bm25Index.open(folder / "whole")
    right = {k: whole.search(QUERIES, k) for k in (1, 3, 10)}
    end = time.monotonic() + float(seconds)

    def ask(seed: int) -> list[tuple[float, float, str]]:
        chance, noted = random.Random(seed), []
        with HttpIndex(URL, attempts=1) as client:
            while time.monotonic() < end:
                first, k = chance.randrange(len(QUERIES) - 8), chance.choice(list(right))
                began = time.monotonic()
                try:
                    found = client.search(QUERIES[first : first + 8], k)
                    how = "right" if found == right[k][first : first + 8] else "wrong"
                except SearchFailed as error:
                    how = f"{type(error).__name__}: {str(error)[:150]}"
                noted.append((began, time.monotonic(), how))
                time.sleep(0.01)
        return noted

    print("asking", flush=True)
    with ThreadPoolExecutor(THREADS) as pool:
        print(json.dumps(sorted(row for rows in pool.map(ask, range(THREADS)) for row in rows)))


@contextmanager
def program(host: Host, said: str, *words: object) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A function of this file as a process on a host that has said a line, and the file with all that it says."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        with host.running(output, sys.executable, "-m", HERE, *map(str, words)) as process:
            deadline = time.monotonic() + 90
            while said not in output.read_text().splitlines():
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < deadline, output.read_text()
                time.sleep(0.1)
            yield process, output


def ray_start(host: Host, *more: str) -> None:
    quiet = "--disable-usage-stats --num-cpus=4 --object-store-memory=100000000".split()
    host.run(str(Path(sys.executable).parent / "ray"), "start", f"--node-ip-address={host.address}", *quiet, *more)


def results(process: subprocess.Popen[bytes], output: Path) -> list[Any]:
    """What `load` prints at its end."""
    assert process.wait(timeout=90) == 0, output.read_text()
    rows: list[Any] = json.loads(output.read_text().splitlines()[-1])
    return rows


def report(what: str, rows: list[tuple[float, float, str]]) -> Counter[str]:
    """Print and count how requests ended."""
    counts = Counter(how for _, _, how in rows)
    slowest = max((ended - began for began, ended, _ in rows), default=0.0)
    print(f"{what}: {len(rows)} requests, slowest {slowest:.2f} s, {dict(counts)}")
    return counts


@pytest.mark.slow
@pytest.mark.skipif(bool(UNFIT), reason=str(UNFIT))
def test_two_hosts_serve_what_one_index_holds_and_one_may_die(tmp_path: Path) -> None:
    passages = [Passage(f"p{i:04d}", f"Title {i % 7}", text) for i, text in enumerate(draw(3, 2000, 40))]
    Bm25Index.build(passages, tmp_path / "whole")
    split_index(tmp_path / "whole", 2, tmp_path)
    with two_hosts() as (one, two):
        refuses(two, "no Ray cluster on this host; start one", tmp_path)
        ray_start(one, "--head", "--port=6379", "--include-dashboard=false")
        ray_start(two, f"--address={one.address}:6379")
        refuses(one, "need 9 cores, and the cluster has 8", tmp_path, 3)
        with program(one, "ready", "serve", tmp_path) as (server, _):
            for host in (one, two):  # each can answer alone
                assert [len(replicas(host, what)) for what in ("shard-0", "shard-1", "front")] == [1, 1, 1]
                host.run(sys.executable, "-m", HERE, "compare", str(tmp_path))
            a_host_dies_under_load(one, two, tmp_path)
            a_shard_dies_altogether(one, tmp_path)
            the_server_is_stopped_under_load(one, server, tmp_path)


def refuses(host: Host, message: str, *words: object) -> None:
    """To serve fails with a message."""
    with pytest.raises(AssertionError, match=message):
        host.run(sys.executable, "-m", HERE, "serve", *map(str, words))


def replicas(host: Host, name: str) -> list[str]:
    """Process ids of a deployment's replicas on a host."""
    found = subprocess.run(host.command("pgrep", "-f", f"^ray::ServeReplica:agentgym_ig:{name}"), capture_output=True)
    return found.stdout.decode().split()


def a_host_dies_under_load(one: Host, two: Host, folder: Path) -> None:
    with program(one, "asking", "load", folder, 3 + SETTLED + 4) as asking:
        time.sleep(3)
        killed = time.monotonic()
        two.kill()
        rows = results(*asking)
    before = report("before the kill", [row for row in rows if row[1] < killed])
    during = report("after it", [row for row in rows if row[1] >= killed and row[0] < killed + SETTLED])
    after = report("settled", [row for row in rows if row[0] >= killed + SETTLED])
    assert "wrong" not in during
    assert set(before) == set(after) == {"right"}
    assert min(before["right"], during["right"], after["right"]) > 50


def a_shard_dies_altogether(host: Host, folder: Path) -> None:
    """Its folder is moved away, so that no replica of it can start until the folder is back."""
    with program(host, "asking", "load", folder, 26) as asking:
        time.sleep(1)
        (folder / "part-1").rename(folder / "away")
        (replica,) = replicas(host, "shard-1")
        killed = time.monotonic()
        host.run("kill", "-KILL", replica)
        time.sleep(10)
        (folder / "away").rename(folder / "part-1")
        back = time.monotonic()
        rows = results(*asking)
    during = report("without a shard", [row for row in rows if killed + 1 < row[0] and row[1] < back])
    after = report("with its folder back", [row for row in rows if row[0] >= back])
    assert during
    assert all("answered 503" in how and "shard-1" in how for how in during)
    assert "wrong" not in after
    assert rows[-1][2] == "right"
    assert max(ended - began for began, ended, _ in rows) < 4 * TIMEOUT


def the_server_is_stopped_under_load(host: Host, server: subprocess.Popen[bytes], folder: Path) -> None:
    with program(host, "asking", "load", folder, 15) as asking:
        time.sleep(2)
        host.run("kill", "-TERM", host.run("pgrep", "-f", f"{HERE} serve").split()[0])
        rows = results(*asking)
    report("stopped", rows)
    first_refused = next(how for _, _, how in rows if how != "right")
    assert "answered 404" in first_refused  # what had been accepted was answered
    server.wait(timeout=60)  # a busy machine takes its time to stop
    with program(host, "asking", "load", folder, 1) as asking:
        gone = report("gone", results(*asking))
    assert gone
    assert all("Connection refused" in how for how in gone)


if __name__ == "__main__":
    PROGRAMS: dict[str, Callable[..., None]] = {"serve": serve, "compare": compare, "load": load}
    PROGRAMS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
