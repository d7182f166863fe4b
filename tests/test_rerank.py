"""Reranking: the order is the cross-encoder's own, and nothing else changes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agentgym_ig import IndexUnusable, Passage, SearchFailed
from agentgym_ig.indexes import Bm25Index
from agentgym_ig.indexes.base import Index
from agentgym_ig.indexes.rerank import RerankedIndex
from agentgym_ig.tinywiki import World
from agentgym_ig.types import Hit
from tests.fakes import BrokenIndex, ListIndex
from tests.tiny_encoders import save_cross_encoder

QUERIES = ["which country is the capital of", World(2).passages[0].text, "zzz"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_cross_encoder(tmp_path_factory.mktemp("models") / "cross"))


@pytest.fixture(scope="module")
def bm25() -> Bm25Index:
    return Bm25Index.from_passages(World(2).passages)


def logits(model: str, query: str, passages: list[Passage]) -> list[float]:
    """One pair at a time, with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.inference_mode():
        return [
            float(network(**tokenizer(query, f"{p.title}\n{p.text}", return_tensors="pt", truncation=True)).logits)
            for p in passages
        ]


def test_hits_come_in_the_order_of_the_cross_encoder(model: str, bm25: Bm25Index) -> None:
    index = RerankedIndex(bm25, model, depth=20, device="cpu")
    assert isinstance(index, Index)
    found = index.search(QUERIES, 5)
    for query, hits, candidates in zip(QUERIES, found, bm25.search(QUERIES, 20), strict=True):
        passages = [hit.passage for hit in candidates]
        right = sorted(zip(logits(model, query, passages), [p.id for p in passages], strict=True), reverse=True)[:5]
        assert [hit.passage.id for hit in hits] == [name for _, name in right]
        assert [hit.score for hit in hits] == pytest.approx([score for score, _ in right], abs=1e-4)
    assert [len(hits) for hits in found] == [5, 5, 0]


def test_more_than_its_depth_can_be_asked_for(model: str, bm25: Bm25Index) -> None:
    index = RerankedIndex(bm25, model, depth=3, device="cpu")
    hits = index.search(QUERIES[:1], 8)[0]
    assert {hit.passage.id for hit in hits} == {hit.passage.id for hit in bm25.search(QUERIES[:1], 8)[0]}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_equal_passages_come_in_the_order_of_their_ids(model: str) -> None:
    names = ["c", "a", "d", "b"]
    alike = ListIndex([Passage(name, "Warsaw", "Warsaw is a town.") for name in names])
    found = RerankedIndex(alike, model, device="cpu").search(["Warsaw"], 3)
    assert [hit.passage.id for hit in found[0]] == ["a", "b", "c"]


def test_odd_queries_have_defined_results(model: str) -> None:
    index = RerankedIndex(Everything(), model, device="cpu")
    odd = ["", "\x00", "lone \ud800", "word " * 200_000]
    assert [len(hits) for hits in index.search(odd, 2)] == [2] * len(odd)
    assert index.search([], 2) == []
    with pytest.raises(ValueError, match="at least 1"):
        index.search(["a"], 0)


class Everything:
    """Finds all passages for any query."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [[Hit(Passage(str(i), "", f"text {i} \ud800"), 1.0) for i in range(3)] for _ in queries]


def test_what_cannot_rerank_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(IndexUnusable, match="gives 3 scores, wanted 1"):
        RerankedIndex(ListIndex(), str(save_cross_encoder(tmp_path / "three", labels=3)), device="cpu")
    with pytest.raises(IndexUnusable, match="no model nobody/nothing"):
        RerankedIndex(ListIndex(), "nobody/nothing")
    with pytest.raises(ValueError, match="depth=0"):
        RerankedIndex(ListIndex(), model, depth=0)
    with pytest.raises(SearchFailed, match="the server is gone"):
        RerankedIndex(BrokenIndex(), model, device="cpu").search(["a"], 1)
