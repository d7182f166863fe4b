"""`agentgym-ig eval` and `compare`, as a user runs them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentgym_ig.envs.results import write_verdicts
from agentgym_ig.records import read_episodes
from tests.conftest import Command, eval_toy


def test_eval_of_a_scripted_policy(command: Command, indexed: Path) -> None:
    out = indexed / "run"
    code, printed = eval_toy(command, indexed, "--policy", "oracle", "--out", out)
    assert code == 0, printed
    assert "oracle on igpo" in printed
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["in_domain"]["em"] == figures["out_of_domain"]["f1"] == figures["all"]["em"] == 1.0
    assert figures["datasets"]["hotpotqa"]["recall"] == 1.0
    assert figures["card"]["index"]["corpus_sha256"]
    assert figures["card"]["rules"]["prompt"] == "search-r1"
    assert figures["card"]["command"][1:3] == ["eval", "--suite"]
    assert len(read_episodes(out / "episodes.jsonl")) == 4
    code, printed = eval_toy(command, indexed, "--policy", "oracle", "--out", out)
    assert code == 1
    assert "go on with --resume, begin anew with --force" in printed
    code, printed = eval_toy(command, indexed, "--policy", "random", "--out", out, "--resume")
    assert code == 1
    assert "was begun with another policy" in printed
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "episodes.jsonl").write_bytes(b"".join(whole["episodes.jsonl"].splitlines(keepends=True)[:2]))
    assert eval_toy(command, indexed, "--policy", "oracle", "--out", out, "--resume")[0] == 0
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(after.pop("episodes.jsonl").splitlines()) == sorted(whole.pop("episodes.jsonl").splitlines())
    assert len(after.pop("times.jsonl").splitlines()) == 1 + len(whole.pop("times.jsonl").splitlines()) == 2
    assert after == whole
    assert eval_toy(command, indexed, "--policy", "closed-book", "--out", out, "--force")[0] == 0
    assert json.loads((out / "evaluation.json").read_text())["all"]["em"] < 1


def test_manifests_of_questions_stand_in_the_card(command: Command, indexed: Path) -> None:
    made = {"format": 1, "source": "here", "revision": "r1", "split": "test"}
    (indexed / "questions" / "musique.jsonl.manifest.json").write_text(json.dumps(made))
    assert eval_toy(command, indexed, "--policy", "closed-book", "--out", indexed / "run")[0] == 0
    asked = json.loads((indexed / "run" / "card.json").read_text())["suite"]["questions"]
    assert asked["musique"]["made"] == made
    assert "made" not in asked["hotpotqa"]


def test_two_runs_beside_each_other(command: Command, indexed: Path) -> None:
    for policy in ("oracle", "closed-book"):
        assert eval_toy(command, indexed, "--policy", policy, "--out", indexed / policy)[0] == 0
    runs = (indexed / "oracle", indexed / "closed-book")
    code, printed = command("compare", *runs, "--out", indexed / "gap.json")
    assert code == 0, printed
    assert "em of oracle less closed-book" in printed
    parts = json.loads((indexed / "gap.json").read_text())["parts"]
    assert parts["all"]["difference"] == 1.0
    assert command("compare", *runs, "--metric", "searches")[0] == 0
    for arguments, said in {
        (*runs, "--out", indexed / "gap.json"): "is there already",
        (runs[0],): "found 1 folders, wanted two",
        (runs[0], indexed): "no evaluation.json",
        (*runs, "--metric", "nope"): "figure called 'nope'",
    }.items():
        code, printed = command("compare", *arguments)
        assert code == 1
        assert said in printed


def test_a_model_closed_book_with_one_search_and_with_its_gains(command: Command, tmp_path: Path) -> None:
    tiny = ("eval", "--suite", "tinywiki", "--limit", 3)
    for mode, turns in {"closed-book": 1, "retrieve-once": 2}.items():
        out = tmp_path / mode
        code, printed = command(*tiny, "--mode", mode, "--out", out, "--tries", 2, "--gain-model", "self")
        assert code == 0, printed
        episodes = read_episodes(out / "episodes.jsonl")
        assert len(episodes) == 24
        assert all(len(own.turns) <= turns for own in episodes)
        first = {own.turns[0].queries for own in episodes}
        assert first == ({()} if turns == 1 else {(own.question.text,) for own in episodes})
        assert all(own.belief for own in episodes)
        assert "pass@2" in printed
    figures = json.loads((tmp_path / "retrieve-once" / "evaluation.json").read_text())
    assert figures["datasets"]["hop2"]["info_gain"] != 0
    assert figures["card"]["policy"]["mode"] == "retrieve-once"
    assert set(figures["card"]["policy"]) >= {"sha256", "temperature", "max_new_tokens"}
    for arguments, said in {
        ("--mode", "nope"): "agent, closed-book, retrieve-once",
        ("--mode", "closed-book", "--policy", "oracle"): "oracle is a script",
        ("--mode", "closed-book", "--prompt", "tinywiki"): "has a prompt of its own",
        ("--mode", "retrieve-once", "--max-turns", 4): "has a max-turns of its own",
        ("--policy", "oracle", "--gain-model", "self"): "needs a policy that is a transformers model",
        ("--resume",): "name it by --out",
    }.items():
        code, printed = command("eval", "--limit", 1, *arguments)
        assert code == 1
        assert said in printed


def test_a_judge_is_asked_once_about_each_answer(command: Command, indexed: Path, model_server: str) -> None:
    out = indexed / "judged"
    arguments = ("--policy", "oracle", "--out", out, "--judge", model_server, "--judge-model", "taught")
    code, printed = eval_toy(command, indexed, *arguments)
    assert code == 0, printed
    # Wherever a narrow terminal breaks the line.
    assert "no verdict on 4 answers, which its column leaves out; --resume asks again" in " ".join(printed.split())
    episodes = sorted(read_episodes(out / "episodes.jsonl"), key=lambda own: own.group)
    write_verdicts(out, episodes, [1.0, 1.0, 0.0, 0.0])
    code, printed = eval_toy(command, indexed, *arguments, "--resume")
    assert code == 0
    assert "no verdict" not in printed
    judged = json.loads((out / "evaluation.json").read_text())
    assert judged["card"]["judge"] == f"taught at {model_server}"
    assert judged["all"]["judge"] == 0.5


@pytest.mark.slow
def test_an_evaluation_killed_at_random_moments_ends_as_one_left_alone(tmp_path: Path) -> None:
    arguments = ["eval", "--suite", "tinywiki", "--limit", "40", "--batch", "4", "--seed", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def started(*more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "agentgym_ig", *arguments, "--out", "run", *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, env=environment, cwd=place)

    figures = {}
    for name in ("alone", "killed"):
        place = tmp_path / name
        place.mkdir()
        for _ in range(3 if name == "killed" else 0):
            process = started("--resume")
            file = place / "run" / "episodes.jsonl"
            before = file.stat().st_size if file.exists() else 0
            deadline = time.monotonic() + 120
            while not (file.exists() and file.stat().st_size > before) and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.2 * random.random())
            process.kill()
            process.communicate(timeout=60)
        last = started("--resume")
        output, _ = last.communicate(timeout=300)
        assert last.returncode == 0, output.decode()
        figures[name] = (place / "run" / "evaluation.json").read_bytes()
    assert figures["alone"] == figures["killed"]
