"""BM25 against the formula written out, the corpus readers, and what happens to bad files."""

import gzip
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig import CorpusError, IndexUnusable, Passage
from agentgym_ig.indexes import Bm25Index, Bm25Settings, Index, PassageStore, read_corpus, read_questions, write_corpus
from tests.fakes import PASSAGES, ListIndex

PLAIN = Bm25Settings(stopwords=(), stemmer=None, k1=1.2, b=0.75)


def plain_bm25(passages: list[Passage], query: str, settings: Bm25Settings) -> dict[str, float]:
    """BM25 as Lucene scores it, word by word."""
    documents = {
        p.id: PLAIN.tokenize([f"{p.title}\n" * (settings.title_weight - 1) + f"{p.title}\n{p.text}"])[0]
        for p in passages
    }
    mean = sum(map(len, documents.values())) / len(documents)
    scores: dict[str, float] = {}
    for word in PLAIN.tokenize([query])[0]:
        having = sum(word in words for words in documents.values())
        for name, words in documents.items():
            if count := words.count(word):
                idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
                norm = settings.k1 * (1 - settings.b + settings.b * len(words) / mean)
                scores[name] = scores.get(name, 0.0) + idf * count / (count + norm)
    return scores


words = st.sampled_from(["amber", "silver", "iron", "harbor", "mill", "ford"])
sentences = st.lists(words, min_size=1, max_size=6).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(sentences, sentences), min_size=1, max_size=8), sentences, st.integers(1, 9), st.integers(1, 3)
)
def test_search_is_the_formula_with_ties_by_id(rows: list[tuple[str, str]], query: str, k: int, weight: int) -> None:
    passages = [Passage(f"p{len(rows) - i}", title, text) for i, (title, text) in enumerate(rows)]
    chosen = Bm25Settings(stopwords=(), stemmer=None, k1=1.2, b=0.75, title_weight=weight)
    (hits,) = Bm25Index.from_passages(passages, chosen).search([query], k)
    expected = plain_bm25(passages, query, chosen)
    assert len(hits) == min(k, len(expected))
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.passage.id], rel=1e-5)
    assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))
    left_out = sorted(expected[name] for name in expected if name not in {hit.passage.id for hit in hits})
    if left_out:
        assert left_out[-1] <= hits[-1].score * (1 + 1e-5)


def test_equal_scores_are_cut_by_id_however_many_there_are() -> None:
    passages = [Passage(f"p{i:03d}", "same", "same words") for i in reversed(range(200))]
    (hits,) = Bm25Index.from_passages(passages, PLAIN).search(["same"], 3)
    assert [hit.passage.id for hit in hits] == ["p000", "p001", "p002"]


def test_batches_and_their_order_change_nothing(tmp_path: Path) -> None:
    index = Bm25Index.build(PASSAGES, tmp_path / "index")
    queries = ["radium", "capital of Poland", "", "zzz", "the of", "river\x00 \ud800", "radium"]
    together = index.search(queries, 2)
    assert together == [index.search([query], 2)[0] for query in queries]
    assert together[0] == together[6]
    assert together[2:5] == [[], [], []]
    assert index.search([], 3) == []
    assert len(index.search(["Poland Warsaw Curie Vistula"], 50)[0]) == 3
    with pytest.raises(ValueError, match="k=0"):
        index.search(["a"], 0)


def test_both_kinds_of_index_keep_the_contract() -> None:
    for index in (ListIndex(), Bm25Index.from_passages(PASSAGES)):
        assert isinstance(index, Index)
        (hits,) = index.search(["Warsaw Poland"], 2)
        assert hits[0].passage.id == "p2"


def test_an_index_on_disk_is_the_one_in_memory(tmp_path: Path) -> None:
    settings_ = Bm25Settings(stopwords=("of", "the"), title_weight=2)
    built = Bm25Index.build(iter(PASSAGES), tmp_path / "index", settings_)
    opened = Bm25Index.open(tmp_path / "index")
    memory = Bm25Index.from_passages(PASSAGES, settings_)
    assert opened.settings == settings_
    assert list(opened.passages()) == PASSAGES
    for query in ("radium", "capital", "longest river"):
        assert built.search([query], 3) == opened.search([query], 3) == memory.search([query], 3)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["passages"] == 3
    assert len(manifest["files"]["passages.jsonl"]["sha256"]) == 64


def test_equal_corpora_give_equal_indexes(tmp_path: Path) -> None:
    for name in "ab":
        Bm25Index.build(PASSAGES, tmp_path / name)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_an_unusable_folder_says_how_to_build_an_index(tmp_path: Path) -> None:
    with pytest.raises(IndexUnusable, match="agentgym-ig index build --corpus"):
        Bm25Index.open(tmp_path)
    folder = tmp_path / "index"
    Bm25Index.build(PASSAGES, folder)
    with pytest.raises(FileExistsError, match="another folder"):
        Bm25Index.build(PASSAGES, folder)
    with (folder / "passages.jsonl").open("ab") as lines:
        lines.write(b"x")
    with pytest.raises(IndexUnusable, match=r"passages\.jsonl has \d+ bytes, wanted \d+"):
        Bm25Index.open(folder)
    (folder / "manifest.json").write_text('{"format": 99, "kind": "bm25s"}')
    with pytest.raises(IndexUnusable, match="format"):
        Bm25Index.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(IndexUnusable, match="cannot be read"):
        Bm25Index.open(folder)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def passages() -> object:
        yield PASSAGES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bm25Index.build(passages(), tmp_path / "index")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no passage"):
        Bm25Index.build([], tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_corpora_are_read_in_both_layouts(tmp_path: Path) -> None:
    write_corpus(tmp_path / "ours.jsonl", PASSAGES)
    assert list(read_corpus(tmp_path / "ours.jsonl")) == PASSAGES
    rows = [{"id": 7, "contents": '"Warsaw"\nThe capital.\nOf Poland.'}]
    with gzip.open(tmp_path / "theirs.jsonl.gz", "wt") as lines:
        lines.write("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert list(read_corpus(tmp_path / "theirs.jsonl.gz")) == [Passage("7", "Warsaw", "The capital.\nOf Poland.")]


GOOD = json.dumps({"id": "a", "title": "T", "text": "x"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (f"{GOOD}\n{{oops", r"corpus\.jsonl:2: "),
        (f"{GOOD}\n[1]", r"corpus\.jsonl:2: found a JSON list"),
        (f"{GOOD}\n\n{GOOD}", r"corpus\.jsonl:3: id 'a' stands in an earlier line"),
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
    with pytest.raises(FileNotFoundError, match=r"\.jsonl or \.jsonl\.gz"):
        list(read_corpus(tmp_path / "none.jsonl"))


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


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5))
def test_the_store_gives_back_what_it_took(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("store")
    passages = [Passage(str(i), text, text) for i, text in enumerate(texts)]
    assert list(PassageStore.write(folder, passages)) == passages
    store = PassageStore(folder)
    assert [store[i] for i in range(len(store))] == passages
    with pytest.raises(KeyError):
        store[len(passages)]
