"""Question files in our own format: a line of JSON with `id`, `question`, `answers` and `dataset` each."""

from __future__ import annotations

from pathlib import Path

from agentgym_ig.data.jsonl import read_jsonl, reason
from agentgym_ig.errors import CorpusError
from agentgym_ig.types import Question


def read_questions(path: Path) -> list[Question]:
    """Questions of a file: `{"id", "question", "answers"}`, and optional `supporting` passage ids and `dataset`.

    The dataset is the file's name up to the first dot where a row does not say.

    Raises CorpusError, naming file and line, for a row that is no usable question, and for a file with none.
    """
    questions: list[Question] = []
    for number, row in read_jsonl(path):
        try:
            answers = row["answers"]
            if not isinstance(answers, list):
                raise ValueError(f"answers is a {type(answers).__name__}, wanted a list of strings")
            questions.append(
                Question(
                    id=str(row["id"]),
                    text=str(row["question"]),
                    answers=tuple(text for answer in answers if (text := str(answer)).strip()),
                    dataset=str(row.get("dataset", path.name.partition(".")[0])),
                    supporting=tuple(str(passage) for passage in row.get("supporting", ())),
                )
            )
        except (KeyError, ValueError) as error:
            raise CorpusError(f"{path}:{number}: {reason(error)}") from error
    if not questions:
        raise CorpusError(f"{path} holds no question")
    return questions
