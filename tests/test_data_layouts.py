"""Every layout in which question sets are published, in files of our own writing and in samples of the real ones."""

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentgym_ig import CorpusError
from agentgym_ig.data.layouts import LAYOUTS, answers_of, check_fields, recognise
from agentgym_ig.data.passages import undouble, unquote
from agentgym_ig.data.reading import file_rows
from agentgym_ig.data.releases import DATASETS, SEVEN, choose_split, find_release
from agentgym_ig.data.reliability import REASONS, unreliable
from tests import data_files
from tests.data_files import FILES, SPRING, TOWER, write

SAMPLES = Path(os.environ.get("AGENTGYM_IG_DATA", Path(__file__).parent.parent.parent / "shared" / "data")) / "samples"


def read(layout: str, row: dict[str, Any]) -> dict[str, Any]:
    return LAYOUTS[layout].read(row).as_row("mine", "dev")


def in_file(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for _, row in file_rows(write(folder, name))]


@pytest.mark.parametrize("name", FILES)
def test_a_layout_is_told_by_its_fields_in_the_file_it_is_published_in(tmp_path: Path, name: str) -> None:
    rows = in_file(tmp_path, name)
    assert len(rows) == len(FILES[name][0]())
    for row in rows:
        assert recognise(row) == FILES[name][1]
        made = read(recognise(row), row)
        assert made["question"] in (SPRING[0], TOWER[0])
        assert made["answers"][0] in ("Vell Spring", "Tom Reed", "1823")
        assert len(set(made["answers"])) == len(made["answers"])


def test_evidence_and_hops_of_multi_hop_sets() -> None:
    for layout, rows in (("hotpotqa", data_files.hotpotqa()), ("hotpotqa", data_files.hotpotqa_hub())):
        made = read(layout, rows[0])
        assert made == {
            "id": "5ab0",
            "question": TOWER[0],
            "answers": ["Tom Reed"],
            "dataset": "hotpotqa",
            "split": "dev",
            "supporting_titles": ["Ada Brook", "Norwick"],
            "hops": 2,
            "type": "bridge",
        }
    for rows in (data_files.two_wiki(), data_files.two_wiki_hub()):
        found = LAYOUTS["2wikimultihopqa"].read(rows[0])
        assert found.evidence[1] == "Norwick Norwick is a town.  Its tower was built by Tom Reed."
        made = found.as_row("mine", None)
        assert (made["dataset"], made["hops"]) == ("2wikimultihopqa", 4)
        assert "split" not in made
    made = read("musique", data_files.musique()[0])
    assert (made["answers"], made["hops"], made["type"]) == (["Tom Reed", "T. Reed"], 3, "3hop1")
    assert made["supporting_titles"] == ["Ada Brook", "Norwick"]


def test_a_context_without_a_gold_paragraph_gives_titles_and_no_evidence() -> None:
    row = data_files.hotpotqa()[0]
    row["context"] = row["context"][:2]
    found = LAYOUTS["hotpotqa"].read(row)
    assert found.supporting_titles == ["Ada Brook", "Norwick"]
    assert found.evidence == []


def test_ids_that_are_mere_numbers_carry_the_dataset() -> None:
    assert [read("search_r1", row)["id"] for row in data_files.search_r1()] == ["nq_test_0", "hotpotqa_test_1"]
    assert [read("verl", row)["id"] for row in data_files.verl()] == ["nq_0", "hotpotqa_1"]
    assert read("popqa", data_files.popqa()[0])["id"] == "popqa_77"
    assert read("flashrag", data_files.flashrag()[0])["id"] == "mine_test_0"


def test_rows_for_reinforcement_learning_name_their_dataset_as_we_do() -> None:
    rows = [read("verl", row) for row in data_files.deepresearcher()]
    assert [row["dataset"] for row in rows] == ["triviaqa", "bamboogle"]
    assert all(row["answers"] == ["Vell Spring", "Vell"] and row["split"] == "dev" for row in rows)
    assert [read("verl", row)["question"] for row in data_files.verl()] == [SPRING[0], TOWER[0]]


