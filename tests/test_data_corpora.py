"""Corpora in the layouts of the releases, and what an index makes of them."""

import bz2
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym_ig import CorpusError, Passage
from agentgym_ig.data import read_manifest
from agentgym_ig.data.corpora import KINDS, CorpusSettings, prepare_corpus
from agentgym_ig.data.passages import cut, join_contents
from agentgym_ig.data.releases import CORPORA
from agentgym_ig.data.work import How
from agentgym_ig.indexes import read_corpus
from tests.conftest import Command
from tests.data_files import as_lines, as_parquet
from tests.test_data_layouts import SAMPLES
from tests.test_mediawiki import PLAIN, dump

LONG = " ".join(f"word{i}" for i in range(230))


def tsv(path: Path) -> Path:
    path.write_text('id\ttext\ttitle\n1\t"the ""Vell"" spring"\tLake Orrin\n2\tplain text\tNorwick\n')
    return path


def wiki18(path: Path) -> Path:
    """The raw file doubles inner quotes."""
    rows = [
        {"id": "0", "contents": '"Lake Orrin"\nthe ""Vell"" spring'},
        {"id": "1", "contents": '"""Emma"" (play)"\nplain'},
    ]
    as_lines(path, rows)
    return path


def articles(path: Path) -> Path:
    rows = [
        {"id": "12", "url": "u", "title": "Orrin", "text": LONG},
        {"id": "13", "url": "u", "title": "E", "text": ""},
    ]
    as_parquet(path, rows)
    return path


def kilt(path: Path) -> Path:
    text = ["Orrin\n", "Orrin is a lake.\n", "Section::::History.\n", "BULLET::::- First settled.\n"]
    as_lines(path, [{"_id": "55", "wikipedia_id": "55", "wikipedia_title": "Orrin", "text": text}])
    return path


def passages(path: Path) -> Path:
    as_lines(path, [{"id": 7, "title": "Orrin", "text": "A lake."}])
    return path


def abstracts(path: Path) -> Path:
    """A tar archive of packed files, as HotpotQA's is."""
    files = {
        "wiki/AA/wiki_00.bz2": [
            {"id": "1", "title": "Orrin", "text": ["Orrin is a lake.", " It is deep."], "url": "u"}
        ],
        "wiki/AB/wiki_00.bz2": [
            {"id": "2", "title": "Void", "text": []},
            {"id": "3", "title": "Elm", "text": ["A hall."]},
        ],
    }
    with tarfile.open(path, "w:bz2") as archive:
        for name, rows in files.items():
            content = bz2.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode())
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


