"""The layouts in which question sets are published: one row of each becomes a `Found`.

Every function is pure. It raises KeyError with the name of a field that is missing, and ValueError for a field that
holds something else than it should.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentgym_ig.data.support import hops_of, parsed, support, unique

Row = dict[str, Any]

ANSWER_SPLIT = "<|answer_split|>"
"""Between the accepted answers of DeepResearcher's and IGPO's files."""
ALIASES = {"2wiki": "2wikimultihopqa", "tq": "triviaqa", "natural_questions": "nq", "trivia_qa": "triviaqa"}
"""Other names of datasets, in lower case."""
SPLITS = {"validation": "dev", "valid": "dev", "val": "dev"}
_NUMBERED = re.compile(r"(?:(?:train|dev|test|validation)_)?\d+")


@dataclass(slots=True)
class Found:
    """What a row says. `id`, `dataset` and `split` are None where it does not; `answers` may be empty.

    `evidence` is the text of every supporting paragraph, and empty where not all of them are known; it is looked at
    by the filter and not written.
    """

    question: str
    answers: list[str]
    id: str | None = None
    dataset: str | None = None
    split: str | None = None
    type: str | None = None
    hops: int | None = None
    supporting: list[str] = field(default_factory=list)
    supporting_titles: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    answerable: bool = True

    def as_row(self, dataset: str, split: str | None) -> Row:
        """The row in our own format; `dataset` and `split` where it names none itself."""
        dataset, split = self.dataset or dataset, self.split or split
        own = self.id
        if own is not None and _NUMBERED.fullmatch(own):
            own = f"{dataset}_{own}"  # or the files of two datasets could not be used together
        row: Row = {"id": own, "question": self.question, "answers": self.answers, "dataset": dataset}
        more = {
            "split": split,
            "supporting": self.supporting,
            "supporting_titles": self.supporting_titles,
            "hops": self.hops if self.hops is not None else hops_of(dataset, str(self.id), self.type),
            "type": self.type,
        }
        return row | {name: value for name, value in more.items() if value not in (None, [])}


class Layout(NamedTuple):
    """A function, and the fields by which its rows are known."""

    read: Callable[[Row], Found]
    fields: frozenset[str]


def dataset_name(name: str) -> str:
    """The name that we use, of one that a release uses: `searchR1_tq` → `triviaqa`."""
    own = name.removeprefix("searchR1_").lower()
    return ALIASES.get(own, own)


def split_name(name: str) -> str:
    """`train`, `dev` or `test`, of one that a release uses."""
    return SPLITS.get(name, name)


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name} is {row[name]!r}, wanted text")
    return str(row[name]).strip()


def _name(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def answers_of(value: Any, name: str) -> list[str]:
    """Accepted answers: each once, in their order, without empty ones. `value` is a text or a list of texts."""
    if hasattr(value, "tolist"):
        value = value.tolist()  # pandas gives lists as arrays
    value = [] if value is None else [value] if isinstance(value, str | int | float) else value
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is a {type(value).__name__}, wanted a list of strings")
    for answer in value:
        if not isinstance(answer, str):
            raise ValueError(f"{name} holds {answer!r}, which is no text; write answers as strings, numbers too")
    return unique(answer.strip() for answer in value)


def _inner(row: Row, *names: str) -> Any:
    value: Any = row
    for depth, name in enumerate(names):
        if not isinstance(value, dict) or name not in value:
            raise KeyError(".".join(names[: depth + 1]))
        value = value[name]
    return value


def ours(row: Row) -> Found:
    """Our own format."""
    return Found(
        _text(row, "question"),
        answers_of(row["answers"], "answers"),
        id=_name(row.get("id")),
        dataset=_name(row.get("dataset")),
        split=_name(row.get("split")),
        type=_name(row.get("type")),
        hops=row.get("hops"),
        supporting=[str(passage) for passage in row.get("supporting") or ()],
        supporting_titles=[str(title) for title in row.get("supporting_titles") or ()],
    )


def flashrag(row: Row) -> Found:
    """FlashRAG's files; what `metadata` holds differs between datasets and is used where it is there."""
    metadata = row.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    found = Found(
        _text(row, "question"),
        answers_of(row["golden_answers"], "golden_answers"),
        id=_name(row.get("id")),
        type=_name(metadata.get("type") or metadata.get("prop")),
        answerable=metadata.get("answerable") is not False,
    )
    if metadata.get("s_wiki_title"):
        found.supporting_titles = [str(metadata["s_wiki_title"])]
    elif metadata.get("supporting_facts") is not None:
        try:
            found.supporting_titles, found.evidence = support(metadata)
        except (KeyError, ValueError, TypeError, AttributeError):  # its inside is documented nowhere
            found.supporting_titles, found.evidence = [], []
    return found


def search_r1(row: Row) -> Found:
    """Search-R1's training and evaluation files: FlashRAG's fields, and the dataset each row comes from."""
    found = flashrag(row)
    found.dataset = dataset_name(_text(row, "data_source"))
    found.split = _name((row.get("extra_info") or {}).get("split"))
    return found


def verl(row: Row) -> Found:
    """Files for verl: SkyRL's, verl's own form of Search-R1's, DeepResearcher's and IGPO's."""
    truth, extra = _inner(row, "reward_model", "ground_truth"), row["extra_info"] or {}
    if isinstance(truth, str):
        answers, question = truth.split(ANSWER_SPLIT), None
    else:
        answers, question = _inner(row, "reward_model", "ground_truth", "target"), extra.get("question")
    if question is None:
        said = [message["content"] for message in row["prompt"] if message["role"] == "user"]
        if len(said) != 1:
            raise ValueError(f"prompt holds {len(said)} messages of the user, wanted one: the question")
        question = said[0]
    return Found(
        str(question).strip(),
        answers_of(answers, "reward_model.ground_truth"),
        id=_name(extra.get("index")),
        dataset=dataset_name(_text(row, "data_source")),
        split=_name(extra.get("split")),
    )


