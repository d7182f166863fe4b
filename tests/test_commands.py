"""The command line, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentgym_ig.envs.suites import SUITES
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.records import read_episodes
from agentgym_ig.trainers import PARTS
from tests.conftest import Command, eval_toy


def test_rollout_training_and_evaluation_of_a_model_from_disk(command: Command, indexed: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(3).save_pretrained(indexed / "model")
    tokenizer.save_pretrained(indexed / "model")
    code, printed = eval_toy(command, indexed, "--model", indexed / "model", "--max-new-tokens", 4, "--max-turns", 2)
    assert code == 0, printed
    train = ["train", "--model", indexed / "model", "--suite", "igpo", "--questions", indexed / "questions"]
    train += ["--index", indexed / "index", "--out", indexed / "run", "--steps", 2, "--questions-per-step", 2]
    train += ["--group-size", 2, "--max-new-tokens", 4, "--max-turns", 2, "--recipe", "igpo"]
    code, printed = command(*train)
    assert code == 0, printed
    code, printed = eval_toy(
        command, indexed, "--model", indexed / "run" / "model", "--max-new-tokens", 4, "--max-turns", 2
    )
    assert code == 0, printed
    code, printed = command(*train)
    assert code == 1
    assert "--resume" in printed


def test_quickstart_end_to_end_and_again(command: Command, tmp_path: Path) -> None:
    arguments = ("quickstart", "--out", tmp_path / "q", "--steps", 10, "--questions", 8, "--compare")
    code, printed = command(*arguments)
    assert code == 0, printed
    for when in ("before", "igpo/after", "grpo/after"):
        figures = json.loads((tmp_path / "q" / when / "evaluation.json").read_text())
        assert {"em", "f1"} <= set(figures["in_domain"]) & set(figures["out_of_domain"])
        episodes = read_episodes(tmp_path / "q" / when / "episodes.jsonl")
        assert all(len(own.belief) == len(own.turns) for own in episodes)
    assert "after grpo" in printed
    assert "Next, with a real model" in printed
    page = (tmp_path / "q" / "report.html").read_text()
    assert "<svg" in page
    assert "Quickstart: igpo and grpo on TinyWiki" in page
    stamp = (tmp_path / "q" / "igpo" / "model" / "model.safetensors").stat().st_mtime_ns
    code, printed = command(*arguments)
    assert code == 0, printed
    assert (tmp_path / "q" / "igpo" / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    code, printed = command(*arguments, "--seed", 1)
    assert code == 1
    assert "give another --out" in printed


@pytest.mark.slow
def test_a_quickstart_interrupted_anywhere_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    base = [sys.executable, "-m", "agentgym_ig", "quickstart", "--steps", "10", "--questions", "8", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "250"}
    subprocess.run([*base, tmp_path / "alone"], check=True, capture_output=True, env=environment)
    reached = iter(
        ["worlds/test/index/manifest.json", "before/evaluation.json", "igpo/metrics.jsonl", "igpo/model/config.json"]
    )
    for sign in reached:
        process = subprocess.Popen(
            [*base, tmp_path / "cut"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        while not (tmp_path / "cut" / sign).exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0].decode()
        assert process.returncode in (0, 130), output
        if process.returncode == 130:
            assert f"agentgym-ig quickstart --out {tmp_path / 'cut'}" in output
    subprocess.run([*base, tmp_path / "cut"], check=True, capture_output=True, env=environment)
    for name in ("before/evaluation.json", "igpo/after/evaluation.json", "igpo/after/episodes.jsonl"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_mistakes_end_in_one_line_that_says_what_to_type(command: Command, indexed: Path) -> None:
    questions = ("--questions", indexed / "questions", "--index", indexed / "index")
    bare = tiny_tokenizer()
    bare.chat_template = None
    tiny_model().save_pretrained(indexed / "bare")
    bare.save_pretrained(indexed / "bare")
    (indexed / "bad.jsonl").write_text('{"id": "1", "title": "a", "text": "b"}\n{"id": ')
    mistakes = {
        ("index", "search", "x", "--index", indexed / "none"): "agentgym-ig index build --corpus",
        ("index", "build", "--corpus", indexed / "bad.jsonl", "--out", indexed / "i2"): "bad.jsonl:2",
        ("index", "build", "--corpus", indexed / "none.jsonl", "--out", indexed / "i2"): "no file",
        ("eval", "--suite", "nope"): ", ".join(sorted(SUITES)),
        ("eval", "--suite", "igpo"): "needs --questions FOLDER",
        ("eval", "--suite", "igpo", "--questions", indexed, "--index", indexed / "index"): "holds none of nq.jsonl",
        ("eval", "--suite", "igpo", *questions, "--model", indexed / "none"): "no such folder here",
        ("eval", "--suite", "igpo", *questions, "--model", indexed / "bare"): "no chat template",
        ("eval", "--suite", "igpo", *questions, "--prompt", "nope"): "search-r1, tinywiki",
        ("train", "--recipe", "nope", "--out", indexed / "r"): ", ".join(sorted(PARTS)),
        ("train", "--out", indexed / "r", "--resume"): "no run to resume",
        ("quickstart", "--recipe", "nope", "--out", indexed / "q"): ", ".join(sorted(PARTS)),
    }
    for arguments, message in mistakes.items():
        code, printed = command(*arguments)
        assert code == 1, (arguments, printed)
        assert message in printed.replace("\n", " "), (arguments, printed)
        assert "Traceback" not in printed


def test_help_lists_the_commands(command: Command) -> None:
    code, printed = command("--help")
    assert code == 0
    for name in ("index", "eval", "train", "quickstart", "report", "show"):
        assert name in printed