ABSTRACTS = [Passage("1", "Orrin", "Orrin is a lake. It is deep."), Passage("3", "Elm", "A hall.")]
CUT = [Passage(f"12-{i}", "Orrin", " ".join(LONG.split()[100 * i : 100 * i + 100])) for i in range(3)]
SOURCES: dict[str, tuple[Callable[[Path], Path], str, list[Passage], dict[str, int]]] = {
    "wiki18": (
        wiki18,
        "wiki-18.jsonl",
        [Passage("0", "Lake Orrin", 'the "Vell" spring'), Passage("1", '"Emma" (play)', "plain")],
        {},
    ),
    "dpr": (
        tsv,
        "psgs.tsv",
        [Passage("1", "Lake Orrin", 'the "Vell" spring'), Passage("2", "Norwick", "plain text")],
        {},
    ),
    "articles": (articles, "wiki.parquet", CUT, {"empty": 1}),
    "kilt": (kilt, "kilt.json", [Passage("55-0", "Orrin", "Orrin is a lake. - First settled.")], {}),
    "passages": (passages, "p.jsonl", [Passage("7", "Orrin", "A lake.")], {}),
    "hotpotqa": (abstracts, "abstracts.tar.bz2", ABSTRACTS, {"empty": 1}),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_every_kind_becomes_a_corpus(tmp_path: Path, command: Command, kind: str, ending: str) -> None:
    write, name, expected, dropped = SOURCES[kind]
    out = tmp_path / f"corpus{ending}"
    code, printed = command("data", "corpus", kind, "--source", write(tmp_path / name), "--out", out)
    assert code == 0, printed
    assert list(read_corpus(out)) == expected
    found = read_manifest(out)
    assert found["corpus"] == kind
    assert found["rows"]["written"] == len(expected)
    assert found["rows"]["dropped"] == dropped
    assert command("data", "check", out)[0] == 0
    code, printed = command("data", "corpus", kind, "--source", tmp_path / name, "--out", out)
    assert code == 1
    assert "--force writes over it" in printed


def test_a_dump_becomes_a_corpus(tmp_path: Path) -> None:
    made = prepare_corpus("mediawiki", str(dump(tmp_path / "dump.xml.bz2")), tmp_path / "corpus.jsonl")
    assert made["rows"]["dropped"] == {"disambiguation": 2, "empty": 1, "namespace": 1, "redirect": 1}
    assert made["rows"]["read"] == 7
    found = list(read_corpus(tmp_path / "corpus.jsonl"))
    assert found[0] == Passage("1-0", "Ada Brook", PLAIN)
    assert [(passage.id, len(passage.text.split())) for passage in found[1:]] == [
        ("6-0", 100),
        ("6-1", 100),
        ("6-2", 34),
    ]


def test_the_archive_and_the_folder_that_it_unpacks_to_give_the_same(tmp_path: Path) -> None:
    with tarfile.open(abstracts(tmp_path / "a.tar.bz2")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    prepare_corpus("hotpotqa", str(tmp_path / "unpacked"), tmp_path / "corpus.jsonl")
    assert list(read_corpus(tmp_path / "corpus.jsonl")) == ABSTRACTS


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    wiki18(tmp_path / "repo" / "wiki-18.jsonl")
    made = prepare_corpus("wiki18", f"hf:{tmp_path / 'repo'}", tmp_path / "corpus.jsonl")
    assert list(read_corpus(tmp_path / "corpus.jsonl")) == SOURCES["wiki18"][2]
    assert made["split"] == "train"


@pytest.mark.parametrize("kind", ["articles", "mediawiki", "hotpotqa"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, kind: str, ending: str) -> None:
    source = dump(tmp_path / "d.xml") if kind == "mediawiki" else SOURCES[kind][0](tmp_path / SOURCES[kind][1])
    whole, broken = tmp_path / f"whole{ending}", tmp_path / f"broken{ending}"
    prepare_corpus(kind, str(source), whole, how=How(chunk=1))

    def stop(read: int, kept: int) -> None:
        if kept:
            raise KeyboardInterrupt

    for _ in range(20):  # at most one row further each time
        try:
            prepare_corpus(kind, str(source), broken, how=How(resume=True, chunk=1, progress=stop))
        except KeyboardInterrupt:
            continue
        break
    assert broken.read_bytes() == whole.read_bytes()
    assert read_manifest(broken) | {"file": ""} == read_manifest(whole) | {"file": ""}


def test_duplicates_can_be_left_out(tmp_path: Path) -> None:
    rows = [{"id": str(i), "title": "Orrin", "text": text} for i, text in enumerate(("A lake.", "a  LAKE", "A pond."))]
    as_lines(tmp_path / "p.jsonl", rows)
    out = tmp_path / "out.jsonl"
    prepare_corpus("passages", str(tmp_path / "p.jsonl"), out)
    assert len(list(read_corpus(out))) == 3
    made = prepare_corpus(
        "passages", str(tmp_path / "p.jsonl"), out, CorpusSettings(drop_duplicates=True), How(force=True)
    )
    assert [passage.id for passage in read_corpus(out)] == ["0", "2"]
    assert made["rows"]["dropped"] == {"duplicate": 1}


@given(st.text(max_size=300), st.integers(1, 7))
def test_cutting_loses_and_repeats_no_word(text: str, words: int) -> None:
    made = list(cut("a", "T", text, words))
    assert [word for passage in made for word in passage.text.split()] == text.split()
    assert all(len(passage.text.split()) == words for passage in made[:-1])
    assert [passage.id for passage in made] == [f"a-{i}" for i in range(len(made))]


def test_the_table_and_the_code_know_the_same_kinds() -> None:
    assert set(KINDS) == set(CORPORA)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("wiki18", [{"id": "0", "text": "x"}], r"p\.jsonl:1: field 'contents' is missing"),
        ("wiki18", [{"id": "0", "contents": '"T"'}], r"p\.jsonl:1: passage '0' has no text"),
        ("articles", [{"id": "", "title": "T", "text": "x"}], r"p\.jsonl:1: an article has no id"),
        ("articles", [{"title": "T", "text": "x"}], r"p\.jsonl:1: field 'id' is missing"),
        ("kilt", [{"title": "T", "text": ["x"]}], r"p\.jsonl:1: field 'wikipedia_title' is missing"),
        (
            "articles",
            [{"id": "1", "title": "T", "text": " "}],
            r"no passage is left of .*: 1 rows read, left out: .*empty",
        ),
        ("passages", [], "no passage is left"),
    ],
)
def test_bad_rows_are_named_and_leave_nothing(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]], message: str
) -> None:
    as_lines(tmp_path / "p.jsonl", rows)
    with pytest.raises(CorpusError, match=message):
        prepare_corpus(kind, str(tmp_path / "p.jsonl"), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_whole_articles_are_not_taken_for_abstracts(tmp_path: Path) -> None:
    content = json.dumps({"id": "1", "title": "T", "text": [["a paragraph", "of sentences"]]}).encode()
    (tmp_path / "wiki_00.bz2").write_bytes(bz2.compress(content))
    with pytest.raises(CorpusError, match="take the archive of the abstracts"):
        prepare_corpus("hotpotqa", str(tmp_path / "wiki_00.bz2"), tmp_path / "out.jsonl")
    (tmp_path / "cut.tar.bz2").write_bytes(abstracts(tmp_path / "a.tar.bz2").read_bytes()[:-200])
    with pytest.raises(CorpusError, match=r"cut\.tar\.bz2"):
        prepare_corpus("hotpotqa", str(tmp_path / "cut.tar.bz2"), tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wiki19", "--source", "x", "--out", "a.jsonl"], "unknown kind of corpus 'wiki19'; choose wiki18"),
        (["wiki18", "--source", "x", "--out", "a.jsonl"], "no file x; give a file, a folder of files, or hf:NAME"),
        (["wiki18", "--source", "x", "--out", "a"], "give a file that ends in .jsonl or .jsonl.gz"),
        (["mediawiki", "--source", "hf:x/y", "--out", "a.jsonl"], "mediawiki is not on the hub; download it"),
        (["wiki18", "--source", ".", "--out", "a.jsonl"], "folder . holds no"),
        (["hotpotqa", "--source", ".", "--out", "a.jsonl"], "folder . holds no .bz2 file"),
        (["articles", "--source", "x", "--out", "a.jsonl", "--words", "0"], "must be 1 or more"),
    ],
)
def test_wrong_arguments_are_told(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed = command("data", "corpus", *arguments)
    assert code == 1
    assert message in printed.replace("\n", " ")


def test_the_sample_of_wiki_18_keeps_its_rows(tmp_path: Path) -> None:
    path = SAMPLES / "wiki18" / "wiki-18.sample.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    prepare_corpus("wiki18", str(path), tmp_path / "corpus.jsonl.gz")
    found, before = list(read_corpus(tmp_path / "corpus.jsonl.gz")), list(read_corpus(path))
    assert [passage.id for passage in found] == [passage.id for passage in before] == [str(i) for i in range(300)]
    assert found == before  # its quoting was undone already
    doubled = [
        {"id": own.id, "contents": join_contents(own.title.replace('"', '""'), own.text.replace('"', '""'))}
        for own in before
    ]
    as_lines(tmp_path / "raw.jsonl", doubled)
    prepare_corpus("wiki18", str(tmp_path / "raw.jsonl"), tmp_path / "again.jsonl.gz")
    again = list(read_corpus(tmp_path / "again.jsonl.gz"))
    differing = [own for own, other in zip(before, again, strict=True) if own != other]
    # One lone quote in brackets, doubled, cannot be told from quotes around nothing.
    assert [own.text.count('"') for own in differing] == [1]
