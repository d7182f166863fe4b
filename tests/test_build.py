"""Building in shards: killed at any moment and resumed, the same files; nothing mixed up and nothing lost."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig import BuildFailed, CorpusError, IndexUnusable, Passage
from agentgym_ig.indexes import Bm25Index, Bm25Settings, BuildOptions, PassageStore, build_index, write_corpus
from agentgym_ig.indexes.build import Work
from agentgym_ig.indexes.estimate import estimate
from agentgym_ig.indexes.manifest import damaged_files, read_manifest
from agentgym_ig.indexes.store import store_passages
from agentgym_ig.provenance import file_sha256
from agentgym_ig.tinywiki.world import World
from tests.fakes import PASSAGES

SMALL = BuildOptions(shard=40)


def corpus() -> list[Passage]:
    return list(World(2).passages)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Stopping:
    """BM25 that is stopped in one of its steps, as by Ctrl-C; notes how many shards it has worked on."""

    step: int
    inner: Bm25Settings = field(default_factory=Bm25Settings)
    name: str = "bm25s"
    digested: int = 0

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()

    def versions(self) -> dict[str, str]:
        return self.inner.versions()

    def memory_needed(self, count: int, sample: Path) -> int:
        return self.inner.memory_needed(count, sample)

    def check(self, count: int, memory: int) -> None:
        self.inner.check(count, memory)

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        self.inner.digest(passages, folder, progress)
        if self.digested == self.step:
            raise KeyboardInterrupt
        self.digested += 1

    def assemble(self, work: Work, folder: Path) -> None:
        self.inner.assemble(work, folder)
        if self.step == -1:
            raise KeyboardInterrupt


def test_a_stopped_build_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    passages = corpus()
    build_index(passages, tmp_path / "whole", Bm25Settings(), SMALL)
    for step in (0, 2, -1):
        with pytest.raises(KeyboardInterrupt):
            build_index(passages, tmp_path / "index", Stopping(step), SMALL)
        assert not (tmp_path / "index").exists()
        with pytest.raises(IndexUnusable, match=r"index\.partial holds a build that was not finished"):
            Bm25Index.open(tmp_path / "index")
    last = Stopping(10**9)
    build_index(passages, tmp_path / "index", last, SMALL)
    assert last.digested == 0, "all shards had been done before"
    assert contents(tmp_path / "index") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "whole"]


def test_a_corpus_that_cannot_be_read_to_its_end_loses_nothing(tmp_path: Path) -> None:
    def broken() -> Iterable[Passage]:
        yield from corpus()[:100]
        raise CorpusError("corpus.jsonl:101: oops")

    with pytest.raises(CorpusError, match="101"):
        build_index(broken(), tmp_path / "index", Bm25Settings(), SMALL)
    assert len(list((tmp_path / "index.partial" / "index" / "passages").glob("*.jsonl"))) == 2
    build_index(corpus(), tmp_path / "index", Bm25Settings(), SMALL)
    assert list(Bm25Index.open(tmp_path / "index").passages()) == corpus()


def test_a_resumed_build_takes_no_other_corpus_and_no_other_settings(tmp_path: Path) -> None:
    passages = corpus()
    with pytest.raises(KeyboardInterrupt):
        build_index(passages, tmp_path / "index", Stopping(1), SMALL)
    before = contents(tmp_path / "index.partial" / "index")
    other = [*passages[:50], Passage("new", "New", "text"), *passages[51:]]
    for wrong, message in ((other, "from passage 41 on"), (passages[:80], "now ends after 80 passages")):
        with pytest.raises(CorpusError, match=message):
            build_index(wrong, tmp_path / "index", Bm25Settings(), SMALL)
    with pytest.raises(BuildFailed, match="k1"):
        build_index(passages, tmp_path / "index", Bm25Settings(k1=1.5), SMALL)
    with pytest.raises(BuildFailed, match="shard"):
        build_index(passages, tmp_path / "index", Bm25Settings(), BuildOptions(shard=39))
    assert contents(tmp_path / "index.partial" / "index") == before
    build_index(passages, tmp_path / "index", Bm25Settings(), SMALL)


def test_two_processes_do_not_build_the_same_index(tmp_path: Path) -> None:
    def passages() -> Iterable[Passage]:
        yield PASSAGES[0]
        with pytest.raises(BuildFailed, match="another process is building"):
            build_index(PASSAGES, tmp_path / "index", Bm25Settings())
        yield from PASSAGES[1:]

    build_index(passages(), tmp_path / "index", Bm25Settings())


def test_an_index_is_not_overwritten(tmp_path: Path) -> None:
    Bm25Index.build(PASSAGES, tmp_path / "index")
    with pytest.raises(FileExistsError, match="another folder"):
        Bm25Index.build(PASSAGES, tmp_path / "index")


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([], "holds no passage"),
        ([*PASSAGES, PASSAGES[1]], "passages 2 and 4 have the same id 'p2'"),
    ],
)
def test_a_corpus_that_cannot_be_indexed(tmp_path: Path, passages: list[Passage], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        Bm25Index.build(passages, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_verify_names_the_shard_of_a_flipped_bit(tmp_path: Path) -> None:
    build_index(corpus(), tmp_path / "index", Bm25Settings(), SMALL)
    assert damaged_files(tmp_path / "index") == []
    for name, shown in (
        ("passages/00001.jsonl", "passages/00001.jsonl (shard 1: passages 41 to 80)"),
        ("bm25s/data.csc.index.npy", "bm25s/data.csc.index.npy"),
    ):
        path = tmp_path / "index" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
        assert damaged_files(tmp_path / "index") == [shown]
        path.write_bytes(whole)


def test_an_unusable_folder_says_how_to_build_an_index(tmp_path: Path) -> None:
    with pytest.raises(IndexUnusable, match="agentgym-ig index build --corpus"):
        Bm25Index.open(tmp_path)
    folder = tmp_path / "index"
    Bm25Index.build(PASSAGES, folder)
    with pytest.raises(IndexUnusable, match="holds a bm25s index, wanted lucene"):
        read_manifest(folder, "lucene")
    with (folder / "passages" / "00000.jsonl").open("ab") as lines:
        lines.write(b"x")
    with pytest.raises(IndexUnusable, match=r"00000\.jsonl has \d+ bytes, wanted \d+"):
        Bm25Index.open(folder)
    (folder / "manifest.json").write_text('{"format": 1, "kind": "bm25s"}')
    with pytest.raises(IndexUnusable, match="format 1, wanted 2"):
        Bm25Index.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(IndexUnusable, match="cannot be read"):
        Bm25Index.open(folder)


def test_too_little_memory_is_said_beforehand(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"100 MB are not enough for 3 passages .* allow \d+ MB or more"):
        Bm25Index.build(PASSAGES, tmp_path / "index", None, BuildOptions(memory=100 << 20))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=7), st.integers(1, 4))
def test_the_store_gives_back_what_it_took(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], shard: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    passages = [Passage(str(i), text, text) for i, text in enumerate(texts)]
    store, corpus_sha256 = store_passages(folder, passages, shard, lambda done: None)
    again = PassageStore(folder, shard)
    assert [again[i] for i in range(len(again))] == list(store) == passages
    assert [len(own) for own in store.shards()] == [len(passages[i : i + shard]) for i in range(0, len(texts), shard)]
    assert store_passages(folder, passages, shard, lambda done: None)[1] == corpus_sha256
    for row in (-1, len(passages)):
        with pytest.raises(KeyError):
            store[row]


def test_an_estimate_is_near_what_is_needed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", corpus())
    needs = estimate(tmp_path / "corpus.jsonl", Bm25Settings())
    Bm25Index.build(corpus(), tmp_path / "index")
    disk = sum(path.stat().st_size for path in (tmp_path / "index").rglob("*") if path.is_file())
    assert needs.passages == len(corpus())
    assert needs.disk_bytes == pytest.approx(disk, rel=0.1)
    assert 0 < needs.seconds < 60
    assert needs.memory_bytes > 400 << 20


BUILD = [sys.executable, "-m", "agentgym_ig.commands.main", "index", "build", "--kind", "bm25s"]


def start_build(corpus_file: Path, out: Path, **limits: Any) -> subprocess.Popen[str]:
    command = [*BUILD, "--corpus", str(corpus_file), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **limits)


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90,000 passages, so that a build takes several seconds and several shards."""
    path = tmp_path_factory.mktemp("large") / "corpus.jsonl"
    rng = random.Random(0)
    words = [f"w{i}" for i in range(5000)]
    write_corpus(path, (Passage(f"{i:06d}", f"t{i}", " ".join(rng.choices(words, k=30))) for i in range(90_000)))
    return path


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_is_the_same_index(large_corpus: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    whole = start_build(large_corpus, tmp_path / "whole")
    assert whole.communicate()[0].count("90,000 passages indexed") == 1
    seconds = time.monotonic() - started
    rng, kills = random.Random(1), 0
    while not (tmp_path / "index").exists():
        build = start_build(large_corpus, tmp_path / "index")
        # Later and later, so that it also ends on a machine where every start is slow.
        time.sleep(min(seconds, 0.5 + rng.random() * seconds * (0.4 + 0.15 * kills)))
        build.send_signal(signal.SIGKILL)
        build.communicate()
        kills += 1
        assert kills < 30
    assert kills > 1
    assert contents(tmp_path / "index") == contents(tmp_path / "whole")
    assert not (tmp_path / "index.partial").exists() or contents(tmp_path / "index.partial").keys() <= {"lock"}


@pytest.mark.slow
def test_a_full_disk_loses_nothing(large_corpus: Path, tmp_path: Path) -> None:
    """On a file system of its own that is too small, made larger afterwards."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        stopped = start_build(large_corpus, disk / "index")
        said = stopped.communicate()[0]
        assert stopped.returncode == 1
        assert "is full; what was built so far is kept" in " ".join(said.split())
        assert list((disk / "index.partial").rglob("*.jsonl"))
        subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
        resumed = start_build(large_corpus, disk / "index")
        assert "90,000 passages indexed" in resumed.communicate()[0]
        assert damaged_files(disk / "index") == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_ctrl_c_says_how_to_go_on(large_corpus: Path, tmp_path: Path) -> None:
    build = start_build(large_corpus, tmp_path / "index")
    while not (tmp_path / "index.partial" / "index" / "passages" / "00000.jsonl").exists():
        assert build.poll() is None
        time.sleep(0.05)
    build.send_signal(signal.SIGINT)
    said = build.communicate()[0]
    assert build.returncode == 130
    assert "Run the same command again to go on from here" in " ".join(said.split())


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def passages() -> Iterable[Passage]:
        yield PASSAGES[0]
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output"):
        build_index(passages(), tmp_path / "index", Bm25Settings())
    shutil.rmtree(tmp_path / "index.partial")


def test_the_manifest_says_what_the_index_was_made_of(tmp_path: Path) -> None:
    build_index(corpus(), tmp_path / "index", Bm25Settings(), SMALL)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert (manifest["format"], manifest["kind"], manifest["shard"]) == (2, "bm25s", 40)
    assert manifest["passages"] == len(corpus())
    assert set(manifest["files"]) == set(contents(tmp_path / "index")) - {"manifest.json"}
    assert set(manifest["versions"]) == {"bm25s", "PyStemmer"}
    assert Bm25Index.open(tmp_path / "index").corpus_sha256 == manifest["corpus_sha256"]
