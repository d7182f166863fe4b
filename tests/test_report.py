"""The report, opened in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agentgym_ig.records import from_json, to_json
from agentgym_ig.report import write_report
from tests.tiny import play

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def report(text: str = "plain") -> dict[str, Any]:
    means = {"em": 0.25, "f1": 0.5}
    datasets = {
        name: {"domain": domain, "n": 4, **means}
        for name, domain in (("hop2", "in_domain"), ("compose2", "out_of_domain"))
    }
    figures = {"in_domain": means, "out_of_domain": means, "datasets": datasets}
    episode = to_json(play(1)[0]) | {"domain": "in_domain"}
    episode["turns"][0]["rewards"]["info_gain"] = -0.5
    episode["turns"][0]["observation"] = text
    episode["question"]["text"] = text
    curve = [
        {"step": 1, "episodes": 96, "episodes_failed": 0, "em": 0.1},
        {"step": 2, "episodes": 0, "episodes_failed": 96},
        {"step": 3, "episodes": 96, "episodes_failed": 0, "em": 0.3, "evaluation": {"in_domain": means}},
    ]
    return {
        "recipe": "igpo", "seed": 0, "seconds": 12.0, "before": figures, "after": figures, "curve": curve,
        "compare": {"grpo": {"after": figures, "curve": curve}}, "episodes": [episode],
    }  # fmt: skip


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)
    assert "gain -0.50" in page
    assert "after grpo" in page
    assert page.count("<article>") == 1

    class Strict(HTMLParser):
        open_tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "br", "path", "use", "rect"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("path", "use", "rect"):
                assert self.open_tags.pop() == tag

    parser = Strict()
    parser.feed(page)
    assert parser.open_tags == []


def test_hostile_text_is_shown_and_not_run(tmp_path: Path) -> None:
    write_report(report(HOSTILE), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    write_report(report(HOSTILE), tmp_path / "r.html")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", (tmp_path / "r.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "<title>agentgym_ig: igpo, seed 0</title>" in done.stdout
    assert "In-domain and out-of-domain" in done.stdout


def test_trajectories_survive_json() -> None:
    for episode in play(4):
        assert from_json(json.loads(json.dumps(to_json(episode)))) == episode
