"""Suites: those that exist, and those that users describe."""

import json
from pathlib import Path

import pytest

from agentgym_ig.commands.parts import open_training
from agentgym_ig.envs import SUITES, Rules, Suite, read_suite, suite_datasets
from agentgym_ig.errors import CorpusError
from agentgym_ig.miniwiki import miniwiki_questions
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.recipes import recipe
from tests.conftest import Command
from tests.fakes import QUESTIONS, ListIndex

YAML = """
in_domain: [hotpotqa]
out_of_domain: musique
questions: questions
index: [index]
rules: {top_k: 2, max_turns: 4}
"""


def test_the_papers_suites_share_no_dataset_between_domains() -> None:
    for name in SUITES:
        assert set(suite_datasets(name).values()) == {"in_domain", "out_of_domain"}
    assert [own for own, domain in SUITES["igpo"].items() if domain == "out_of_domain"] == [
        "musique", "bamboogle", "popqa",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="igpo, miniwiki, search-r1, tinywiki"):
        suite_datasets("nope")


def test_a_suite_from_yaml_is_played(command: Command, toy: Path) -> None:
    assert command("index", "build", "--corpus", toy / "corpus.jsonl", "--out", toy / "index")[0] == 0
    (toy / "mine.yaml").write_text(YAML)
    said = read_suite(toy / "mine.yaml")
    assert (said.name, dict(said.domains)) == ("mine", {"hotpotqa": "in_domain", "musique": "out_of_domain"})
    assert said.questions == toy / "questions"
    assert said.index == (str(toy / "index"),)
    code, printed = command("eval", "--suite", toy / "mine.yaml", "--policy", "oracle", "--out", toy / "out")
    assert code == 0, printed
    assert "oracle on mine" in printed
    card = json.loads((toy / "out" / "card.json").read_text())
    assert card["rules"]["top_k"] == 2
    assert card["index"]["places"] == [str(toy / "index")]
    (toy / "more.yaml").write_text(YAML.replace("[hotpotqa]", "[hotpotqa, films]"))
    code, printed = command("eval", "--suite", toy / "more.yaml", "--policy", "oracle")
    assert code == 1
    assert "holds no films.jsonl" in printed
    arguments = ["train", "--suite", toy / "mine.yaml", "--out", toy / "run", "--steps", 1, "--questions-per-step", 1]
    arguments += ["--group-size", 2, "--max-new-tokens", 4, "--recipe", "grpo", "--kl", 0]
    code, printed = command(*arguments)
    assert code == 0, printed
    assert "None" not in printed


def test_training_on_miniwiki_takes_its_training_questions(command: Command, tmp_path: Path) -> None:
    arguments = ["train", "--suite", "miniwiki", "--out", tmp_path / "run", "--steps", 1, "--questions-per-step", 1]
    code, printed = command(*arguments, "--group-size", 2, "--max-new-tokens", 4, "--recipe", "grpo", "--kl", 0)
    assert code == 0, printed
    env = open_training("miniwiki", None, None, {}, TrainConfig(), recipe=recipe("grpo"), seed=0)
    assert {own.dataset for own in env.questions.values()} == {"science", "history", "places"}
    assert set(env.questions) == {
        own.id for area in ("science", "history", "places") for own in miniwiki_questions(area, "train")
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "found a list"),
        ("in_domain: [a]\nsplits: 3", "unknown field splits"),
        ("name: x", "names no dataset"),
        ("in_domain: [a]\nout_of_domain: [a]", "in-domain and out-of-domain"),
        ("in_domain: 3", "in_domain is 3"),
        ("in_domain: [two words]", "is one word"),
        ("in_domain: [a]\nrules: {top_k: 0}", "top_k=0"),
        ("in_domain: [a]\nrules: {tok_k: 1}", "tok_k"),
        ("in_domain: [a", "is no suite"),
        ("in_domain: [a]\nrules: [1]", "wanted a mapping"),
        ("in_domain: [a]\nquestions: [qa]", "questions is ['qa'], wanted a text"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(CorpusError, match=r"s\.yaml is no suite") as caught:
        read_suite(tmp_path / "s.yaml")
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give a YAML file, or one of igpo"):
        read_suite(tmp_path / "none.yaml")


def test_questions_of_another_dataset_are_refused() -> None:
    with pytest.raises(ValueError, match="stands under 'musique' and says that it is of 'toy'"):
        Suite("igpo", {"musique": QUESTIONS}, ListIndex(), Rules())
    with pytest.raises(ValueError, match="found toy"):
        Suite("igpo", {"toy": QUESTIONS}, ListIndex(), Rules())
    with pytest.raises(ValueError, match="found no questions"):
        Suite("igpo", {}, ListIndex(), Rules())
