"""Preparing that was stopped, interrupted or killed, and goes on to the same bytes."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig.data import read_questions
from agentgym_ig.data.prepare import Settings, prepare_questions
from agentgym_ig.data.sources import Source
from agentgym_ig.data.work import How
from agentgym_ig.records import write_json
from tests.data_files import Rows, numbered


class Stopped(Exception):
    pass


def stopping(rows: Rows, at: int | None) -> Source:
    """A source whose reading ends with an error before row `at`."""

    def read(skip: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(rows[skip:], skip):
            if number == at:
                raise Stopped
            yield f"rows:{number}", row

    return Source(read, {"source": "rows"}, "rows")


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=1, max_size=60),
    st.lists(st.integers(0, 60), max_size=4),
    st.integers(1, 9),
    st.sampled_from(["nq.jsonl", "nq.jsonl.gz", "parts", "subset.jsonl.gz"]),
)
def test_stopped_anywhere_and_gone_on_with_the_bytes_are_the_same(
    drawn: list[tuple[int, int]], stops: list[int], chunk: int, name: str
) -> None:
    rows = [
        {"id": f"test_{i}", "question": f"What is {number}?", "golden_answers": [str(answer)]}
        for i, (number, answer) in enumerate(drawn)
    ]
    chosen = Settings(
        parts={"train": 0.5, "dev": 0.5} if name == "parts" else {}, subset=3 if name.startswith("subset") else None
    )
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        prepare_questions("nq", stopping(rows, None), whole / name, chosen, How(chunk=chunk))
        for at in sorted(stops):
            if at < len(rows):
                with pytest.raises(Stopped):
                    prepare_questions("nq", stopping(rows, at), broken / name, chosen, How(resume=True, chunk=chunk))
                for path in broken.rglob("rows.jsonl*"):
                    path.write_bytes(path.read_bytes() + b"a torn chunk")
        prepare_questions("nq", stopping(rows, None), broken / name, chosen, How(resume=True, chunk=chunk))
        assert content_of(whole) == content_of(broken)
        again = prepare_questions("nq", stopping(rows, 0), broken / name, chosen, How(resume=True, chunk=chunk))
        assert len(again) == len(chosen.parts or (None,))  # all is there already: nothing was read


def test_work_begun_is_neither_lost_nor_mixed(tmp_path: Path) -> None:
    rows, out = numbered(10), tmp_path / "nq.jsonl"
    with pytest.raises(Stopped):
        prepare_questions("nq", stopping(rows, 7), out, Settings(), How(chunk=3))
    with pytest.raises(FileExistsError, match=r"--resume goes on with it, --force begins anew"):
        prepare_questions("nq", stopping(rows, None), out, Settings(), How(chunk=3))
    with pytest.raises(ValueError, match=r"was begun in another way \(settings was"):
        prepare_questions("nq", stopping(rows, None), out, Settings(seed=1), How(resume=True, chunk=3))
    read: list[int] = []
    how = How(resume=True, chunk=3, progress=lambda done, kept: read.append(done))
    prepare_questions("nq", stopping(rows, None), out, Settings(), how)
    assert read == [9, 10]
    assert len(read_questions(out)) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nq.jsonl", "nq.jsonl.manifest.json"]


def test_a_run_that_ended_between_the_last_steps_is_finished(tmp_path: Path) -> None:
    """The rows have become the output; only their folder is left."""
    rows, out = numbered(4), tmp_path / "nq.jsonl"
    with pytest.raises(Stopped):
        prepare_questions("nq", stopping(rows, 3), out, Settings(), How(chunk=3))
    kept = content_of(tmp_path / "nq.jsonl.partial")
    prepare_questions("nq", stopping(rows, None), out, Settings(), How(resume=True, chunk=3))
    whole = content_of(tmp_path)
    (tmp_path / "nq.jsonl.partial").mkdir()
    for name, content in kept.items():
        if not name.startswith("rows"):
            (tmp_path / "nq.jsonl.partial" / name).write_bytes(content)
    state = json.loads(kept["state.json"]) | {"complete": True, "read": 4}
    write_json(tmp_path / "nq.jsonl.partial" / "state.json", state)
    prepare_questions("nq", stopping(rows, 0), out, Settings(), How(resume=True, chunk=3))
    assert content_of(tmp_path) == whole


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    with (tmp_path / "big.jsonl").open("w") as lines:
        for row in numbered(80_000):
            lines.write(json.dumps(row) + "\n")

    def run(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "agentgym_ig.commands.main", "data", "questions", "nq", "--resume"]
        command += ["--source", str(tmp_path / "big.jsonl"), "--part", "train=0.8,dev=0.2", "--out", str(out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    assert run(tmp_path / "whole").wait() == 0
    killed, seen, wanted = 0, -1, (1, 40_000, 60_000, 80_000)
    state = tmp_path / "killed" / "nq.partial" / "state.json"
    for least in wanted:
        process = run(tmp_path / "killed")
        while process.poll() is None and seen < least:
            time.sleep(0.001)
            seen = json.loads(state.read_bytes())["read"] if state.is_file() else seen
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == len(wanted)
    assert seen == 80_000
    assert run(tmp_path / "killed").wait() == 0
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")
    assert len(content_of(tmp_path / "whole")) == 4


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_two_processes_keep_apart(tmp_path: Path) -> None:
    with (tmp_path / "big.jsonl").open("w") as lines:
        for row in numbered(80_000):
            lines.write(json.dumps(row) + "\n")
    out = tmp_path / "nq.jsonl"
    command = [sys.executable, "-m", "agentgym_ig.commands.main", "data", "questions", "nq"]
    command += ["--source", str(tmp_path / "big.jsonl"), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "nq.jsonl.partial" / "state.json").is_file():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    second = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert second.returncode == 1
    assert "another process is writing" in second.stdout
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    printed, _ = process.communicate()
    assert process.returncode == 130
    assert "Run the same command with --resume to go on from here." in printed
    assert not out.exists()
    assert subprocess.run([*command, "--resume"], capture_output=True).returncode == 0
    assert len(read_questions(out)) == 80_000