def test_the_inside_of_flashrags_metadata_is_never_relied_on() -> None:
    row = data_files.flashrag()[1]
    assert read("flashrag", row)["supporting_titles"] == ["Ada Brook", "Norwick"]
    for odd in (
        {"supporting_facts": 3},
        {"supporting_facts": {"title": ["x"]}},
        "text",
        None,
        {"supporting_facts": "x"},
    ):
        made = read("flashrag", row | {"metadata": odd})
        assert "supporting_titles" not in made


def test_arrays_as_pandas_gives_them() -> None:
    assert answers_of(np.array(["a", "b", "a"], dtype=object), "golden_answers") == ["a", "b"]


@pytest.mark.parametrize("wrong", [[1823], 1823, [1.5], [True], [None], [["a"]], {"text": "a"}, [float("nan")]])
def test_answers_that_are_no_text_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"golden_answers (holds|is)"):
        answers_of(wrong, "golden_answers")


def test_a_field_that_is_gone_is_named() -> None:
    with pytest.raises(ValueError, match=r"problem comes nearest, and of it answer is missing"):
        recognise({"problem": "x", "solution": ["y"]})
    with pytest.raises(ValueError, match=r"golden_answers of the flashrag layout is missing; found gold, question"):
        check_fields("flashrag", {"question": "x", "gold": ["y"]})
    with pytest.raises(ValueError, match="found no field"):
        recognise({})
    row = data_files.verl()[0]
    del row["reward_model"]["ground_truth"]
    with pytest.raises(KeyError, match=r"reward_model\.ground_truth"):
        LAYOUTS["verl"].read(row)
    with pytest.raises(ValueError, match="possible_answers is no JSON"):
        LAYOUTS["popqa"].read(data_files.popqa()[0] | {"possible_answers": "[Vell"})


def test_csv_quoting_is_undone_and_other_quotes_stay() -> None:
    assert unquote('"Who wrote ""Emma""?"') == 'Who wrote "Emma"?'
    assert unquote('"Who?"') == "Who?"
    for own in ('"Emma" is by whom, as is "Persuasion"', 'Who wrote "Emma"?', '"', "", 'who said ""'):
        assert unquote(own) == own
    assert undouble('a ""b"" c') == 'a "b" c'
    for own in ('a ""b"" "c"', 'its sequel "", and', 'the films "" and (""), ""', "plain"):
        assert undouble(own) == own
    assert undouble('its sequel """", a ""b') == 'its sequel "", a "b'


@pytest.mark.parametrize(
    ("layout", "change", "reason"),
    [
        ("hotpotqa", {}, None),
        ("hotpotqa", {"answer": "  "}, "no_answer"),
        ("hotpotqa", {"answer": "the ..."}, "no_answer"),
        ("hotpotqa", {"answer": "Una Grey"}, "not_in_evidence"),
        ("hotpotqa", {"answer": "om Ree"}, "not_in_evidence"),  # whole words
        ("hotpotqa", {"answer": "The TOM reed"}, None),
        ("hotpotqa", {"answer": "Yes"}, None),
        ("hotpotqa", {"answer": "Una Grey", "context": []}, None),
        ("hotpotqa", {"answer": "b " * 13}, "long_answer"),
        ("musique", {"answerable": False}, "unanswerable"),
        ("musique", {"answer": "Una Grey", "answer_aliases": []}, "not_in_evidence"),
    ],
)
def test_what_counts_as_unreliable(layout: str, change: dict[str, Any], reason: str | None) -> None:
    rows = {"hotpotqa": data_files.hotpotqa, "musique": data_files.musique}[layout]()
    assert unreliable(LAYOUTS[layout].read(rows[0] | change)) == reason
    assert reason is None or reason in REASONS


