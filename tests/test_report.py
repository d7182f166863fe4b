"""The report as data and as a file; tests/test_report_browser.py opens it."""

import base64
import gzip
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym_ig.errors import CorpusError
from agentgym_ig.grammar import GRAMMARS, Malformed
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.records import from_json, to_json
from agentgym_ig.report import find_runs, write_report
from agentgym_ig.report.curves import MOST_POINTS, channel_panels, training_panels
from agentgym_ig.report.episodes import BLOCK, Packed, pack, split_action, split_reply, to_script
from agentgym_ig.report.figures import table
from agentgym_ig.report.page import SCRIPTS
from agentgym_ig.types import Passage, Stop, Trajectory
from tests.report_runs import HOSTILE, PASSAGES, episode, evaluation, row, rows_of_all_kinds, several, training
from tests.tiny import play

SOME_TEXT = st.text(max_size=60) | st.sampled_from(["<think>a</think>", "</search>", HOSTILE, "\n\n", "[1] x: y"])


def put_together(turn: dict[str, Any]) -> str:
    """A packed reply as it was, done as the page's script does it."""
    if "texts" not in turn:
        return str(turn.get("reply", ""))
    ranks = [f"[{rank}] " if turn.get("ranked") else "" for rank in range(1, len(turn["texts"]) + 1)]
    lines = [before + text for before, text in zip(ranks, turn["texts"], strict=True)]
    return str(turn["frame"][0] + "\n".join(lines) + turn["frame"][1])


def unpacked(block: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(block)))


