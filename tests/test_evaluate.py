"""Figures of an evaluation: per dataset, per domain, over several tries, and two runs beside each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from agentgym_ig.answers import METRICS, score
from agentgym_ig.envs import Evaluation, Rules, Suite, compare_evaluations, evaluate, prompts_of
from agentgym_ig.envs.evaluate import episode_figures
from agentgym_ig.envs.results import as_csv, claim, load, markdown, read_verdicts, save, write_verdicts
from agentgym_ig.envs.run_card import model_revision, questions_hash, run_card
from agentgym_ig.errors import CorpusError
from agentgym_ig.policies import Policy, RandomPolicy, ScriptedPolicy, oracle
from agentgym_ig.records import EVALUATION_FILE, EpisodeLog
from agentgym_ig.types import Action, Question, Stop, Trajectory, Turn
from tests.fakes import PASSAGES, QUESTIONS, BrokenIndex, ListIndex

DOMAINS = {"near": "in_domain", "nearer": "in_domain", "far": "out_of_domain"}


def suite(index: object = None, **rules: object) -> Suite:
    asked = {
        name: [replace(own, id=f"{name}/{own.id}", dataset=name) for own in QUESTIONS[: 1 + (name != "far")]]
        for name in DOMAINS
    }
    return Suite("toy", asked, index or ListIndex(), Rules(**rules), DOMAINS)  # type: ignore[arg-type]


def gold(asked: Suite) -> Policy:
    return oracle(prompts_of(asked.env(1)), {passage.id: passage for passage in PASSAGES})


def episode(dataset: str, number: int, answer: str | None, again: int = 0, **own: object) -> Trajectory:
    question = Question(f"{dataset}/{number}", f"Question {number}?", ("right answer",), dataset, ("p1", "p2"))
    turns = (
        Turn(Action("s", (1, 2, 3)), "o", {"format": 0.0, "info_gain": 0.5}, ("a", "b"), ("p1", "p9")),
        Turn(Action("m", (4,)), "o", {"format": -1.0, "info_gain": -0.25}),
        Turn(Action("a", (5, 6)), "", {"format": 0.0, "outcome": 1.0}),
    )
    stop = Stop.MAX_TURNS if answer is None else Stop.ANSWERED
    made = Trajectory(question, (), turns, stop, number, again, answer=answer)
    return replace(made, **own)  # type: ignore[arg-type]


def test_the_figures_of_one_episode() -> None:
    found = episode_figures(episode("near", 0, "the right"))
    assert found["em"] == 0.0
    assert found["f1"] == pytest.approx(2 / 3)  # "right" of "right answer"
    assert {name: found[name] for name in METRICS} == {
        name: score(name, "the right", ("right answer",)) for name in METRICS
    }
    assert (found["recall"], found["searches"], found["turns"], found["tokens"]) == (0.5, 2.0, 3.0, 6.0)
    assert found["format_valid"] == pytest.approx(2 / 3)
    assert found["info_gain"] == 0.125
    assert (found["answered"], found["truncated"], found["failed"]) == (1.0, 0.0, 0.0)
    cut = episode_figures(episode("near", 0, None, turns=()))
    assert (cut["answered"], cut["truncated"], cut["f1"]) == (0.0, 1.0, 0.0)
    assert cut["tokens"] is cut["format_valid"] is cut["info_gain"] is None
    bare = episode("near", 0, None)
    assert episode_figures(replace(bare, question=replace(bare.question, supporting=())))["recall"] is None


def test_shaped_channels_never_enter_the_metrics() -> None:
    plain = episode("near", 0, "wrong")
    paid = replace(
        plain, turns=tuple(replace(turn, rewards={"outcome": 9.0, "info_gain": 9.0}) for turn in plain.turns)
    )
    for metric in METRICS:
        assert episode_figures(plain)[metric] == episode_figures(paid)[metric] == 0.0


def test_means_over_questions_then_datasets_then_domains() -> None:
    answers = {"near": ["right answer", "x", "x", "x"], "nearer": ["right answer"], "far": ["x", "right answer"]}
    episodes = [episode(name, number, own) for name, given in answers.items() for number, own in enumerate(given)]
    found = Evaluation("toy", DOMAINS, episodes).as_dict()  # type: ignore[arg-type]
    assert {name: (own["n"], own["em"]) for name, own in found["datasets"].items()} == {
        "near": (4, 0.25), "nearer": (1, 1.0), "far": (2, 0.5),
    }  # fmt: skip
    assert (found["in_domain"]["em"], found["out_of_domain"]["em"]) == (0.625, 0.5)
    assert found["all"]["em"] == pytest.approx((0.25 + 1 + 0.5) / 3)
    low, high = found["datasets"]["near"]["intervals"]["em"]
    assert low == 0.0
    assert high >= 0.5
    assert found["datasets"]["nearer"]["intervals"]["em"] == [1.0, 1.0]
    assert "pass" not in found


def test_several_tries_are_averaged_per_question() -> None:
    tried = {0: "right answer,x,x,x", 1: "right answer,right answer,right answer,x", 2: "x,x,x,right"}
    episodes = [
        episode("near", number, own, again)
        for number, given in tried.items()
        for again, own in enumerate(given.split(","))
    ]
    found = Evaluation("toy", DOMAINS, episodes).as_dict()  # type: ignore[arg-type]
    assert found["datasets"]["near"]["n"] == 3
    assert found["datasets"]["near"]["em"] == pytest.approx((0.25 + 0.75 + 0) / 3)
    assert found["tries"] == 4
    best = found["pass"]["near"]
    assert best["pass_at"] == pytest.approx({"1": 1 / 3, "2": (0.5 + 1 + 0) / 3, "4": 2 / 3})
    assert best["best_of"] == pytest.approx({"em": 2 / 3, "f1": (1 + 1 + 2 / 3) / 3})


def test_a_judges_verdicts_are_a_column() -> None:
    episodes = [episode("near", number, "x") for number in range(3)]
    found = Evaluation("toy", DOMAINS, episodes, [1.0, 0.0, None]).as_dict()  # type: ignore[arg-type]
    assert found["datasets"]["near"]["judge"] == 0.5
    assert found["datasets"]["near"]["intervals"]["judge"] == [0.0, 1.0]


def test_the_oracle_and_a_broken_index() -> None:
    asked = suite()
    found = evaluate(gold(asked), asked).as_dict()
    assert found["all"]["em"] == found["all"]["f1"] == found["all"]["recall"] == 1.0
    broken = evaluate(gold(asked), suite(BrokenIndex())).as_dict()
    assert {own["failed"] for own in broken["datasets"].values()} == {1.0}
    assert broken["all"]["em"] == 0.0


def test_tries_have_seeds_of_their_own_and_one_group_per_question() -> None:
    asked = suite()
    played = evaluate(RandomPolicy(), asked, seed=3, tries=4)
    assert len(played.episodes) == 20
    assert len({own.seed for own in played.episodes}) == 20
    assert len({(own.question.id, own.group) for own in played.episodes}) == 5
    assert len({own.turns[0].action.text for own in played.episodes}) > 5
    with pytest.raises(ValueError, match="tries=0"):
        evaluate(RandomPolicy(), asked, tries=0)


def test_a_run_against_itself_and_a_better_one() -> None:
    asked = suite()
    right, wrong = evaluate(gold(asked), asked), evaluate(ScriptedPolicy(["<answer>x</answer>"]), asked)
    found = compare_evaluations(right, wrong, "em")
    assert list(found) == ["near", "nearer", "far", "in_domain", "out_of_domain", "all"]
    assert found["all"].difference == 1.0
    assert (found["all"].a_only, found["all"].b_only) == (5, 0)
    assert found["all"].p == pytest.approx(2 / 2**5)
    backwards = replace(right, episodes=right.episodes[::-1])
    assert compare_evaluations(right, backwards, "em")["all"].interval == (0.0, 0.0)


def test_what_cannot_be_compared() -> None:
    asked = suite()
    found = evaluate(gold(asked), asked)
    with pytest.raises(ValueError, match="the other of 'igpo'"):
        compare_evaluations(found, replace(found, suite="igpo"), "em")
    with pytest.raises(ValueError, match="other questions"):
        compare_evaluations(found, replace(found, episodes=found.episodes[:-1]), "em")
    other = [replace(own, question=replace(own.question, text="Another?")) for own in found.episodes]
    with pytest.raises(ValueError, match="other questions"):
        compare_evaluations(found, replace(found, episodes=other), "em")
    with pytest.raises(ValueError, match="figure called 'nope'"):
        compare_evaluations(found, found, "nope")


def card(asked: Suite, **own: object) -> dict[str, object]:
    return run_card(asked, {"name": "oracle", "kind": "script"}, seed=0, **own)  # type: ignore[arg-type]


def test_a_folder_holds_all_that_was_found(tmp_path: Path) -> None:
    asked = suite()
    claim(tmp_path / "run", card(asked))
    result = evaluate(gold(asked), asked, out=tmp_path / "run" / "episodes.jsonl", num_envs=2)
    figures = save(tmp_path / "run", result, card(asked))
    assert json.loads((tmp_path / "run" / EVALUATION_FILE).read_text()) == json.loads(json.dumps(figures))
    again = load(tmp_path / "run")
    assert again.as_dict() == result.as_dict()
    table = (tmp_path / "run" / "table.md").read_text()
    assert table == markdown(figures)
    assert "| near | in-domain | 2 | 100.0 [100.0, 100.0] |" in table
    assert '"corpus_sha256"' not in table
    rows = as_csv(figures).splitlines()
    assert rows[0].startswith("dataset,domain,n,em,f1,cover_em,em_igpo,f1_igpo,recall,searches")
    assert rows[1].startswith("near,in_domain,2,1.0,1.0")
    assert len(rows) == 1 + 3 + 3


def test_a_judges_verdicts_come_back(tmp_path: Path) -> None:
    asked = suite()
    claim(tmp_path / "run", card(asked))
    result = evaluate(gold(asked), asked, out=tmp_path / "run" / "episodes.jsonl", num_envs=5)
    verdicts = [1.0, 0.0, 0.0, 0.0, None]
    write_verdicts(tmp_path / "run", result.episodes, verdicts)
    save(tmp_path / "run", replace(result, verdicts=verdicts), card(asked))
    assert load(tmp_path / "run").as_dict()["datasets"]["near"]["judge"] == 0.5
    assert read_verdicts(tmp_path / "run", result.episodes[::-1]) == verdicts[::-1]
    changed = [replace(result.episodes[0], answer="another"), *result.episodes[1:]]
    assert read_verdicts(tmp_path / "run", changed) == [None, *verdicts[1:]]


def test_what_failed_is_played_again_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "episodes.jsonl"
    broken = suite(BrokenIndex())
    assert {own.stop for own in evaluate(gold(broken), broken, out=file).episodes} == {Stop.SEARCH_FAILED}
    before = file.read_text()
    assert evaluate(gold(suite()), suite(), out=file).as_dict()["all"]["em"] == 1.0
    assert file.read_text() != before
    whole = file.read_text()
    assert evaluate(gold(broken), broken, out=file).as_dict()["all"]["em"] == 1.0, "nothing was left to play"
    assert file.read_text() == whole


def test_two_processes_do_not_write_to_one_file(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / "episodes.jsonl")
    with pytest.raises(FileExistsError, match="another process"):
        evaluate(gold(suite()), suite(), out=tmp_path / "episodes.jsonl")
    log.close()
    assert evaluate(gold(suite()), suite(), out=tmp_path / "episodes.jsonl").as_dict()["all"]["em"] == 1.0


def test_a_command_that_is_no_unicode_does_no_harm(tmp_path: Path) -> None:
    asked = suite()
    odd = card(asked, command=["eval", "--out", "caf\udce9"])
    claim(tmp_path / "run", odd)
    save(tmp_path / "run", evaluate(gold(asked), asked, out=tmp_path / "run" / "episodes.jsonl"), odd)
    assert "caf?" in (tmp_path / "run" / "table.md").read_text()
    assert load(tmp_path / "run").as_dict()["all"]["em"] == 1.0


def test_nothing_is_written_over(tmp_path: Path) -> None:
    asked = suite()
    claim(tmp_path / "run", card(asked))
    with pytest.raises(FileExistsError, match="--resume"):
        claim(tmp_path / "run", card(asked))
    claim(tmp_path / "run", card(asked, command=["other"], judge="later"), resume=True)
    with pytest.raises(ValueError, match="another judge"):
        claim(tmp_path / "run", card(asked, judge="another"), resume=True)
    with pytest.raises(ValueError, match="give one of them"):
        claim(tmp_path / "run", card(asked), resume=True, force=True)
    with pytest.raises(ValueError, match="another rules"):
        claim(tmp_path / "run", card(suite(top_k=1)), resume=True)
    with pytest.raises(ValueError, match="another tries"):
        claim(tmp_path / "run", card(asked, tries=2), resume=True)
    (tmp_path / "run" / "mine.txt").write_text("kept")
    (tmp_path / "run" / "card.json").write_text("{")
    with pytest.raises(CorpusError, match=r"card\.json cannot be read"):
        claim(tmp_path / "run", card(asked), resume=True)
    claim(tmp_path / "run", card(suite(top_k=1)), force=True)
    assert (tmp_path / "run" / "mine.txt").read_text() == "kept"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds no evaluation"):
        claim(tmp_path / "other", card(asked), resume=True)
    with pytest.raises(FileExistsError, match="is a file, wanted a folder"):
        claim(tmp_path / "other" / "thesis.tex", card(asked))


def test_folders_that_are_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="agentgym-ig eval --out"):
        load(tmp_path)
    (tmp_path / EVALUATION_FILE).write_text('{"format": 7}')
    with pytest.raises(CorpusError, match="format 7"):
        load(tmp_path)
    (tmp_path / EVALUATION_FILE).write_text("{")
    with pytest.raises(CorpusError, match="cannot be read"):
        load(tmp_path)


def test_the_card_pins_what_decides_a_figure(tmp_path: Path) -> None:
    asked = suite()
    assert card(asked) == card(suite())
    changed = [replace(own, answers=("other",)) for own in asked.questions["near"]]
    assert questions_hash(changed) != questions_hash(asked.questions["near"])
    rules = card(suite(prompt="igpo"))["rules"]
    assert isinstance(rules, dict)
    assert rules["grammar"] == "tools"
    assert rules["prompt_sha256"] != card(asked)["rules"]["prompt_sha256"]  # type: ignore[index]
    assert model_revision("any/name", "abc123") == {"commit": "abc123"}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = model_revision(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert model_revision(str(tmp_path), None) != before
    assert model_revision(str(tmp_path / "none"), None) == {}
