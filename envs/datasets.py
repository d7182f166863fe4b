"""Search environments from paths: what the registered ids make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentgym_ig.data.questions import read_questions
from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv
from agentgym_ig.errors import CorpusError
from agentgym_ig.indexes.base import Index
from agentgym_ig.indexes.opening import open_index
from agentgym_ig.types import Question

DATASET_IDS = {
    "agentgym_ig/NQ-v0": "nq",
    "agentgym_ig/TriviaQA-v0": "triviaqa",
    "agentgym_ig/HotpotQA-v0": "hotpotqa",
    "agentgym_ig/2WikiMultihopQA-v0": "2wikimultihopqa",
    "agentgym_ig/MuSiQue-v0": "musique",
    "agentgym_ig/Bamboogle-v0": "bamboogle",
    "agentgym_ig/PopQA-v0": "popqa",
}
"""Registered id → dataset."""

Questions = Sequence[Question] | Path | str
"""Questions, a file of them, or a folder that holds `<dataset>.jsonl` or `<dataset>.jsonl.gz`."""


def question_file(folder: Path, dataset: str) -> Path | None:
    """The file of a dataset in a folder of question files; None where there is none."""
    files = (folder / f"{dataset}{ending}" for ending in (".jsonl", ".jsonl.gz"))
    return next((path for path in files if path.is_file()), None)


def _opened(index: Index | Path | str, questions: Questions, dataset: str | None) -> tuple[Index, Sequence[Question]]:
    if isinstance(questions, str | Path):
        place: Path | None = Path(questions)
        if Path(questions).is_dir():
            place = question_file(Path(questions), dataset) if dataset else None
        if place is None:
            wanted = (
                f"it holds no {dataset}.jsonl or {dataset}.jsonl.gz" if dataset else "name one of its question files"
            )
            raise CorpusError(f"{questions} is a folder: {wanted}")
        questions = read_questions(place)
    return open_index(index) if isinstance(index, str | Path) else index, questions


def search_env(
    index: Index | Path | str, questions: Questions, *, dataset: str | None = None, **options: Any
) -> SearchEnv:
    """`SearchEnv` over an index, its folder or its address, and questions, their file or their folder.

    The other options are those of `SearchEnv`. Raises CorpusError and IndexUnusable, which say what is missing.
    """
    return SearchEnv(*_opened(index, questions, dataset), **options)


def search_vector_env(
    index: Index | Path | str, questions: Questions, *, num_envs: int = 1, dataset: str | None = None, **options: Any
) -> SearchVectorEnv:
    """The vector form of `search_env`."""
    return SearchVectorEnv(*_opened(index, questions, dataset), num_envs, **options)
