"""TinyWiki: what a world promises."""

import numpy as np
import pytest

from agentgym_ig.envs import tinywiki_index, tinywiki_questions
from agentgym_ig.envs.tinywiki import DATASETS
from agentgym_ig.tinywiki import HELD_OUT, SCHEMA, World, chains
from agentgym_ig.tinywiki.names import FIRST_WORDS, LAST_WORDS, POOLS, name_pool


def test_equal_seeds_give_equal_worlds_and_others_do_not() -> None:
    assert World(3).passages == World(3).passages
    assert World(3).passages != World(4).passages
    questions = [list(tinywiki_questions(World(3, "test"), "hop3", 40)) for _ in range(2)]
    assert questions[0] == questions[1]


def test_pools_share_every_word_and_no_name() -> None:
    pools = {pool: set(name_pool(pool, 300)) for pool in POOLS}
    assert [len(pools[pool]) for pool in POOLS] == [800, 400, 400]
    assert not pools["train"] & pools["test"]
    assert not pools["train"] & pools["validation"]
    assert not pools["validation"] & pools["test"]
    for pool in pools.values():
        assert {name.split()[0] for name in pool} == set(FIRST_WORDS[:40])
        assert {name.split()[1] for name in pool} == set(LAST_WORDS[:40])


def test_words_are_many_and_different() -> None:
    assert len(set(FIRST_WORDS)) == len(set(LAST_WORDS)) == 400
    assert all(word.isalpha() and word.istitle() for word in FIRST_WORDS + LAST_WORDS)


def test_articles_are_english_with_every_value_behind_its_relation() -> None:
    world = World(5)
    for passage in world.passages:
        kind, facts = world.kind_of[passage.title], world.facts[passage.title]
        assert passage.text.startswith(f"{passage.title} is a {kind}, ")
        assert passage.text.endswith(".")
        assert set(facts) == set(SCHEMA[kind])
        assert all(f" {relation} {value}" in passage.text for relation, value in facts.items())
        assert passage.title not in facts.values()


def test_held_out_pairs_stand_only_in_out_of_domain_questions() -> None:
    assert [len(chains(hops, held_out=False)) for hops in (1, 2, 3, 4)] == [10, 16, 27, 43]
    assert [len(chains(hops, held_out=True)) for hops in (1, 2, 3)] == [0, 7, 24]
    world = World(1, "test")
    for dataset, (hops, held_out) in DATASETS.items():
        for question, path in tinywiki_questions(world, dataset, 30).items():
            pairs = list(zip(path.relations[1:], path.relations, strict=False))
            assert any(pair in HELD_OUT for pair in pairs) == held_out
            assert len(path.relations) == hops == len(question.supporting)


def test_following_the_articles_leads_to_the_answer() -> None:
    world = World(8, "validation")
    by_id = {passage.id: passage for passage in world.passages}
    for question, path in tinywiki_questions(world, "hop4", 50).items():
        assert len(set(path.entities)) == 5
        for passage_id, relation, value in zip(question.supporting, path.relations, path.entities[1:], strict=True):
            assert f" {relation} {value}" in by_id[passage_id].text
        assert question.answers == (f"{path.relations[-1]} {path.entities[-1]}", path.entities[-1])
        assert path.entities[-1] not in question.text


def test_retrieval_can_find_every_article_by_any_label_and_its_name() -> None:
    world = World(1002, "test")
    queries = [f"{label} {passage.title}" for passage in world.passages for label in ("director", "film", "mayor")]
    hits = tinywiki_index(world).search(queries, 1)
    right = [hit[0].passage.title == query.split(" ", 1)[1] for hit, query in zip(hits, queries, strict=True)]
    assert np.mean(right) == 1.0


def test_worlds_come_in_any_size_that_the_names_allow() -> None:
    assert len(World(1, "test", scale=0.2).passages) == 60
    large = World(1, "test", scale=40)
    assert len(large.passages) == 12_000
    assert len({passage.title for passage in large.passages}) == 12_000
    with pytest.raises(ValueError, match="smaller scale"):
        World(1, "test", scale=1000)
    with pytest.raises(ValueError, match="too few entities"):
        World(1, scale=0.01)
    with pytest.raises(ValueError, match="ask for fewer"):
        tinywiki_questions(World(1, scale=0.2), "hop1", 5000)
    with pytest.raises(ValueError, match="hop1, hop2"):
        tinywiki_questions(World(1), "hop9", 5)
