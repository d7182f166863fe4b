"""An engine that dies in a step: a real server, killed while it writes, and started again."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agentgym_ig.envs import Start
from agentgym_ig.errors import EngineFailed, ServerFailed
from agentgym_ig.lm.encode import ConversationEncoder
from agentgym_ig.lm.tiny import tiny_tokenizer
from agentgym_ig.remote import OpenAIPolicy
from agentgym_ig.trainers import Run
from agentgym_ig.trainers.collect import Collected, collect
from agentgym_ig.trainers.engines import RESTARTS, play
from agentgym_ig.trainers.loop import prepare
from agentgym_ig.trainers.tinywiki import warm_start_folder
from agentgym_ig.types import Action, Conversation, Trajectory
from tests.openai_server import ROOT, client, plan, running
from tests.runs import fresh, paid_env
from tests.test_server import free_port
from tests.tiny import shipped_policy, tiny_env


class Server:
    """The tests' own server of the shipped policy, always at one address."""

    def __init__(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        folder = str(warm_start_folder())
        self.command = [sys.executable, "-m", "tests.openai_server", folder, "--port", str(port)]
        self.again: list[subprocess.Popen[bytes]] = []

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """By SIGKILL, and start another in its place."""
        process.kill()
        process.wait()
        self.again.append(subprocess.Popen(self.command, cwd=ROOT))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    server = Server()
    with running(server.command, server.url, tmp_path_factory.mktemp("server") / "log") as process:
        yield server, process
        for own in server.again:
            own.kill()
            own.wait()


@pytest.fixture
def engine(served: tuple[Server, subprocess.Popen[bytes]]) -> Iterator[OpenAIPolicy]:
    with client(served[0].url, attempts=1) as server:
        yield OpenAIPolicy(
            server,
            endpoint="completions",
            max_tokens=16,
            encoder=ConversationEncoder(tiny_tokenizer()),
            extra={"logprobs": 0, "return_token_ids": True},
        )


class Murdered:
    """Has its server killed while it writes the actions of the second turn."""

    def __init__(self, own: OpenAIPolicy, server: Server, process: subprocess.Popen[bytes]) -> None:
        self.own, self.server, self.process, self.calls, self.restarts = own, server, process, 0, 0

    def __call__(self, conversations: Sequence[Conversation], /) -> list[Action | None]:
        self.calls += 1
        if self.calls == 3:
            plan(self.server.url, {"delay": 60, "times": 1000})
            threading.Timer(0.5, self.server.kill, [self.process]).start()
        return self.own(conversations)

    def restart(self) -> None:
        self.restarts += 1
        self.own.restart()


def key(collected: Collected) -> list[object]:
    assert collected.batch is not None
    return [(own.group, own.seed, own.stop, [turn.action for turn in own.turns]) for own in collected.batch.episodes]


def test_a_server_killed_in_a_step_changes_nothing(
    served: tuple[Server, subprocess.Popen[bytes]], engine: OpenAIPolicy, tmp_path: Path
) -> None:
    run: Run = replace(fresh(tmp_path, "grpo", env=paid_env(5)), engine=engine)
    learner = prepare(run)[0]
    whole = collect(run, learner, 0)
    assert whole.figures["engine_restarts"] == 0
    assert whole.figures["engine_logprob_gap_max"] < 1e-4  # the server has the same weights
    murdered = Murdered(engine, *served)
    killed = collect(replace(run, engine=murdered), learner, 0)
    assert murdered.restarts == killed.figures["engine_restarts"] == 1
    assert key(killed) == key(whole)
    names = ("episodes_played", "episodes_failed", "episodes")
    assert [killed.figures[name] for name in names] == [whole.figures[name] for name in names] == [12, 0, 12]


class Dying:
    """Dies at some of its calls."""

    def __init__(self, *calls: int) -> None:
        self.deadly, self.calls, self.restarts, self.asked = calls, 0, 0, 0

    def __call__(self, conversations: Sequence[Conversation], /) -> list[Action | None]:
        self.calls += 1
        if self.calls in self.deadly:
            raise EngineFailed("gone")
        self.asked += len(conversations)
        return shipped_policy()(conversations)

    def restart(self) -> None:
        self.restarts += 1


def tokens(episode: Trajectory) -> list[object]:
    return [episode.seed, *(turn.action.token_ids for turn in episode.turns)]


STARTS = [Start(own, place, place) for place, own in enumerate(list(tiny_env().questions)[:9])]


def test_episodes_that_have_ended_are_not_played_again() -> None:
    calm, dying = Dying(), Dying(4, 9)
    wanted, none = play(tiny_env(4), calm, STARTS)
    episodes, restarts = play(tiny_env(4), dying, STARTS)
    assert (none, restarts, dying.restarts) == (0, 2, 2)
    assert list(map(tokens, episodes)) == list(map(tokens, wanted))
    # At most four episodes were under way each time, with at most as many turns behind them as calls were made.
    assert calm.asked < dying.asked < calm.asked + 4 * (3 + 4)


def test_an_engine_that_keeps_dying_ends_the_run() -> None:
    always = Dying(*range(1, 100))
    with pytest.raises(EngineFailed, match="gone"):
        play(tiny_env(4), always, STARTS)
    assert always.restarts == RESTARTS

    def mortal(conversations: Sequence[Conversation]) -> list[str]:
        raise EngineFailed("gone for good")

    with pytest.raises(EngineFailed, match="gone for good"):
        play(tiny_env(4), mortal, STARTS)


def test_waiting_for_a_server_has_an_end(served: tuple[Server, subprocess.Popen[bytes]]) -> None:
    with (
        client(f"http://127.0.0.1:{free_port()}") as nobody,
        pytest.raises(ServerFailed, match="lists no models"),
    ):
        nobody.wait(tries=2)
    with (
        client(served[0].url, "other") as other,
        pytest.raises(ServerFailed, match="is back, but without 'other': it offers small"),
    ):
        other.wait()
