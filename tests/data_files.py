"""Question sets of our own writing in the layouts of the releases."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

SPRING = ("Which spring feeds the lake of Orrin?", "Vell Spring")
TOWER = ("Who built the tower in the town where Ada Brook was born?", "Tom Reed")
TITLES = ["Ada Brook", "Norwick"]
PARAGRAPHS = [
    ("Ada Brook", ["Ada Brook was born in Norwick.", " She wrote plays."]),
    ("Elm Hall", ["Elm Hall is a house."]),
    ("Norwick", ["Norwick is a town.", " Its tower was built by Tom Reed."]),
]


def numbered(count: int, start: int = 0) -> Rows:
    """So many different rows in FlashRAG's layout."""
    return [
        {"id": f"test_{i}", "question": f"What is number {i}?", "golden_answers": [f"answer {i}"]}
        for i in range(start, start + count)
    ]


def pairs() -> Rows:
    """HotpotQA's and 2WikiMultihopQA's own form."""
    return [
        {
            "_id": "5ab0",
            "question": TOWER[0],
            "answer": TOWER[1],
            "type": "bridge",
            "supporting_facts": [["Ada Brook", 0], ["Norwick", 1], ["Norwick", 0]],
            "context": [[title, sentences] for title, sentences in PARAGRAPHS],
        }
    ]


def columns() -> dict[str, Any]:
    """The same evidence as the hub has it."""
    return {
        "supporting_facts": {"title": ["Ada Brook", "Norwick"], "sent_id": [0, 1]},
        "context": {"title": [own[0] for own in PARAGRAPHS], "sentences": [own[1] for own in PARAGRAPHS]},
    }


def hotpotqa() -> Rows:
    return [row | {"level": "hard"} for row in pairs()]


def hotpotqa_hub() -> Rows:
    return [{"id": "5ab0", "question": TOWER[0], "answer": TOWER[1], "type": "bridge", "level": "hard"} | columns()]


def two_wiki() -> Rows:
    facts = {
        "evidences": [["Ada Brook", "born in", "Norwick"]],
        "entity_ids": "Q1_Q2",
        "evidences_id": [],
        "answer_id": "",
    }
    return [row | facts | {"type": "bridge_comparison"} for row in pairs()]


def two_wiki_hub() -> Rows:
    """The inner fields as JSON in a string."""
    nested = ("supporting_facts", "context", "evidences")
    return [row | {name: json.dumps(row[name]) for name in nested} for row in two_wiki()]


def musique() -> Rows:
    paragraphs = [
        {"idx": i, "title": title, "paragraph_text": " ".join(own), "is_supporting": title in TITLES}
        for i, (title, own) in enumerate(PARAGRAPHS)
    ]
    steps = [{"id": 1, "question": "Ada Brook >> born in", "answer": "Norwick", "paragraph_support_idx": 0}]
    own = {"id": "3hop1__11_22_33", "question": TOWER[0], "answer": TOWER[1], "answer_aliases": ["T. Reed", "Tom Reed"]}
    return [own | {"paragraphs": paragraphs, "question_decomposition": steps, "answerable": True}]


def nq() -> Rows:
    return [{"question": SPRING[0], "answer": [SPRING[1], "the Vell"]}]


def triviaqa() -> Rows:
    answer = {"Value": "Vell Spring", "Aliases": ["Vell", "Vell Spring"], "NormalizedValue": "vell spring", "Type": "X"}
    return [{"Question": SPRING[0], "QuestionId": "tc_3", "QuestionSource": "", "Answer": answer, "SearchResults": []}]


def triviaqa_hub() -> Rows:
    answer = {"value": "Vell Spring", "aliases": ["Vell"], "normalized_value": "vell spring"}
    return [{"question": SPRING[0], "question_id": "tc_3", "answer": answer}]


