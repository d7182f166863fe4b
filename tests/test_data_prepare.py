"""Preparing question sets: streamed, gone on with, divided by content, and nothing written over."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig import CorpusError
from agentgym_ig.data import read_manifest, read_questions
from agentgym_ig.data.manifest import manifest_path
from agentgym_ig.data.prepare import Settings, prepare_questions
from agentgym_ig.data.seen import Digests
from agentgym_ig.data.sources import Wanted, question_source
from agentgym_ig.records import write_json
from tests.conftest import Command
from tests.data_files import Rows, as_lines, flashrag, numbered, write


def asked(path: Path) -> list[str]:
    return [question.text for question in read_questions(path)]


def test_a_folder_of_flashrag_becomes_question_files(tmp_path: Path, command: Command) -> None:
    (tmp_path / "hub" / "nq").mkdir(parents=True)
    (tmp_path / "hub" / "hotpotqa").mkdir()
    as_lines(tmp_path / "hub" / "nq" / "train.jsonl", numbered(9))
    as_lines(tmp_path / "hub" / "nq" / "test.jsonl", numbered(4))
    as_lines(tmp_path / "hub" / "hotpotqa" / "dev.jsonl", flashrag())
    out = tmp_path / "questions"
    code, printed = command("data", "questions", "nq", "hotpotqa", "--source", tmp_path / "hub", "--out", out)
    assert code == 0, printed
    assert "4 questions of 4 rows" in printed
    assert [question.id for question in read_questions(out / "nq.jsonl")] == [f"nq_test_{i}" for i in range(4)]
    assert read_questions(out / "hotpotqa.jsonl")[1].dataset == "hotpotqa"
    found = read_manifest(out / "nq.jsonl")
    assert (found["dataset"], found["split"], found["layout"]) == ("nq", "test", "flashrag")
    assert found["rows"] == {"read": 4, "dropped": {}, "kept": 4, "written": 4}
    assert found["licence"] == "CC BY-SA 3.0"
    assert len(found["rows_sha256"]) == len(found["source_sha256"][0]) == 64
    assert command("data", "check", out / "nq.jsonl")[0] == 0
    (out / "nq.jsonl").write_text((out / "nq.jsonl").read_text().replace("number 2", "number 22"))
    code, printed = command("data", "check", out / "nq.jsonl", out / "hotpotqa.jsonl")
    assert code == 1
    assert "nq.jsonl: changed" in printed
    assert "hotpotqa.jsonl: as it was prepared" in printed
    code, printed = command("data", "questions", "nq", "--split", "train", "--source", tmp_path / "hub", "--out", out)
    assert code == 1
    assert "is there already; --force writes over it" in printed
    assert (
        command("data", "questions", "nq", "--split", "train", "--source", tmp_path / "hub", "--out", out, "--force")[0]
        == 0
    )
    assert len(read_questions(out / "nq.jsonl")) == 9


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path, command: Command) -> None:
    """A local folder stands in for the hub's: `datasets` loads both in the same way."""
    (tmp_path / "repo" / "nq").mkdir(parents=True)
    for split, count in (("train", 5), ("validation", 3)):
        as_lines(tmp_path / "repo" / "nq" / f"{split}.jsonl", numbered(count))
    files = "".join(f"  - split: {split}\n    path: nq/{split}.jsonl\n" for split in ("train", "validation"))
    (tmp_path / "repo" / "README.md").write_text(f"---\nconfigs:\n- config_name: nq\n  data_files:\n{files}---\n")
    named = ("data", "questions", "nq", "--source", f"hf:{tmp_path / 'repo'}", "--config", "nq")
    code, printed = command(*named, "--out", tmp_path / "nq.jsonl")
    assert code == 0, printed
    assert len(read_questions(tmp_path / "nq.jsonl")) == 3
    assert read_manifest(tmp_path / "nq.jsonl")["split"] == "dev"
    assert command(*named, "--split", "train", "--out", tmp_path / "train.jsonl")[0] == 0
    assert len(read_questions(tmp_path / "train.jsonl")) == 5
    code, printed = command(*named, "--split", "test", "--out", tmp_path / "x.jsonl")
    assert code == 1
    assert "has no split 'test'; choose train, dev" in printed.replace("dev, train", "train, dev")
    source = question_source("nq", Wanted(source=f"hf:{tmp_path / 'repo'}", config="nq", split="train"))
    assert [row["id"] for _, row in source.rows(3)] == ["test_3", "test_4"]
    with pytest.raises(CorpusError, match="Available"):
        question_source("nq", Wanted(source=f"hf:{tmp_path / 'repo'}", config="nqq"))


