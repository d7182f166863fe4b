"""Corpora and question sets in every layout that we read, and what happens to bad files."""

import gzip
import json
import os
from pathlib import Path

import pytest

from agentgym_ig import CorpusError, Passage
from agentgym_ig.indexes import read_corpus, read_questions, write_corpus
from agentgym_ig.indexes.sources import count_rows
from tests.conftest import Command
from tests.fakes import PASSAGES

DATA = Path(os.environ.get("AGENTGYM_IG_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


def in_every_layout(folder: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    contents = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in PASSAGES]
    write_corpus(folder / "ours.jsonl", PASSAGES)
    for name, content in (("search_r1", contents), ("flashrag", [a | b for a, b in zip(rows, contents, strict=True)])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as lines:
            lines.write("\n".join(json.dumps(row) for row in content) + "\n")
    pq.write_table(pa.Table.from_pylist([row | {"url": "x"} for row in rows]), folder / "ours.parquet")
    pq.write_table(pa.Table.from_pylist(contents), folder / "search_r1.parquet")
    Dataset.from_list(contents).save_to_disk(folder / "saved")
    (folder / "several").mkdir()
    write_corpus(folder / "several" / "0.jsonl", PASSAGES[:2])
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "several" / "1.parquet")
    (folder / "several" / "README.md").write_text("not a corpus")
    return sorted(path for path in folder.iterdir())


def test_every_layout_gives_the_same_passages(tmp_path: Path) -> None:
    layouts = in_every_layout(tmp_path)
    assert len(layouts) == 7
    for path in layouts:
        assert list(read_corpus(path)) == PASSAGES, path.name
        assert count_rows(path) == 3, path.name


def test_the_published_layout_of_wiki_18() -> None:
    path = DATA / "samples" / "wiki18" / "wiki-18.sample.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    passages = list(read_corpus(path))
    assert passages
    assert all(len(passage.text.split()) == 100 and '"' not in passage.title[:1] for passage in passages)


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path) -> None:
    """A local folder stands in for the hub's: `datasets` loads both in the same way."""
    folder = tmp_path / "wiki"
    folder.mkdir()
    write_corpus(folder / "train.jsonl", PASSAGES)
    assert list(read_corpus(f"hf:{folder}")) == PASSAGES
    assert count_rows(f"hf:{folder}") == 0  # such a dataset does not say how many rows it has


def test_texts_with_line_breaks_and_titles_with_quotes_come_back(tmp_path: Path) -> None:
    odd = [Passage("7", 'Warsaw "the Phoenix"', "The capital.\nOf Poland."), Passage("8", "", "untitled")]
    write_corpus(tmp_path / "odd.jsonl", odd)
    assert list(read_corpus(tmp_path / "odd.jsonl")) == odd


def test_numbers_and_archives_of_several_members_are_fine(tmp_path: Path) -> None:
    row = json.dumps({"id": 7, "title": "T", "text": "x"}).encode() + b"\n\n"
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(row) + gzip.compress(row.replace(b"7", b"8")))
    assert [passage.id for passage in read_corpus(tmp_path / "two.jsonl.gz")] == ["7", "8"]
    assert count_rows(tmp_path / "two.jsonl.gz") == 4  # blank lines count: it is an estimate


def test_lone_surrogates_do_not_stop_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"id": "a", "title": "T", "text": "x \\ud800 y"}')
    (passage,) = read_corpus(tmp_path / "odd.jsonl")
    write_corpus(tmp_path / "clean.jsonl", [passage])
    assert list(read_corpus(tmp_path / "clean.jsonl")) == [Passage("a", "T", "x ? y")]


GOOD = json.dumps({"id": "a", "title": "T", "text": "x"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (f"{GOOD}\n{{oops", r"corpus\.jsonl:2: "),
        (f"{GOOD}\n[1]", r"corpus\.jsonl:2: found a JSON list"),
        (f'{GOOD}\n\n{{"id": "b", "title": "T", "te', r"corpus\.jsonl:3: "),
        ('{"id": null, "title": "T", "text": "x"}', r"corpus\.jsonl:1: passage None has no id"),
        ('{"id": "a", "contents": "only a title"}', r"corpus\.jsonl:1: passage 'a' has no text"),
        ('{"id": "a", "title": "T"}', r"corpus\.jsonl:1: field 'text' is missing"),
        ('{"id": "a", "title": "T", "text": "  "}', r"corpus\.jsonl:1: passage 'a' has no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(lines)
    with pytest.raises(CorpusError, match=message):
        list(read_corpus(path))


def test_broken_bytes_and_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.jsonl").write_bytes(GOOD.encode() + b'\n{"id": "\xff\xfe"}\n')
    with pytest.raises(CorpusError, match=r"bytes\.jsonl:2"):
        list(read_corpus(tmp_path / "bytes.jsonl"))
    whole = gzip.compress((GOOD + "\n").encode() * 1)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(CorpusError, match=r"cut\.jsonl\.gz"):
        list(read_corpus(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(CorpusError, match=r"not\.jsonl\.gz"):
        list(read_corpus(tmp_path / "not.jsonl.gz"))
    (tmp_path / "not.parquet").write_bytes(b"plain text")
    with pytest.raises(CorpusError, match=r"not\.parquet"):
        list(read_corpus(tmp_path / "not.parquet"))
    for missing in ("none.jsonl", "none.parquet", "none.jsonl.gz"):
        with pytest.raises(FileNotFoundError, match=r"\.jsonl\.gz"):
            list(read_corpus(tmp_path / missing))
        with pytest.raises(FileNotFoundError, match=r"none"):
            count_rows(tmp_path / missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no"):
        list(read_corpus(tmp_path / "empty"))


def test_questions_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    row: dict[str, object] = {
        "id": "1",
        "dataset": "nq",
        "question": "who?",
        "answers": ["me", "I"],
        "supporting": ["p1"],
    }
    path.write_text(json.dumps(row))
    (question,) = read_questions(path)
    assert question.answers == ("me", "I")
    assert question.supporting == ("p1",)
    changes: list[tuple[dict[str, object], str]] = [
        ({"answers": []}, r"q\.jsonl:1: question '1' has no answer"),
        ({"answers": "me"}, "wanted a list"),
        ({"question": " "}, "has no text"),
    ]
    for change, message in changes:
        path.write_text(json.dumps(row | change))
        with pytest.raises(CorpusError, match=message):
            read_questions(path)
    path.write_text("\n")
    with pytest.raises(CorpusError, match="holds no question"):
        read_questions(path)


def test_an_index_is_built_from_a_dataset_of_the_hub(tmp_path: Path, command: Command) -> None:
    (tmp_path / "wiki").mkdir()
    write_corpus(tmp_path / "wiki" / "train.jsonl", PASSAGES)
    named = ("index", "build", "--corpus", f"hf:{tmp_path / 'wiki'}", "--out", tmp_path / "index")
    code, printed = command(*named, "--dry-run")
    assert code == 1
    assert "does not say how many passages it has" in printed
    code, printed = command(*named)
    assert code == 0, printed
    assert "3 passages indexed" in printed
