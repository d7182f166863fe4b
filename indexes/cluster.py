"""The retrieval server on several hosts: the application of `server`, deployed by Ray Serve.

Each *shard* is an index folder with a part of the passages, found under the same path on every host; `splitting` cuts
an index into parts that score as the whole does. A shard is held by `replicas` processes. As many *fronts* answer
HTTP: they merge requests as `server` does and send each merged batch to every shard in one call. A search is whole
or it fails: no shard is ever left out of a result. `/stats` and `/metrics` are those of the front that answers.

Ray's processes talk to one another in pickle, over ports that it opens on all addresses: keep them in a network of
their own. What clients send reaches us as JSON, and nothing of ours loads a pickle. This module joins a cluster and
never starts one:

    ray start --head --disable-usage-stats --include-dashboard=false --node-ip-address=ADDRESS    # first host
    ray start --address=ADDRESS:6379                                                              # other hosts
"""

from __future__ import annotations

import heapq
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI

from agentgym_ig.errors import AgentGymError, SearchFailed, SearchTimeout, SearchUnavailable
from agentgym_ig.indexes.base import check_k
from agentgym_ig.indexes.opening import open_index
from agentgym_ig.indexes.server import Limits, create_app
from agentgym_ig.indexes.splitting import check_parts
from agentgym_ig.types import Hit

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle, DeploymentResponse

NAME = "agentgym_ig"
"""What Ray calls the application."""
PAUSE = 0.1
"""Seconds before a search that hit a dying replica is sent again."""
LOGS = "/tmp/ray/session_latest/logs/serve"
"""Where each host keeps what Ray and the replicas say."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}
WAITING = 1024
"""Requests that a front works on at a time; Ray's own 5 would leave little to merge. More wait in Ray's proxy."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How a service is laid out over the hosts."""

    replicas: int = 1
    """Processes per shard, and fronts. They are spread evenly over the hosts."""
    per_host: int | None = None
    """The most of one shard's replicas on one host; None leaves it to Ray, which spreads where it can."""
    cpus: int = 1
    """Cores, and so threads, per replica of a shard."""
    timeout: float = 20.0
    """Seconds for one search, retries included; then it fails."""
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.cpus < 1 or self.timeout <= 0:
            raise ValueError(f"replicas={self.replicas}, cpus={self.cpus}, timeout={self.timeout} must be positive")


class Shard:
    """A replica of one shard: an open index."""

    def __init__(self, folder: str) -> None:
        self.index = open_index(Path(folder))
        self._one = threading.Lock()  # Ray calls from several threads; an index searches for one at a time
        self.search(["warm up"], 1)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """As `Index.search`."""
        with self._one:
            return self.index.search(queries, k)