def turns_of(packed: Packed, run: int, place: int) -> list[dict[str, Any]]:
    """An episode's turns out of their block, with shared texts put in."""
    block = packed.table["runs"][run]["block"] + place // packed.table["blockSize"]
    turns: list[dict[str, Any]] = unpacked(packed.episodes[block])[place % packed.table["blockSize"]]["turns"]
    size = packed.table["textsPerBlock"]
    for turn in turns:
        if "texts" in turn:
            turn["texts"] = [
                own if isinstance(own, str) else unpacked(packed.texts[own // size])[own % size]
                for own in turn["texts"]
            ]
    return turns


@given(SOME_TEXT, st.sampled_from([*GRAMMARS, "a grammar of tomorrow"]))
def test_the_pieces_of_any_action_are_all_of_it(text: str, grammar: str) -> None:
    pieces, fault = split_action(text, grammar)
    assert "".join(piece for _, piece in pieces) == text
    assert (fault is not None) == (grammar not in GRAMMARS or isinstance(GRAMMARS[grammar].parse(text), Malformed))


def test_an_action_is_taken_apart_by_its_grammar() -> None:
    text = "<think>why</think>\n<guide>fine, positive</guide><search> who </search>"
    kinds = [(kind, piece) for kind, piece in split_action(text, "tags")[0] if kind]
    assert kinds == [("think", "why"), ("guide", "fine, positive"), ("search", " who ")]
    call = GRAMMARS["tools"].search("one", "two")
    assert [kind for kind, _ in split_action(call, "tools")[0] if kind] == ["tool_call"]
    assert split_action("nonsense", "tags")[0] == [("unread", "nonsense")]


@given(st.lists(st.tuples(SOME_TEXT, SOME_TEXT), max_size=4), st.sampled_from(sorted(PROMPTS)), st.integers(0, 5))
def test_any_reply_can_be_put_together_again(texts: list[tuple[str, str]], name: str, claimed: int) -> None:
    shown = PROMPTS[name].shown([Passage(str(number), *own) for number, own in enumerate(texts)])
    reply = PROMPTS[name].render_shown(shown)
    assert put_together(split_reply(reply, len(shown))) == reply
    assert put_together(split_reply(reply, claimed)) == reply


@given(SOME_TEXT, st.integers(0, 3))
def test_text_that_is_no_reply_can_be_put_together_again(text: str, claimed: int) -> None:
    assert put_together(split_reply(text, claimed)) == text


def test_a_passage_has_one_text_at_any_rank() -> None:
    prompt = PROMPTS["search-r1"]
    first = split_reply(prompt.render_shown(prompt.shown(PASSAGES)), 2)
    second = split_reply(prompt.render_shown(prompt.shown(PASSAGES[::-1])), 2)
    assert first["texts"] == second["texts"][::-1]
    assert first["ranked"]


def test_every_episode_comes_out_of_the_blocks_as_it_went_in() -> None:
    played = play(8)
    many = [episode(number, passages=[PASSAGES[number % 2]]) for number in range(2 * BLOCK + 3)]
    packed = pack([("real", played), ("made", many)], ["hop2", "hop3", "nq"])
    for run, own in enumerate((sorted(played, key=lambda e: (e.question.dataset, e.group, e.seed)), many)):
        for place, whole in enumerate(own):
            turns = turns_of(packed, run, place)
            assert ["".join(text for _, text in turn["pieces"]) for turn in turns] == [
                turn.action.text for turn in whole.turns
            ]
            assert [put_together(turn) for turn in turns] == [turn.observation for turn in whole.turns]
            assert [turn["tokens"] for turn in turns] == [len(turn.action.token_ids) for turn in whole.turns]
    assert [unpacked(block) for block in packed.texts] == [[f"{p.title}: {p.text}" for p in PASSAGES]]


def test_the_table_has_verdicts_tries_and_sums_of_channels() -> None:
    nan = replace(episode(2, gains=(math.nan, 1.0)), stop=Stop.SCORING_FAILED, error="no number")
    tried = [episode(1, seed=9), episode(1, seed=2, answer="Pierre Curie"), nan, episode(0, dataset="musique")]
    packed = pack([("run", tried)], ["musique", "nq"])
    run, questions = packed.table["runs"][0], packed.table["questions"]
    assert [questions["id"][own] for own in run["question"]] == ["musique-0", "nq-1", "nq-1", "nq-2"]
    assert run["try"] == [1, 1, 2, 1]
    assert run["won"] == [1, 0, 1, 1]
    assert run["f1"] == [1, 0.5, 1, 1]
    assert run["channels"]["info_gain"] == [0.5, 0.5, 0.5, None]
    assert packed.table["failed"] == ["search_failed", "scoring_failed"]
    json.dumps(packed.table, allow_nan=False)


@given(st.recursive(SOME_TEXT, lambda inner: st.lists(inner) | st.dictionaries(SOME_TEXT, inner), max_leaves=5))
def test_data_in_a_script_element_can_neither_end_it_nor_change(value: Any) -> None:
    written = to_script(value)
    assert not set(written) & set("<>&\u2028\u2029")
    assert written.isascii()
    assert json.loads(written) == value


def page_of(tmp_path: Path, episodes: list[Trajectory]) -> str:
    evaluation(tmp_path / "run", episodes)
    training(tmp_path / "run", rows_of_all_kinds())
    write_report([tmp_path / "run"], tmp_path / "r.html", title=f"{HOSTILE} title")
    return (tmp_path / "r.html").read_text()


def test_the_page_is_whole_loads_nothing_and_allows_only_its_own_script(tmp_path: Path) -> None:
    page = page_of(tmp_path, [episode(1, question=HOSTILE, think=HOSTILE)])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert f"script-src &#39;sha256-{digest}&#39;;" in policy
    assert "connect-src &#39;none&#39;" in policy
    assert "default-src &#39;none&#39;" in policy

    class Strict(HTMLParser):
        void = ("meta", "br", "input", "path", "use", "rect", "link")
        seen: set[str] = set()  # noqa: RUF012
        open_tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not any(name == "style" or name.startswith("on") for name, _ in attrs)
            assert tag not in ("img", "iframe", "object", "embed", "link", "base")
            for name, value in attrs:
                assert name not in ("src", "srcset", "action", "data")
                assert not name.endswith("href") or str(value).startswith("#")
                assert name != "id" or tag == "path" or str(value) not in self.seen or self.open_tags[-1] == "defs"
                if name == "id":
                    self.seen.add(str(value))
            if tag not in self.void:
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert tag in self.void or self.open_tags.pop() == tag

    parser = Strict()
    parser.feed(page)
    assert parser.open_tags == []


def test_the_script_never_makes_markup_of_text() -> None:
    script = "\n".join((files("agentgym_ig.report") / name).read_text() for name in SCRIPTS)
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "srcdoc",
    ):
        assert way not in script


def test_figures_stand_beside_each_other_with_intervals_and_differences(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / "a", several([1])), evaluation(tmp_path / "b", several([1, 3, 4]))]
    found = find_runs(folders)
    both = table(found.evaluations, ["em"])
    assert both.groups == [("EM", ["a", "b", "difference"])]
    cells = {(line.name, line.domain): [cell.text for cell in line.cells] for line in both.lines}
    assert cells == {
        ("nq", "in-domain"): ["16.7", "33.3", "+16.7"],
        ("mean", "in-domain"): ["16.7", "33.3", "+16.7"],
        ("musique", "out-of-domain"): ["0.0", "16.7", "+16.7"],
        ("mean", "out-of-domain"): ["0.0", "16.7", "+16.7"],
        ("mean", "all"): ["8.3", "25.0", "+16.7"],
    }
    assert re.fullmatch(r"0\.0–[\d.]+", both.lines[0].cells[0].interval)
    assert both.lines[0].cells[2].better is True
    alone = table(found.evaluations[:1])
    headings = [heading for heading, _ in alone.groups]
    assert headings[:3] == ["EM", "F1", "recall"]
    assert "nats a turn" in headings


