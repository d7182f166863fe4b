"""BM25 against the formula written out and against the library that it wraps."""

import json
import math
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig import IndexUnusable, Passage
from agentgym_ig.indexes import Bm25Index, Bm25Settings, BuildOptions, Index, open_index
from agentgym_ig.indexes.bm25 import COMPILE_FROM
from agentgym_ig.indexes.postings import ScoreMatrix
from agentgym_ig.indexes.splitting import check_parts, split_index
from agentgym_ig.tinywiki.world import World
from agentgym_ig.types import texts
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
    assert len(manifest["files"]["passages/00000.jsonl"]["sha256"]) == 64


def test_the_matrix_is_the_librarys_bit_for_bit(tmp_path: Path) -> None:
    """In several shards and small blocks; bm25s also opens what we wrote."""
    passages = list(World(3).passages)
    chosen = Bm25Settings(k1=1.1, b=0.6)
    Bm25Index.build(passages, tmp_path / "index", chosen, BuildOptions(shard=37))
    theirs = bm25s.BM25(k1=1.1, b=0.6, method="lucene")
    theirs.index(chosen.tokenize(texts(passages)), show_progress=False)
    ours = bm25s.BM25.load(tmp_path / "index" / "bm25s", mmap=True)
    assert set(theirs.vocab_dict) - {""} == set(ours.vocab_dict)
    for word, number in ours.vocab_dict.items():
        assert np.array_equal(ours.get_scores([word]), theirs.get_scores([word])), (word, number)
    assert ours.scores["indptr"][-1] == theirs.scores["indptr"][-1]


@pytest.mark.parametrize("memory", [64, 64 * 50, 64 * 10**6])
def test_blocks_of_any_size_are_the_same_matrix(memory: int) -> None:
    shards = [PLAIN.count(PASSAGES[:1]), PLAIN.count(PASSAGES[1:])]
    matrix, whole = ScoreMatrix(shards, 1.2, 0.75), ScoreMatrix([PLAIN.count(PASSAGES)], 1.2, 0.75).whole()
    blocks = list(matrix.blocks(memory))
    assert np.array_equal(np.concatenate([scores for scores, _ in blocks]), whole["data"])
    assert np.array_equal(np.concatenate([rows for _, rows in blocks]), whole["indices"])
    assert np.array_equal(matrix.starts, whole["indptr"])


def test_a_corpus_without_a_word_can_be_indexed_and_finds_nothing(tmp_path: Path) -> None:
    index = Bm25Index.build([Passage("a", "!", "?"), Passage("b", "", "the of")], tmp_path / "index")
    assert index.search(["the", "?"], 3) == [[], []]
    assert Bm25Index.from_passages([Passage("a", "!", "?")]).search(["!"], 1) == [[]]


def test_long_and_odd_queries_are_searched_like_any_other(tmp_path: Path) -> None:
    index = Bm25Index.build(PASSAGES, tmp_path / "index")
    assert [hit.passage.id for hit in index.search(["radium " * 150_000], 1)[0]] == ["p1"]
    assert index.search(["\x00\x1b radium \ud800"], 1)[0][0].passage.id == "p1"


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), max_size=4), st.sampled_from([Bm25Settings(), PLAIN]))
def test_words_of_queries_are_those_of_passages(lines: list[str], chosen: Bm25Settings) -> None:
    """A query's words are looked up one by one; together they must be what the library makes of the whole."""
    lines += ["The harbor of HARBORS, harbors' Straße ΑΣ İstanbul"]
    index = Bm25Index.from_passages([Passage(str(i), line, "end") for i, line in enumerate(lines)], chosen)
    expected = [[index.vocabulary[word] for word in words] for words in chosen.tokenize(lines)]
    assert index.numbers(lines) == index.numbers(lines) == expected


def test_threads_change_nothing() -> None:
    rng = np.random.default_rng(0)
    words_ = [f"word{i}" for i in range(300)]
    passages = [Passage(f"{i:06d}", "t", " ".join(rng.choice(words_, 8))) for i in range(COMPILE_FROM)]
    index = Bm25Index.from_passages(passages)
    queries = [" ".join(rng.choice(words_, 3)) for _ in range(64)]
    alone = index.search(queries, 5)
    index.threads = 2
    assert index.search(queries, 5) == alone


def test_parts_merged_are_the_whole(tmp_path: Path) -> None:
    passages = list(World(5).passages)
    whole = Bm25Index.build(passages, tmp_path / "index", None, BuildOptions(shard=50))
    folders = split_index(tmp_path / "index", 3, tmp_path / "parts")
    parts = [open_index(folder) for folder in folders]
    queries = [passage.text for passage in passages[:40]]
    found = [part.search(queries, 7) for part in parts]
    for i, expected in enumerate(whole.search(queries, 7)):
        merged = [hit for lists in found for hit in lists[i]]
        assert sorted(merged, key=lambda hit: (-hit.score, hit.passage.id))[:7] == expected
    check_parts(folders)
    check_parts([tmp_path / "index"])
    for incomplete in (folders[:2], [*folders, tmp_path / "index"], [*folders[:2], folders[0]]):
        with pytest.raises(IndexUnusable, match="each of the 3 parts"):
            check_parts(incomplete)
    with pytest.raises(ValueError, match="parts=0"):
        split_index(tmp_path / "index", 0, tmp_path / "none")


@pytest.mark.parametrize("change", [{"k1": -1.0}, {"b": 1.1}, {"title_weight": 0}])
def test_settings_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Bm25Settings(**change)  # type: ignore[arg-type]