def test_a_hub_out_of_reach_says_how_to_use_files() -> None:
    """In a process of its own, which begins with the hub switched off."""
    command = [
        sys.executable,
        "-m",
        "agentgym_ig.commands.main",
        "data",
        "questions",
        "nq",
        "--out",
        "/nowhere/x.jsonl",
    ]
    ended = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "cannot reach 'RUC-NLPIR/FlashRAG_datasets' on the hub" in ended.stdout
    assert "--source FOLDER" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def test_duplicates_go_and_other_answers_stay(tmp_path: Path) -> None:
    rows = numbered(2)
    rows += [rows[0] | {"id": "test_8", "question": "what is NUMBER 0 ?", "golden_answers": ["Answer 0."]}]
    rows += [rows[1] | {"golden_answers": ["another"]}]
    as_lines(tmp_path / "nq.jsonl", rows)
    source = question_source("nq", Wanted(source=str(tmp_path / "nq.jsonl")))
    prepare_questions("nq", source, tmp_path / "out.jsonl", Settings())
    made = read_questions(tmp_path / "out.jsonl")
    assert [question.answers for question in made] == [("answer 0",), ("answer 1",), ("another",)]
    assert made[2].id.startswith("nq_test_1_")  # the id was taken
    assert read_manifest(tmp_path / "out.jsonl")["rows"]["dropped"] == {"duplicate": 1}
    prepare_questions("nq", source, tmp_path / "all.jsonl", Settings(keep_duplicates=True))
    made = read_questions(tmp_path / "all.jsonl")
    assert len({question.id for question in made}) == 4


@given(st.lists(st.integers(0, 5000), max_size=4000))
@settings(max_examples=20, deadline=None)
def test_the_set_of_digests_is_a_set(drawn: list[int]) -> None:
    digests, plain = Digests(), set()
    for number in [*drawn, *range(0, 3000, 7)]:
        digest = number.to_bytes(8, "little") + bytes(8) if number % 2 else bytes(8) + number.to_bytes(8, "big")
        assert (digest in digests) == (digest in plain)
        assert digests.add(digest) == (digest not in plain)
        plain.add(digest)
    assert len(digests) == len(plain)


def test_a_file_of_several_datasets(tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, "search_r1.parquet")
    assert command("data", "questions", "nq", "--source", path, "--out", tmp_path / "nq.jsonl")[0] == 0
    assert read_manifest(tmp_path / "nq.jsonl")["rows"]["dropped"] == {"other_dataset": 1}
    assert command("data", "questions", "any", "--source", path, "--out", tmp_path / "any.jsonl")[0] == 0
    assert [question.dataset for question in read_questions(tmp_path / "any.jsonl")] == ["nq", "hotpotqa"]
    code, printed = command("data", "questions", "popqa", "--source", path, "--out", tmp_path / "popqa.jsonl")
    assert code == 1
    assert "its rows are of hotpotqa, nq" in printed
    assert sorted(own.name for own in tmp_path.iterdir() if "popqa" in own.name) == []
    code, printed = command(
        "data", "questions", "any", "--source", path, "--split", "train", "--out", tmp_path / "train.jsonl"
    )
    assert code == 1
    assert "other_split" in printed