def test_curves_of_whatever_a_run_has_logged(tmp_path: Path) -> None:
    runs = find_runs([training(tmp_path / "a", rows_of_all_kinds()), training(tmp_path / "b", [row(1), row(2)])])
    panels, more = training_panels(runs.trainings)
    assert [panel.title for panel in panels][:3] == ["Exact match", "F1 in evaluations", "Entropy"]
    keys = {key.label: key.value for key in panels[0].keys}
    assert keys == {
        "a, in-domain": "0.5", "a, out-of-domain": "0.25", "a, training batch": "0.6", "b, training batch": "0.2",
    }  # fmt: skip
    assert [panel.title for panel in more] == ["Clipped tokens", "Seconds", "episodes_failed", "my_$channel_{"]
    for panel in panels + more:
        assert " style=" not in panel.svg
        assert "currentColor" in panel.svg
    assert "episodes played" in panels[0].svg


def test_a_long_run_is_drawn_in_few_points(tmp_path: Path) -> None:
    rows = [{"step": step, "em": step % 2} for step in range(1, 5 * MOST_POINTS)]
    (panel,), _ = training_panels(find_runs([training(tmp_path / "a", rows)]).trainings)
    assert len(panel.svg) < 40_000
    assert ">step<" in panel.svg


def test_channels_are_means_by_turn_of_won_and_lost() -> None:
    values = {"cost": {"run": [(1, True, -1.0), (1, True, -3.0), (2, False, 1.0)]}, "format": {"run": [(1, True, 0.0)]}}
    (panel,) = channel_panels(values)  # one that is always 0 says nothing
    assert [(key.label, key.value) for key in panel.keys] == [("won", "-2"), ("lost", "1")]


def test_runs_are_found_below_a_folder_and_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    out = tmp_path / "run"
    training(out, [row(1)])
    for step in (10, 9):
        evaluation(out / f"step-{step}", several([1]))
    evaluation(out / "checkpoints" / "no", several([1]))
    found = find_runs([out])
    assert [own.label for own in found.evaluations] == ["step-9", "step-10"]
    assert [own.label for own in found.trainings] == ["run"]
    evaluation(tmp_path / "other" / "eval", several([1]))
    found = find_runs([out / "step-9", tmp_path / "other" / "eval", tmp_path / "other"])
    assert [own.label for own in found.evaluations] == ["run/step-9", "other/eval"]


def test_what_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    folder = training(evaluation(tmp_path / "e", several([1])), [row(1)])
    for name, whole in (("episodes.jsonl", 12), ("metrics.jsonl", 1)):
        with (folder / name).open("a") as out:
            out.write('{"question": {"id"')
        found = find_runs([folder])
        count = len(list(found.evaluations[0].episodes())) if whole == 12 else len(found.trainings[0].rows)
        assert count == whole


def test_what_cannot_be_shown_is_refused_with_what_to_do(tmp_path: Path) -> None:
    evaluation(tmp_path / "igpo", several([1]))
    evaluation(tmp_path / "mine", several([1]), suite="mine")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"is of suite igpo and .* is of suite mine; .* give runs of one suite"):
        find_runs([tmp_path / "igpo", tmp_path / "mine"])
    for name, says in (
        ("none", "no folder"),
        ("empty", "neither evaluation.json nor metrics.jsonl"),
        ("file", "a file"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{says}.*agentgym-ig eval"):
            find_runs([tmp_path / "igpo", tmp_path / name])
    damaged: dict[str, Any] = {
        "no JSON": "{",
        "no figures by dataset": {"suite": "x"},
        "no figures": [],
        "format 7": {"format": 7, "datasets": {}},
        "of which suite": {"datasets": {}},
        "by dataset": {"suite": "x", "datasets": {"nq": 1}},
    }
    for says, content in damaged.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "igpo" / "evaluation.json").write_text(text)
        with pytest.raises(ValueError, match=f"{says}.*evaluate again"):
            find_runs([tmp_path / "igpo"])
    for line in ("{\n", "1\n"):
        (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1}\n' + line)
        with pytest.raises(ValueError, match=r"metrics.jsonl:2"):
            find_runs([tmp_path / "empty"])
    (tmp_path / "mine" / "episodes.jsonl").write_text("[]\n")
    with pytest.raises(CorpusError, match=r"episodes.jsonl:1 is no episode"):
        write_report([tmp_path / "mine"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_trajectories_survive_json() -> None:
    for own in play(4):
        assert from_json(json.loads(json.dumps(to_json(own)))) == own