def test_the_split_rule_and_the_table_of_releases() -> None:
    assert [choose_split(None, find_release(name, None).splits, name) for name in SEVEN] == [
        "test", "test", "test", "dev", "dev", "dev", "test"
    ]  # fmt: skip
    for name, dataset in DATASETS.items():
        for own in dataset.releases.values():
            assert own.layout in LAYOUTS
            assert set(own.rows) <= set(own.splits), name
    with pytest.raises(ValueError, match=r"choose train, dev$"):
        choose_split("test", find_release("hotpotqa", None).splits, "hotpotqa")
    with pytest.raises(ValueError, match="choose flashrag, original"):
        find_release("nq", "newest")
    with pytest.raises(ValueError, match="choose nq, triviaqa"):
        find_release("nqq", None)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_files_are_the_same_packed(tmp_path: Path, ending: str) -> None:
    for name in ("flashrag.jsonl", "2wiki_dev.json", "unfiltered-web-dev.json", "popQA.tsv"):
        path = write(tmp_path, name)
        plain = [row for _, row in file_rows(path)]
        packed = path.with_name(f"{path.name}.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert [row for _, row in file_rows(packed)] == plain


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"question": "x"}, 3]', r"a\.json: row 2: found a JSON int"),
        ("a.json", '[{"question": "x"}, {"question', r"a\.json: row 2: "),
        ("a.json", '{\n"Version": 1}', r"a\.json holds no row"),
        ("a.json", "", r"no row"),
        ("a.jsonl", '{"a": 1}\n[2]', r"a\.jsonl:2: found a JSON list"),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"a\.tsv:2 or the row after it: found 3 columns, wanted the 2"),
        ("a.csv", 'a,b\n"x,1\n', r"a\.csv:"),
        ("a.parquet", "PAR", r"a\.parquet: row 1"),
        ("a.json.gz", "plain", r"a\.json\.gz"),
        ("a.txt", "x", r"a\.txt: cannot tell what it holds; give a file that ends in one of \.parquet, \.jsonl"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    if message == "no row":
        assert list(file_rows(tmp_path / name)) == []
        return
    with pytest.raises(ValueError, match=message) as raised:
        list(file_rows(tmp_path / name))
    assert isinstance(raised.value, CorpusError) or name == "a.txt"


SAMPLE_FILES = {
    "nq_open/NQ-open.dev.sample.jsonl": 40,
    "triviaqa/unfiltered-web-dev.sample.json": 20,
    "popqa/popQA.sample.tsv": 40,
    "hotpotqa/hotpot_dev_distractor_v1.sample.json": 12,
    "hotpotqa/hub_distractor_validation.sample.parquet": 12,
    "2wikimultihopqa/dev.sample.json": 12,
    "musique/musique_ans_v1.0_dev.sample.jsonl": 12,
    "bamboogle/bamboogle.sample.csv": 20,
    "deepresearcher/test.sample.parquet": 42,
    "search_r1/nq_hotpotqa_train/train.sample.parquet": 42,
    "search_r1/nq_hotpotqa_train/test.sample.parquet": 64,
    "flashrag/nq/test.jsonl": 30,
    "flashrag/triviaqa/test.jsonl": 30,
    "flashrag/popqa/test.jsonl": 30,
    "flashrag/hotpotqa/dev.jsonl": 12,
    "flashrag/2wikimultihopqa/dev.jsonl": 12,
    "flashrag/musique/dev.jsonl": 12,
    "flashrag/bamboogle/test.jsonl": 30,
}


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs samples of the releases: set AGENTGYM_IG_DATA to their folder")
@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_samples_of_the_releases_become_questions(tmp_path: Path, name: str) -> None:
    from agentgym_ig.data import read_manifest, read_questions
    from agentgym_ig.data.prepare import Settings, prepare_questions
    from agentgym_ig.data.sources import Wanted, question_source

    source = question_source("any", Wanted(source=str(SAMPLES / name)))
    prepare_questions("any", source, tmp_path / "out.jsonl", Settings())
    rows = read_manifest(tmp_path / "out.jsonl")["rows"]
    assert (rows["read"], rows["kept"], rows["dropped"]) == (SAMPLE_FILES[name], SAMPLE_FILES[name], {})
    asked = read_questions(tmp_path / "out.jsonl")
    assert len({question.id for question in asked}) == len(asked) == SAMPLE_FILES[name]