class ShardedIndex:
    """Asks all shards at once and merges what they find, by score and then by passage id.

    Whatever hits a replica that dies goes to another one. A shard that does not answer within `timeout` seconds
    makes the search fail, with SearchTimeout or SearchUnavailable; as long as it has no replica that runs, the next
    searches fail at once.
    """

    def __init__(self, shards: Sequence[DeploymentHandle[Shard]], timeout: float) -> None:
        self.shards, self.timeout = list(shards), timeout
        self._late = False  # whether the last search ran out of time

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Index.search`. Not from within an event loop."""
        check_k(k)
        queries = list(queries)
        if not queries:
            return []
        if self._late:
            self._check_replicas()
        deadline = time.monotonic() + self.timeout
        asks = [_Ask(shard, queries, k) for shard in self.shards]
        self._late = True
        parts = [ask.answer(deadline) for ask in asks]
        self._late = False
        return [merge_hits(hits, k) for hits in zip(*parts, strict=True)]

    def _check_replicas(self) -> None:
        """Raise SearchUnavailable for a shard without any: Ray itself would let a search wait for one."""
        from ray import serve

        known = serve.status().applications[self.shards[0].app_name].deployments
        for name in (shard.deployment_name for shard in self.shards):
            if "RUNNING" not in known[name].replica_states:
                raise SearchUnavailable(f"{name} has no replica that runs; its logs: {LOGS}")


def merge_hits(parts: Iterable[list[Hit]], k: int) -> list[Hit]:
    """The best `k` of several results for one query, each of them best first."""
    return list(islice(heapq.merge(*parts, key=lambda hit: (-hit.score, hit.passage.id)), k))


class _Ask:
    """One search on its way to one shard."""

    def __init__(self, shard: DeploymentHandle[Shard], queries: list[str], k: int) -> None:
        self.shard, self.queries, self.k = shard, queries, k
        self.response = self._send()

    def _send(self) -> DeploymentResponse[Any]:
        return cast("DeploymentResponse[Any]", self.shard.search.remote(self.queries, self.k))

    def answer(self, deadline: float) -> list[list[Hit]]:
        """The shard's hits, asked for again as long as its replicas die."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        name = self.shard.deployment_name
        while True:
            left = deadline - time.monotonic()
            try:
                found: list[list[Hit]] = self.response.result(timeout_s=max(left, 0.0))
                return found
            except TimeoutError as error:
                self.response.cancel()
                raise SearchTimeout(f"{name} did not answer in time; its logs: {LOGS}") from error
            except RayTaskError as error:  # the search itself went wrong: another replica would fare no better
                if isinstance(error.cause, SearchFailed):
                    raise SearchFailed(f"{name}: {error.cause}") from error
                raise
            except (RayError, RayServeException) as error:  # the replica, its host or the way there is gone
                if left < PAUSE:
                    raise SearchUnavailable(
                        f"{name} cannot be reached ({type(error).__name__}); its logs: {LOGS}"
                    ) from error
                time.sleep(PAUSE)
                self.response = self._send()


class Front:
    """A replica of the HTTP service."""

    def __init__(self, shards: Sequence[DeploymentHandle[Shard]], cluster: Cluster) -> None:
        self.index, self.cluster = ShardedIndex(shards, cluster.timeout), cluster

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray in the replica, after the constructor."""
        return create_app(self.index, limits=self.cluster.limits, token=self.cluster.token)


def cluster_app(shards: Sequence[Path], cluster: Cluster | None = None) -> Application:
    """The service as a Ray Serve application, for `serve.run`.

    Raises ValueError for no shards or one given twice, IndexUnusable when a part of the index is missing.
    """
    from ray import serve

    cluster, folders = cluster or Cluster(), [str(Path(shard).absolute()) for shard in shards]
    if not folders or len(set(folders)) < len(folders):
        raise ValueError(f"shards={folders}: give at least one, and none twice")
    check_parts(shards)
    common: dict[str, Any] = {
        "num_replicas": cluster.replicas,
        "max_replicas_per_node": cluster.per_host,
        "max_constructor_retry_count": 3,
        "health_check_period_s": 2,  # Ray takes 10 to see that a replica is gone
        "logging_config": QUIET,
    }
    held = serve.deployment(**common, ray_actor_options={"num_cpus": cluster.cpus})(Shard)
    bound = [held.options(name=f"shard-{i}").bind(folder) for i, folder in enumerate(folders)]
    front = serve.deployment(**common, name="front", max_ongoing_requests=WAITING)(serve.ingress()(Front))
    return front.bind(bound, cluster)


@contextmanager
def serving(
    shards: Sequence[Path], cluster: Cluster | None = None, *, host: str = "127.0.0.1", port: int = 8000
) -> Iterator[None]:
    """Serve shards on the Ray cluster that this host belongs to, for as long as the block lasts.

    Every host answers on its own loopback, or on all its addresses for `0.0.0.0`; with any other address of the first
    host, that host alone does. Only for the main thread; there SIGTERM ends the block as Ctrl-C does, with
    KeyboardInterrupt. Raises AgentGymError when there is no cluster, when it serves already, and when it cannot
    hold or open the shards.
    """
    address, cluster = ip_address(host), cluster or Cluster()
    with ExitStack() as stack:
        stack.enter_context(_joined())
        from ray import serve

        if serve.status().proxies:
            raise AgentGymError("Ray Serve runs on this cluster already; stop the program that started it first")
        app = cluster_app(shards, _spread(cluster, len(shards)))
        everywhere = address.is_loopback or address.is_unspecified
        stack.callback(serve.shutdown)
        doors = {"host": host, "port": port}
        serve.start("EveryNode" if everywhere else "HeadOnly", doors, logging_config=QUIET)
        try:
            serve.run(app, name=NAME)
        except RuntimeError as error:
            raise AgentGymError(
                f"the shards could not be opened: {_reasons(error)}; each host's logs: {LOGS}"
            ) from error
        # the shutdown drops connections at once; this, before it, answers what was accepted, and 404 to the rest
        stack.callback(serve.delete, NAME)
        yield


@contextmanager
def _joined() -> Iterator[None]:
    """Be part of the cluster that runs on this host, without starting one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray tells its makers of every use unless told not to
    import ray

    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address="auto")
    except ConnectionError as error:
        raise AgentGymError(
            "no Ray cluster on this host; start one: ray start --head --disable-usage-stats --node-ip-address=ADDRESS"
        ) from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own ends the process on the spot
    try:
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _reasons(error: RuntimeError) -> str:
    """Why an application did not start: the last line of what its deployments say, the error itself."""
    from ray import serve

    app = serve.status().applications.get(NAME)
    said = (
        [f"{name}: {own.message.splitlines()[-1]}" for name, own in app.deployments.items() if own.message]
        if app
        else []
    )
    return "; ".join(said) or str(error)


def _spread(cluster: Cluster, shards: int) -> Cluster:
    """The same with replicas spread evenly over the hosts there are. Raises AgentGymError when they cannot fit."""
    import ray

    cores = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    wanted = cluster.replicas * (shards * cluster.cpus + 1)
    if wanted > sum(cores):
        raise AgentGymError(
            f"{cluster.replicas} replicas of {shards} shards and of the front need {wanted} cores, and the cluster has "
            f"{sum(cores):g}; ask for fewer replicas, or add hosts: ray start --address=ADDRESS:6379"
        )
    return cluster if cluster.per_host else replace(cluster, per_host=-(-cluster.replicas // len(cores)))
