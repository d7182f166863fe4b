"""One torch thread for all tests (a second one only costs, beside a neighbour a lot), and shared fixtures."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agentgym_ig.commands.main import main
from tests.fakes import PASSAGES, QUESTIONS
from tests.openai_server import own_server, teach

torch.set_num_threads(1)

Command = Any


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `agentgym-ig` with arguments; gives its exit status and all that it printed."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["agentgym-ig", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A corpus and question files as a user has them."""
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "questions").mkdir()
    for dataset in ("hotpotqa", "musique"):
        asked = [
            {"id": q.id, "dataset": dataset, "question": q.text, "answers": q.answers, "supporting": q.supporting}
            for q in QUESTIONS
        ]
        (tmp_path / "questions" / f"{dataset}.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return tmp_path


@pytest.fixture
def indexed(command: Command, toy: Path) -> Path:
    """The same with an index."""
    assert command("index", "build", "--corpus", toy / "corpus.jsonl", "--out", toy / "index")[0] == 0
    return toy


def eval_toy(command: Command, toy: Path, *more: object) -> tuple[int, str]:
    """`agentgym-ig eval` of suite igpo over that index and those questions."""
    asked = ("--suite", "igpo", "--questions", toy / "questions", "--index", toy / "index")
    return command("eval", *asked, *more)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model that knows how to search and answer, saved as a hub folder."""
    path = tmp_path_factory.mktemp("taught")
    teach(path)
    return path


@pytest.fixture(scope="session")
def model_server(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real OpenAI-compatible server of that model, whose answers a test can plan."""
    with own_server(taught, tmp_path_factory.mktemp("logs") / "own.log") as (url, _):
        yield url