def hotpotqa(row: Row) -> Found:
    """HotpotQA, as first published and on the hub."""
    titles, evidence = support(row)
    return Found(
        _text(row, "question"),
        answers_of(row["answer"], "answer"),
        id=_name(row.get("_id", row.get("id"))),
        dataset="hotpotqa",
        type=_name(row.get("type")),
        supporting_titles=titles,
        evidence=evidence,
    )


def two_wiki(row: Row) -> Found:
    """2WikiMultihopQA, as first published and on the hub, where the inner fields are JSON in a string."""
    found = hotpotqa(row)
    found.dataset = "2wikimultihopqa"
    return found


def musique(row: Row) -> Found:
    """MuSiQue, both with and without the questions that cannot be answered."""
    gold = [own for own in row["paragraphs"] if own["is_supporting"]]
    own = _name(row.get("id"))
    return Found(
        _text(row, "question"),
        unique([*answers_of(row["answer"], "answer"), *answers_of(row.get("answer_aliases"), "answer_aliases")]),
        id=own,
        dataset="musique",
        type=own.partition("__")[0] if own else None,
        supporting_titles=unique(str(paragraph["title"]) for paragraph in gold),
        evidence=[f"{paragraph['title']} {paragraph['paragraph_text']}" for paragraph in gold],
        answerable=row.get("answerable") is not False,
    )


def popqa(row: Row) -> Found:
    """PopQA; its list of answers is JSON in a string."""
    return Found(
        _text(row, "question"),
        answers_of(parsed(row["possible_answers"], "possible_answers"), "possible_answers"),
        id=_name(row.get("id")),
        dataset="popqa",
        type=_name(row.get("prop")),
        supporting_titles=unique([str(row.get("s_wiki_title") or "")]),
    )


def triviaqa(row: Row) -> Found:
    """TriviaQA as first published; the value of the answer comes first, then its aliases."""
    given = row["Answer"]
    return Found(
        _text(row, "Question"),
        unique([*answers_of(_inner(given, "Value"), "Answer.Value"), *answers_of(given.get("Aliases"), "Aliases")]),
        id=_name(row.get("QuestionId")),
        dataset="triviaqa",
    )


def triviaqa_hub(row: Row) -> Found:
    """TriviaQA on the hub."""
    given = row["answer"]
    return Found(
        _text(row, "question"),
        unique([*answers_of(_inner(given, "value"), "answer.value"), *answers_of(given.get("aliases"), "aliases")]),
        id=_name(row.get("question_id")),
        dataset="triviaqa",
    )


def bamboogle(row: Row) -> Found:
    """Bamboogle's table."""
    return Found(_text(row, "Question"), answers_of(row["Answer"], "Answer"))


def problem(row: Row) -> Found:
    """The `problem` and `answer` of axon-rl's sets."""
    return Found(_text(row, "problem"), answers_of(row["answer"], "answer"))


def question_answer(row: Row) -> Found:
    """NQ-open and all that has `question` and `answer`, a text or a list."""
    return Found(_text(row, "question"), answers_of(row["answer"], "answer"), id=_name(row.get("id", row.get("idx"))))


def _layout(read: Callable[[Row], Found], fields: str) -> Layout:
    return Layout(read, frozenset(fields.split()))


LAYOUTS = {
    "ours": _layout(ours, "question answers"),
    "search_r1": _layout(search_r1, "question golden_answers data_source"),
    "flashrag": _layout(flashrag, "question golden_answers"),
    "verl": _layout(verl, "data_source prompt reward_model extra_info"),
    "musique": _layout(musique, "question paragraphs answer"),
    "2wikimultihopqa": _layout(two_wiki, "question context supporting_facts evidences answer"),
    "hotpotqa": _layout(hotpotqa, "question context supporting_facts answer"),
    "popqa": _layout(popqa, "question possible_answers"),
    "triviaqa": _layout(triviaqa, "Question QuestionId Answer"),
    "triviaqa_hub": _layout(triviaqa_hub, "question question_id answer"),
    "bamboogle": _layout(bamboogle, "Question Answer"),
    "problem": _layout(problem, "problem answer"),
    "question_answer": _layout(question_answer, "question answer"),
}
"""Name → layout, those with more of the same fields first."""


def recognise(row: Row) -> str:
    """The name of the layout that a row has, by its fields.

    Raises ValueError, naming what is missing of the layout that comes nearest.
    """
    for name, layout in LAYOUTS.items():
        if layout.fields <= row.keys():
            return name
    nearest = max(LAYOUTS, key=lambda name: len(LAYOUTS[name].fields & row.keys()) / len(LAYOUTS[name].fields))
    missing = ", ".join(sorted(LAYOUTS[nearest].fields - row.keys()))
    found = ", ".join(sorted(map(str, row))) or "no field"
    raise ValueError(
        f"no known layout: found {found}; {nearest} comes nearest, and of it {missing} is missing. "
        f"Known layouts: {', '.join(LAYOUTS)}"
    )


def check_fields(layout: str, row: Row) -> None:
    """Raise ValueError, naming every field of the layout that a row has not."""
    missing = sorted(LAYOUTS[layout].fields - row.keys())
    if missing:
        raise ValueError(
            f"field {', '.join(missing)} of the {layout} layout is missing; found {', '.join(sorted(map(str, row)))}. "
            "If the release has changed, give --revision of an older one, or a --source of another layout"
        )
