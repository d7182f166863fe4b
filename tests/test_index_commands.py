"""`agentgym-ig index`, run as a user runs it."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.tiny_encoders import save_cross_encoder, save_encoder


def test_index_build_and_search(command: Command, toy: Path) -> None:
    code, printed = command("index", "build", "--corpus", toy / "corpus.jsonl", "--out", toy / "index")
    assert code == 0, printed
    assert "3 passages indexed" in printed
    code, printed = command("index", "search", "capital of Poland", "zzz", "--index", toy / "index", "--k", 1)
    assert code == 0, printed
    assert "Warsaw" in printed
    assert "nothing found" in printed


def test_the_build_script_is_the_same_command(toy: Path) -> None:
    script = Path(__file__).parent.parent / "data_scripts" / "build_index.py"
    done = subprocess.run(
        [sys.executable, script, "--corpus", toy / "corpus.jsonl", "--out", toy / "index"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (toy / "index" / "manifest.json").is_file()
    (toy / "corpus.jsonl").write_text("nonsense\n")
    done = subprocess.run(
        [sys.executable, script, "--corpus", toy / "corpus.jsonl", "--out", toy / "second"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "corpus.jsonl:1" in done.stdout


def test_a_dry_run_says_what_it_will_need_and_writes_nothing(command: Command, toy: Path) -> None:
    code, printed = command("index", "build", "--corpus", toy / "corpus.jsonl", "--out", toy / "index", "--dry-run")
    assert code == 0, printed
    assert "3 passages will need about" in printed
    assert not list(toy.glob("index*"))
    code, printed = command(
        "index", "build", "--corpus", toy / "corpus.jsonl", "--out", toy / "i", "--dry-run", "--max-memory", "1MB"
    )
    assert "more than --max-memory 1.0 MB" in printed


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--kind", "elastic", "choose auto, bm25s, lucene, faiss or torch"),
        ("--max-memory", "plenty", "give a number and a unit"),
        ("--b", 7, "b between 0 and 1"),
        ("--pooling", "max", "pooling='max' must be one of"),
    ],
)
def test_a_mistake_shows_before_the_corpus_is_read(
    command: Command, toy: Path, option: str, value: object, message: str
) -> None:
    kind = [] if option == "--kind" else ["--kind", "torch" if option == "--pooling" else "bm25s"]
    code, printed = command(
        "index", "build", "--corpus", toy / "corpus.jsonl", "--out", toy / "index", *kind, option, value
    )
    assert (code, message in printed) == (1, True), printed
    assert not list(toy.glob("index*"))


def test_bm25_is_split_benched_and_evaluated(command: Command, toy: Path) -> None:
    corpus, index, questions = toy / "corpus.jsonl", toy / "index", toy / "questions" / "musique.jsonl"
    assert command("index", "build", "--corpus", corpus, "--out", index)[0] == 0
    code, printed = command("index", "split", "--index", index, "--parts", 2, "--out", toy / "parts")
    assert code == 0, printed
    assert (toy / "parts" / "part-1" / "manifest.json").is_file()
    code, printed = command("index", "bench", "--index", index, "--questions", questions, "--batch", "1,2", "--json")
    assert code == 0, printed
    figures = json.loads(printed)
    assert set(figures["batches"]) == {"1", "2"}
    assert figures["batches"]["2"]["queries_per_s"] > 0
    code, printed = command("index", "verify", "--index", index)
    assert "files as they were built" in printed


@pytest.mark.skipif(not (find_spec("faiss") and find_spec("sentence_transformers")), reason="needs faiss and [dense]")
def test_dense_indexes_from_the_command_line(command: Command, toy: Path) -> None:
    encoder, ranker = save_encoder(toy / "encoder"), save_cross_encoder(toy / "ranker")
    corpus = ("--corpus", toy / "corpus.jsonl", "--encoder", encoder)
    for more in (
        ("--kind", "torch", "--out", toy / "torch"),
        ("--kind", "faiss", "--out", toy / "flat", "--vectors-from", toy / "torch"),
        ("--kind", "faiss", "--out", toy / "graph", "--factory", "HNSW4"),
    ):
        code, printed = command("index", "build", *corpus, *more)
        assert code == 0, printed
    code, printed = command(
        "index", "import", *corpus, "--faiss", toy / "flat" / "index.faiss", "--out", toy / "imported"
    )
    assert code == 0, printed
    answers = set()
    for name in ("torch", "flat", "imported"):
        code, printed = command("index", "search", "capital of Poland", "--index", toy / name, "--k", 3)
        assert code == 0, printed
        answers.add(printed)
    assert len(answers) == 1, "all of them are exact scans of the same vectors"
    code, printed = command("index", "build", "--corpus", toy / "corpus.jsonl", "--out", toy / "bm25")
    both = ("--index", toy / "bm25", "--index", toy / "torch")
    code, printed = command(
        "index", "search", "radium", *both, "--rerank", ranker, "--cache", toy / "cache.sqlite", "--k", 2
    )
    assert code == 0, printed
    assert printed.count("[") == 0
    assert (toy / "cache.sqlite").is_file()
    moved = encoder.rename(toy / "elsewhere")
    code, printed = command("index", "search", "radium", "--index", toy / "torch")
    assert code == 1
    code, printed = command("index", "search", "radium", "--index", toy / "torch", "--encoder", moved)
    assert code == 0, printed
    other = save_encoder(toy / "other", seed=1)
    code, printed = command("index", "search", "radium", "--index", toy / "torch", "--encoder", other)
    assert (code, "was built with encoder" in printed) == (1, True), printed
