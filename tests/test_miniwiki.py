"""MiniWiki, machine-checked: what a reader of questions and passages relies on."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import pairwise

import gymnasium
import pytest

from agentgym_ig.answers import normalise_squad
from agentgym_ig.envs import Rules, evaluate, miniwiki_index, miniwiki_suite, prompts_of, suite_datasets
from agentgym_ig.envs.gold import gold_passages
from agentgym_ig.indexes.evaluate import evaluate_retrieval
from agentgym_ig.miniwiki import AREAS, SPLITS, miniwiki_passages, miniwiki_questions
from agentgym_ig.policies import oracle

PASSAGES = {passage.id: passage for passage in miniwiki_passages()}
ROWS = [
    {**json.loads(line), "area": area}
    for area in AREAS
    for line in (files("agentgym_ig.miniwiki") / f"questions_{area}.jsonl").read_text("utf-8").splitlines()
]
BRIDGES = [row for row in ROWS if row["type"] == "bridge"]
COMPARISONS = [row for row in ROWS if row["type"] == "comparison"]


def text(passage: str) -> str:
    return normalise_squad(f"{PASSAGES[passage].title} {PASSAGES[passage].text}")


def names(passage: str) -> set[str]:
    """Words with a capital letter within a sentence, and those of the title."""
    own = PASSAGES[passage]
    return set(re.findall(r"\b[^\W\d_a-z]\w{2,}", f"{own.title} " + re.sub(r"(?:^|(?<=[.!?]\s))\w+", "", own.text)))


def stands_in(answer: str, passage: str) -> bool:
    return f" {normalise_squad(answer)} " in f" {text(passage)} "


def name(row: dict[str, str]) -> str:
    return row["id"]


def test_there_is_enough_of_everything() -> None:
    assert len(PASSAGES) >= 300
    assert len(ROWS) >= 180
    assert {row["type"] for row in ROWS} == {"single", "bridge", "comparison"}
    assert set(suite_datasets("miniwiki")) == set(AREAS)
    for area in AREAS:
        splits = {split: len(miniwiki_questions(area, split)) for split in SPLITS}
        assert splits["test"] >= 15
        assert (splits["train"] == 0) == (area == "arts"), "nothing is trained on the out-of-domain area"
    hops = Counter(row["hops"] for row in ROWS)
    assert min(hops[1], hops[2], hops[3]) >= 30
    assert hops[4] >= 4


def test_ids_titles_texts_and_questions_are_unique() -> None:
    assert len(PASSAGES) == len(miniwiki_passages())
    for values in (
        [own.title.lower() for own in PASSAGES.values()],
        [own.text for own in PASSAGES.values()],
        [row["id"] for row in ROWS],
        [normalise_squad(row["question"]) for row in ROWS],
    ):
        assert [value for value, count in Counter(values).items() if count > 1] == []


@pytest.mark.parametrize("passage", PASSAGES.values(), ids=lambda own: own.id)
def test_a_passage_is_plain_prose_of_the_right_length(passage: object) -> None:
    own = passage.text  # type: ignore[attr-defined]
    assert 50 <= len(own.split()) <= 120
    assert not re.search(r"[<>{}\[\]|]|https?:|\s{2}|^\s|\s$", own)
    assert own.endswith((".", '."', ".'"))


def test_passages_are_densely_linked() -> None:
    titles = {own: re.sub(r"\s*\(.*\)$|,.*$", "", passage.title) for own, passage in PASSAGES.items()}
    linked = [
        sum(title.lower() in passage.text.lower() for other, title in titles.items() if other != own)
        for own, passage in PASSAGES.items()
    ]
    assert sum(count >= 2 for count in linked) >= 0.97 * len(linked)
    assert min(linked) >= 1, [own for own, count in zip(PASSAGES, linked, strict=True) if not count]


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_a_question_can_be_answered_from_its_passages(row: dict[str, list[str]]) -> None:
    assert len(row["supporting"]) == len(set(row["supporting"])) > 0
    assert set(row["supporting"]) <= set(PASSAGES)
    assert len(row["answers"]) == len({own.lower() for own in row["answers"]})
    if row["answers"][0] not in ("yes", "no"):
        last = row["supporting"] if row["type"] == "comparison" else row["supporting"][-1:]  # type: ignore[comparison-overlap]
        assert any(stands_in(row["answers"][0], passage) for passage in last)


@pytest.mark.parametrize("row", [row for row in ROWS if row["type"] != "comparison"], ids=name)
def test_a_question_does_not_hold_its_answer(row: dict[str, list[str]]) -> None:
    asked = f" {normalise_squad(str(row['question']))} "
    assert not any(f" {normalise_squad(answer)} " in asked for answer in row["answers"])


@pytest.mark.parametrize("row", BRIDGES, ids=name)
def test_a_bridge_needs_its_last_passage(row: dict[str, list[str]]) -> None:
    assert len(row["supporting"]) >= 2
    for passage in row["supporting"][:-1]:
        assert not any(stands_in(answer, passage) for answer in row["answers"])
    for before, after in pairwise(row["supporting"]):
        assert names(before) & names(after), f"nothing leads from {before} to {after}"
    last = re.sub(r"\s*\(.*\)$|,.*$", "", PASSAGES[row["supporting"][-1]].title)
    assert last.lower() not in str(row["question"]).lower(), "the question names the last passage"


@pytest.mark.parametrize("row", COMPARISONS, ids=name)
def test_no_passage_gives_both_sides_of_a_comparison_away(row: dict[str, list[str]]) -> None:
    first, second = (PASSAGES[own] for own in row["supporting"])
    years = [set(re.findall(r"\b\d{3,4}\b|\b\d[\d,]+\b", own.text)) for own in (first, second)]
    for own, other, theirs in ((first, second, years[1] - years[0]), (second, first, years[0] - years[1])):
        naming = [each for each in re.split(r"(?<=[.!?])\s+", own.text) if other.title.lower() in each.lower()]
        assert not any(number in each for each in naming for number in theirs)


def test_bm25_finds_what_the_docs_say() -> None:
    recall = {}
    for area in AREAS:
        asked = [question for split in SPLITS for question in miniwiki_questions(area, split)]
        recall[area] = evaluate_retrieval(miniwiki_index(), asked, [5])["recall"]["5"]
    assert min(recall.values()) >= 0.6, recall
    assert max(recall.values()) < 1.0, "questions that one search answers would test no agent"


def test_the_suite_is_played_by_the_oracle() -> None:
    suite = miniwiki_suite(limit=5, rules=Rules(max_turns=6))
    env = suite.env(4)
    found = evaluate(oracle(prompts_of(env), gold_passages(miniwiki_index(), env.questions.values())), suite)
    assert found.domains()["in_domain"]["em"] == found.domains()["out_of_domain"]["em"] == 1.0
    assert found.table()["arts"]["recall"] > 0.99


def test_the_environment_needs_nothing() -> None:
    env = gymnasium.make("agentgym_ig/MiniWiki-v0")
    prompt, _ = env.reset(seed=1)
    assert "Question:" in prompt
    reply = env.step("<search>Marie Curie</search>")[0]
    assert "<information>" in reply
    vector = gymnasium.make_vec("agentgym_ig/MiniWiki-v0", num_envs=2, vectorization_mode="vector_entry_point")
    assert len(vector.reset(seed=1)[0]) == 2


def test_areas_and_splits_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="areas are science, history, places, arts"):
        miniwiki_questions("sport")
    assert "arts" not in miniwiki_suite("train").questions
