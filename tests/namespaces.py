"""Hosts made of Linux namespaces: each has its own network, processes, shared memory and Ray folder.

A host is the process that holds its namespaces: SIGKILL it, and the kernel kills all that runs there, as a power cut
would. Nothing on such a host can be reached from the machine itself, or the other way round.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RAY = Path("/tmp/ray")
INIT = f"""
set -e
mount -t tmpfs -o size=512m tmpfs /dev/shm
mount -t tmpfs -o size=512m tmpfs {RAY}
ip link set lo up
echo up
sleep infinity & wait
"""


def why_not() -> str | None:
    """Why hosts cannot be made here, or None where they can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "bash") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"],
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else f"may not make namespaces: {tried.stderr.strip()}"


@dataclass
class Host:
    """A host that runs."""

    address: str
    keeper: subprocess.Popen[str]
    init: int
    """The process that all others on the host hang on."""

    def command(self, *words: str) -> list[str]:
        """The same command, on this host."""
        enter = ["nsenter", f"--target={self.init}", "--net", "--pid", "--mount"]
        return [*enter, "--", "env", f"--chdir={ROOT}", "RAY_USAGE_STATS_ENABLED=0", *words]

    def run(self, *words: str, timeout: float = 60) -> str:
        """Run a command to its end. Raises when it fails."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def running(self, output: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command that runs as long as the block does, what it prints in a file."""
        with output.open("wb") as file, subprocess.Popen(self.command(*words), stdout=file, stderr=file) as process:
            try:
                yield process
            finally:
                process.kill()

    def kill(self) -> None:
        """Cut the power."""
        self.keeper.kill()
        self.keeper.wait()


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them; afterwards nothing of them is left."""
    names = [f"agig{os.getpid()}-{number}" for number in (1, 2)]
    with ExitStack() as stack:
        if not RAY.exists():  # each host puts a file system of its own there
            RAY.mkdir()
            stack.callback(RAY.rmdir)
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        cable = ["ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable"]
        subprocess.run([*cable, "netns", names[1]], check=True)
        made = []
        for name, address in zip(names, ("192.0.2.1", "192.0.2.2"), strict=True):  # addresses for documentation
            subprocess.run(["ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable"], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "cable", "up"], check=True)
            made.append(stack.enter_context(_host(name, address)))
        yield made[0], made[1]


@contextmanager
def _host(name: str, address: str) -> Iterator[Host]:
    # --kill-child: whatever ends the keeper, the end of the test run included, ends the host
    keep = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "bash", "-c", INIT]
    with subprocess.Popen(["ip", "netns", "exec", name, *keep], stdout=subprocess.PIPE, text=True) as keeper:
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == "up\n"
            (init,) = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
            yield Host(address, keeper, int(init))
        finally:
            keeper.kill()
