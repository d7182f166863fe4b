"""Indexes made of others: fused, cached, and as the user names them."""

import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig import Hit, IndexUnusable, Passage, SearchFailed
from agentgym_ig.indexes import Bm25Index, CachedIndex, HttpIndex, HybridIndex, Index, open_index, open_indexes
from tests.fakes import PASSAGES, BrokenIndex, ListIndex


class FixedIndex:
    """Gives the same passages whatever is asked."""

    def __init__(self, names: str) -> None:
        self.hits = [Hit(Passage(name, name, name), 1.0 - i / 100) for i, name in enumerate(names)]

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self.hits[:k] for _ in queries]


def test_fusion_by_hand() -> None:
    # a: 1/61 + 1/62, b: 1/62 + 1/63, c: 1/63 alone, d: 1/61 alone; a > b since 0.03252 > 0.03200; then d, c
    hybrid = HybridIndex([FixedIndex("abc"), FixedIndex("dab")])
    assert isinstance(hybrid, Index)
    (hits,) = hybrid.search(["x"], 10)
    assert [hit.passage.id for hit in hits] == ["a", "b", "d", "c"]
    assert [hit.score for hit in hits] == pytest.approx([1 / 61 + 1 / 62, 1 / 62 + 1 / 63, 1 / 61, 1 / 63])
    assert hybrid.search(["x", "y"], 2) == [hits[:2]] * 2


def test_equal_fused_scores_are_ordered_by_id() -> None:
    (hits,) = HybridIndex([FixedIndex("zy"), FixedIndex("yz")]).search(["x"], 2)
    assert [hit.passage.id for hit in hits] == ["y", "z"]
    assert hits[0].score == hits[1].score


@settings(deadline=None)
@given(
    st.lists(st.permutations("abcdef"), min_size=2, max_size=4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 9)
)
def test_fusion_is_the_formula_written_out(orders: list[list[str]], depth: int, k: int, constant: int) -> None:
    hybrid = HybridIndex([FixedIndex("".join(order)) for order in orders], depth=depth, constant=constant)
    (hits,) = hybrid.search(["x"], k)
    expected: dict[str, float] = {}
    for order in orders:
        for name in order[: max(depth, k)]:
            expected[name] = expected.get(name, 0.0) + 1 / (constant + 1 + order.index(name))
    best = sorted(expected, key=lambda name: (-expected[name], name))[:k]
    assert [hit.passage.id for hit in hits] == best


def test_parts_over_different_passages_are_refused(tmp_path: Path) -> None:
    for name, passages in (("a", PASSAGES), ("b", PASSAGES[:2]), ("c", PASSAGES)):
        Bm25Index.build(passages, tmp_path / name)
    with pytest.raises(IndexUnusable, match="different corpora"):
        open_indexes([tmp_path / "a", tmp_path / "b"])
    fused = open_indexes([tmp_path / "a", tmp_path / "c"])
    assert fused.search(["radium"], 1)[0][0].passage == PASSAGES[0]
    for wrong in ([ListIndex()], []):
        with pytest.raises(ValueError, match="parts"):
            HybridIndex(wrong)


def test_what_was_asked_before_is_not_asked_again(tmp_path: Path) -> None:
    inner = ListIndex()
    queries = ["radium", "river Poland", "zzz", "radium", "\ud800 river"]
    for path in (None, tmp_path / "deep" / "cache.sqlite"):
        inner.calls = 0
        cached = CachedIndex(inner, path=path)
        expected = inner.search([query.encode("utf-8", "replace").decode() for query in queries], 2)
        assert cached.search(queries, 2) == cached.search(queries, 2) == expected
        assert cached.search(queries[:1], 1) == inner.search(queries[:1], 1), "another k is another question"
        assert inner.calls == 4  # two of them are this test's own
        assert (cached.hits, cached.misses) == (1 + 5, 4 + 1)


def test_results_outlive_the_process_but_not_a_change_of_the_index(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    CachedIndex(ListIndex(), path=path, key="a").search(["radium"], 2)
    inner = ListIndex()
    assert CachedIndex(inner, path=path, key="a").search(["radium"], 2) == ListIndex().search(["radium"], 2)
    assert inner.calls == 0
    CachedIndex(inner, path=path, key="b").search(["radium"], 2)
    assert inner.calls == 1


def test_memory_is_bounded_and_failures_are_not_kept(tmp_path: Path) -> None:
    inner = ListIndex()
    cached = CachedIndex(inner, entries=2)
    for query in ("a", "b", "c", "a"):
        cached.search([query], 1)
    assert inner.calls == 4
    assert len(cached.search(list("abcdef"), 1)) == 6
    with pytest.raises(SearchFailed):
        CachedIndex(BrokenIndex(), path=tmp_path / "c").search(["x"], 1)
    with sqlite3.connect(tmp_path / "c") as database:
        assert database.execute("SELECT count(*) FROM results").fetchone() == (0,)
    database.close()
    with pytest.raises(ValueError, match="entries=0"):
        CachedIndex(inner, entries=0)


def test_more_queries_than_one_statement_takes_and_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    queries = [f"Poland {i}" for i in range(1200)]
    expected = ListIndex().search(queries, 2)
    cached = CachedIndex(ListIndex(), path=path, entries=10)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: cached.search(queries[i * 100 : i * 100 + 400], 2), range(8)))
    assert [hits for own in found[::4] for hits in own] == expected[:800]
    assert CachedIndex(BrokenIndex(), path=path).search(queries[:1100], 2) == expected[:1100]


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some text " * 100)
    with pytest.raises(IndexUnusable, match=r"notes\.txt cannot be used"):
        CachedIndex(ListIndex(), path=tmp_path / "notes.txt")


def test_what_the_user_names_is_opened(tmp_path: Path) -> None:
    Bm25Index.build(PASSAGES, tmp_path / "index")
    assert isinstance(open_index(tmp_path / "index"), Bm25Index)
    assert isinstance(open_index("http://127.0.0.1:1"), HttpIndex)
    cached = open_indexes([tmp_path / "index"], cache=tmp_path / "cache")
    assert cached.search(["radium"], 1) == cached.search(["radium"], 1)
    with pytest.raises(IndexUnusable, match="no index in"):
        open_index(tmp_path / "nothing")
    with pytest.raises(IndexUnusable, match="no index was named"):
        open_indexes([])
    manifest = (tmp_path / "index" / "manifest.json").read_text()
    (tmp_path / "index" / "manifest.json").write_text(manifest.replace('"bm25s"', '"elastic"', 1))
    with pytest.raises(IndexUnusable, match="'elastic'"):
        open_index(tmp_path / "index")