def test_unreliable_answers_are_errors_or_left_out(tmp_path: Path) -> None:
    rows = [*numbered(3), {"id": "a", "question": "x", "golden_answers": [" "]}, *numbered(1, 5)]
    rows[1]["golden_answers"] = ["word " * 13]
    as_lines(tmp_path / "nq.jsonl", rows)
    source = question_source("nq", Wanted(source=str(tmp_path / "nq.jsonl")))
    with pytest.raises(CorpusError, match=r"nq\.jsonl:4: question 'a' has no answer; --drop-unreliable"):
        prepare_questions("nq", source, tmp_path / "out.jsonl", Settings())
    prepare_questions("nq", source, tmp_path / "out.jsonl", Settings(drop_unreliable=True))
    assert asked(tmp_path / "out.jsonl") == [f"What is number {i}?" for i in (0, 2, 5)]
    assert read_manifest(tmp_path / "out.jsonl")["rows"] == {
        "read": 5,
        "dropped": {"long_answer": 1, "no_answer": 1},
        "kept": 3,
        "written": 3,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": "1", "question": "x", "golden_answers": [1823]}],
            r"nq\.jsonl:1: golden_answers holds 1823, which is no",
        ),
        ([*numbered(1), {"id": "1", "question": "x"}], r"nq\.jsonl:2: field golden_answers of the flashrag layout"),
        ([{"id": "1", "query": "x"}], r"nq\.jsonl:1: no known layout: found id, query"),
        ([{"id": "1", "question": 5, "golden_answers": ["x"]}], r"nq\.jsonl:1: question is 5, wanted text"),
        ([{"id": "1", "question": " ", "golden_answers": ["x"]}], r"nq\.jsonl:1: question '1' has no text"),
        ([], r"no question of nq is left: 0 rows read"),
    ],
)
def test_bad_rows_are_named_and_leave_nothing(tmp_path: Path, rows: Rows, message: str) -> None:
    as_lines(tmp_path / "nq.jsonl", rows)
    source = question_source("nq", Wanted(source=str(tmp_path / "nq.jsonl")))
    with pytest.raises(CorpusError, match=message):
        prepare_questions("nq", source, tmp_path / "out" / "nq.jsonl", Settings())
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nqq"], "unknown dataset 'nqq'; choose nq, triviaqa"),
        (
            ["hotpotqa", "--split", "test"],
            "hotpotqa in RUC-NLPIR/FlashRAG_datasets has no split 'test'; choose train, dev",
        ),
        (["any"], "give --source"),
        (["nq", "--release", "x"], "nq has no release 'x'; choose flashrag, original"),
        (["nq", "--source", "none.jsonl"], "no file none.jsonl"),
        (["nq", "--source", "."], "holds no file of nq"),
        (["nq", "--part", "train=0.9,dev=0.2"], "add up to at most 1"),
        (["nq", "--part", "train"], "give names and shares, such as train=0.9,dev=0.1"),
        (["nq", "--part", "../x=1"], "is no name for a folder"),
        (["nq", "--subset", "0"], "a subset of 0 questions is none"),
    ],
)
def test_wrong_arguments_are_told(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, printed = command("data", "questions", *arguments, "--out", "out")
    assert code == 1
    assert message in printed.replace("\n", " ")


def test_parts_and_subsets_go_by_content_alone(tmp_path: Path, command: Command) -> None:
    rows = numbered(400)
    as_lines(tmp_path / "all.jsonl", rows)
    as_lines(tmp_path / "some.jsonl", rows[::-1][:200])
    made: dict[str, dict[str, set[str]]] = {}
    for name in ("all", "some"):
        code, printed = command(
            "data", "questions", "nq", "--source", tmp_path / f"{name}.jsonl", "--out", tmp_path / name,
            "--part", "train=0.7,dev=0.2,test=0.1", "--seed", 3,
        )  # fmt: skip
        assert code == 0, printed
        made[name] = {part: set(asked(tmp_path / name / part / "nq.jsonl")) for part in ("train", "dev", "test")}
    sizes = [len(own) for own in made["all"].values()]
    assert sum(sizes) == 400
    assert abs(sizes[0] - 280) < 40
    assert abs(sizes[1] - 80) < 35
    for part, own in made["some"].items():
        assert own == made["all"][part] & {row["question"] for row in rows[200:]}
    manifest = read_manifest(tmp_path / "all" / "dev" / "nq.jsonl")
    assert manifest["part"] == "dev"
    assert (manifest["rows"]["kept"], manifest["rows"]["written"]) == (400, sizes[1])


def in_folder(path: Path, count: int | None, seed: int = 0) -> list[str]:
    source = question_source("nq", Wanted(source=str(path)))
    with tempfile.TemporaryDirectory() as folder:
        prepare_questions("nq", source, Path(folder) / "out.jsonl", Settings(subset=count, seed=seed))
        return asked(Path(folder) / "out.jsonl")


def test_a_subset_holds_the_smaller_ones_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = numbered(50)
    as_lines(tmp_path / "nq.jsonl", rows)
    as_lines(tmp_path / "back.jsonl", rows[::-1])
    subsets = [in_folder(tmp_path / "nq.jsonl", count) for count in (5, 20, 50)]
    assert [len(own) for own in subsets] == [5, 20, 50]
    assert set(subsets[0]) < set(subsets[1]) < set(subsets[2])
    assert subsets[1] == [question for question in subsets[2] if question in subsets[1]]
    assert in_folder(tmp_path / "back.jsonl", 20) == subsets[1][::-1]
    assert set(in_folder(tmp_path / "nq.jsonl", 20, seed=1)) != set(subsets[1])
    assert len(in_folder(tmp_path / "nq.jsonl", 99)) == 50


def test_manifests_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="agentgym-ig data questions"):
        read_manifest(tmp_path / "nq.jsonl")
    manifest_path(tmp_path / "nq.jsonl").write_text("{}")
    with pytest.raises(CorpusError, match="prepare the file again"):
        read_manifest(tmp_path / "nq.jsonl")
    write_json(manifest_path(tmp_path / "nq.jsonl"), {"format": 99})
    with pytest.raises(CorpusError, match="format 99, wanted 1"):
        read_manifest(tmp_path / "nq.jsonl.manifest.json")


def test_the_list_names_every_dataset(command: Command) -> None:
    code, printed = command("data", "list")
    assert code == 0
    for name in (
        "nq",
        "triviaqa",
        "popqa",
        "hotpotqa",
        "2wikimultihopqa",
        "musique",
        "bamboogle",
        "wiki18",
        "mediawiki",
    ):
        assert name in printed