def popqa() -> Rows:
    own = {"id": "77", "subj": "Orrin", "prop": "spring", "obj": "Vell", "s_wiki_title": "Lake Orrin"}
    return [own | {"question": SPRING[0], "possible_answers": '["Vell Spring", "Vell"]'}]


def bamboogle() -> Rows:
    return [{"Question": SPRING[0], "Answer": "1823"}]


def flashrag() -> Rows:
    return [
        {"id": "test_0", "question": SPRING[0], "golden_answers": ["Vell Spring", " ", "Vell"]},
        {
            "id": "test_1",
            "question": TOWER[0],
            "golden_answers": ["Tom Reed"],
            "metadata": {"type": "bridge"} | columns(),
        },
    ]


def search_r1() -> Rows:
    return [
        row
        | {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"Search, then answer. {row['question']}"}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": row["golden_answers"]}},
            "extra_info": {"split": "test", "index": i},
            "metadata": None,
        }
        for i, (source, row) in enumerate(zip(("nq", "hotpotqa"), flashrag(), strict=True))
    ]


def verl() -> Rows:
    """As verl and SkyRL write it."""
    made = []
    for row in search_r1():
        tools = {"search": {"create_kwargs": {"ground_truth": row["reward_model"]["ground_truth"]}}}
        extra = row["extra_info"] | {"question": row["question"], "need_tools_kwargs": True, "tools_kwargs": tools}
        said = [{"role": "system", "content": "Search."}, *row["prompt"]]
        kept = {name: row[name] for name in ("ability", "reward_model")}
        made.append(kept | {"data_source": f"searchR1_{row['data_source']}", "prompt": said, "extra_info": extra})
    return made


def deepresearcher() -> Rows:
    return [
        {
            "data_source": source,
            "prompt": [{"content": SPRING[0], "role": "user"}],
            "ability": "search & question answering",
            "reward_model": {"ground_truth": "Vell Spring<|answer_split|>Vell", "style": "unknown"},
            "extra_info": {"index": f"{source}_7", "split": "dev"},
        }
        for source in ("tq", "Bamboogle")
    ]


def problem() -> Rows:
    return [{"problem": SPRING[0], "answer": "Vell Spring"}]


def as_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def as_list(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=1))


def as_data(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps({"Data": rows, "Domain": "unfiltered", "Version": 1.0}, indent=1))


def as_table(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as out:
        table = csv.DictWriter(out, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)


def as_parquet(path: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)


FILES: dict[str, tuple[Callable[[], Rows], str, Callable[[Path, Rows], None]]] = {
    "hotpot_dev_distractor_v1.json": (hotpotqa, "hotpotqa", as_list),
    "hotpot_hub.parquet": (hotpotqa_hub, "hotpotqa", as_parquet),
    "2wiki_dev.json": (two_wiki, "2wikimultihopqa", as_list),
    "2wiki_dev.parquet": (two_wiki_hub, "2wikimultihopqa", as_parquet),
    "musique_ans_v1.0_dev.jsonl": (musique, "musique", as_lines),
    "NQ-open.dev.jsonl": (nq, "question_answer", as_lines),
    "unfiltered-web-dev.json": (triviaqa, "triviaqa", as_data),
    "trivia_hub.jsonl": (triviaqa_hub, "triviaqa_hub", as_lines),
    "popQA.tsv": (popqa, "popqa", as_table),
    "bamboogle.csv": (bamboogle, "bamboogle", as_table),
    "flashrag.jsonl": (flashrag, "flashrag", as_lines),
    "search_r1.parquet": (search_r1, "search_r1", as_parquet),
    "verl.parquet": (verl, "verl", as_parquet),
    "deepresearcher.parquet": (deepresearcher, "verl", as_parquet),
    "axon.json": (problem, "problem", as_lines),
}
"""File → its rows, the layout that they have, and how it is written."""


def write(folder: Path, name: str) -> Path:
    """One of these files."""
    rows, _, how = FILES[name]
    how(folder / name, rows())
    return folder / name
