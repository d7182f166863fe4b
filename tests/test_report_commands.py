"""`agentgym-ig report` and `agentgym-ig show`, run as a user runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from agentgym_ig.envs.terminal import recorded
from agentgym_ig.types import Passage, Stop
from tests.conftest import Command
from tests.report_runs import HOSTILE, episode, evaluation, row, several, training


def test_report_writes_one_page_and_never_over_another(command: Command, tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / "a", several([1])), training(tmp_path / "b", [row(1), row(2)])]
    out = tmp_path / "pages" / "report.html"
    code, printed = command("report", *runs, "--out", out)
    assert code == 0, printed
    assert f"report: {out}" in printed
    written = out.read_bytes()
    assert b"a and b on igpo" in written
    code, printed = command("report", runs[0], "--out", out)
    assert code == 1
    assert "write over it with --force" in printed
    assert out.read_bytes() == written
    assert command("report", runs[0], "--out", out, "--force")[0] == 0
    assert out.read_bytes() != written
    code, printed = command("report", runs[0], "--out", tmp_path / "pages", "--force")
    assert code == 1
    assert "name a file" in printed


def test_mistakes_end_in_one_line_and_leave_no_page(command: Command, tmp_path: Path) -> None:
    evaluation(tmp_path / "igpo", several([1]))
    evaluation(tmp_path / "mine", several([1]), suite="mine")
    (tmp_path / "empty").mkdir()
    training(tmp_path / "trained", [row(1)])
    mistakes = {
        ("report", tmp_path / "empty"): "holds neither evaluation.json nor metrics.jsonl",
        ("report", tmp_path / "none"): "there is no folder",
        ("report", tmp_path / "igpo", tmp_path / "mine"): "give runs of one suite",
        ("show", tmp_path / "none"): "there is no folder",
        ("show", tmp_path / "trained"): "agentgym-ig eval --out FOLDER",
        ("show", tmp_path / "igpo", "--won", "--lost"): "exclude each other",
        ("show", tmp_path / "igpo", "--id", "nope"): "leave out some of --id",
    }
    for arguments, message in mistakes.items():
        end = ("--out", tmp_path / "r.html") if arguments[0] == "report" else ()
        code, printed = command(*arguments, *end)
        assert code == 1, (arguments, printed)
        assert message in printed.replace("\n", " "), (arguments, printed)
        assert "Traceback" not in printed
    assert not (tmp_path / "r.html").exists()


def wait(for_what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not for_what():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_watch_follows_a_run_until_it_is_interrupted(tmp_path: Path) -> None:
    run, out = training(tmp_path / "run", [row(1)]), tmp_path / "r.html"
    asked = [sys.executable, "-m", "agentgym_ig", "report", str(run), "--out", str(out), "--watch", "--every", "1"]
    environment = os.environ | {"COLUMNS": "250", "OMP_NUM_THREADS": "1"}
    watching = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    try:
        wait(lambda: out.exists() and "run: 1 step." in out.read_text())
        assert 'data-seconds="1.0"' in out.read_text()
        unchanged = out.stat().st_mtime_ns
        time.sleep(2.5)
        assert out.stat().st_mtime_ns == unchanged
        with (run / "metrics.jsonl").open("a") as log:
            log.write("this is no JSON\n")
        time.sleep(2.5)
        training(run, [row(1), row(2)])
        wait(lambda: "run: 2 steps." in out.read_text())
        evaluation(run / "step-2", several([1]))
        wait(lambda: "run on igpo" in out.read_text())
    finally:
        watching.send_signal(signal.SIGINT)
        try:
            printed = watching.communicate(timeout=60)[0].decode()
        finally:
            watching.kill()  # where it does not obey, it must not outlive the test
            watching.wait()
    assert watching.returncode == 0, printed
    assert "metrics.jsonl:2 is no JSON" in printed
    assert "stays as it is" in printed
    assert [own.name for own in tmp_path.iterdir() if own.name != "run"] == ["r.html"]


def test_show_prints_the_episodes_that_are_asked_for(command: Command, tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "run", several([1, 4]))
    code, printed = command("show", folder, "--id", "nq-9")
    assert code == 0, printed
    for part in ("number 9?", "I must look it up.", "born in Warsaw", "Marie Curie | Maria Skłodowska", "turn 3 of 3"):
        assert part in printed
    assert re.search(r"info_gain \+2\.25  █{12}\s", printed)
    assert re.search(r"info_gain -0\.50  █{3}\s", printed)
    assert re.search(r"support +\[1\] Warsaw", printed)
    assert re.search(r"lost +Pierre Curie \(F1 50\)", printed)
    assert command("show", folder, "--id", "nq/nq-9")[1] == printed
    code, printed = command("show", folder, "--won", "--n", 5)
    assert re.findall(r"number (\d+)\?", printed) == ["1", "4"]
    code, printed = command("show", folder / "episodes.jsonl", "--lost", "--dataset", "musique", "--n", 2)
    assert re.findall(r"number (\d+)\?", printed) == ["0", "2"]


def test_a_terminal_obeys_nothing_that_a_passage_says() -> None:
    passages = [Passage("[red]p1", HOSTILE, HOSTILE)]
    own = episode(1, question=HOSTILE, think="[bold]\x1b]0;owned\x07", passages=passages)
    failed = episode(2, stop=Stop.SCORING_FAILED, error=HOSTILE, answer=None)
    out = StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    for each in (own, failed):
        console.print(recorded(each))
    printed = out.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u2028\u202e]", printed)
    assert "[red]markup[/red]" in printed
    assert "[bold]]0;owned" in printed
    json.dumps(printed).encode("ascii")


@pytest.mark.parametrize("gain", [float("nan"), float("-inf"), 0.0, -3.0, 1e308])
def test_any_gain_is_drawn(gain: float) -> None:
    out = StringIO()
    Console(file=out, width=100).print(recorded(episode(1, gains=(gain, 1.0))))
    assert "info_gain" in out.getvalue()
