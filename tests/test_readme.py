"""The README's Python runs, and what its text names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("What is the ")
    assert "<information>Amber Ashford is a" in printed
    assert "'outcome': 0.0" in printed


@pytest.mark.parametrize("page", ["environments", "channels", "evaluation", "miniwiki"])
def test_python_of_the_docs_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": page}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL):
        exec(compile(block, page, "exec"), names)
    printed = capsys.readouterr().out
    said = {"environments": "turn 1 of 5", "channels": "-0.5\n0.1\n", "evaluation": "1.0", "miniwiki": "Marie Curie"}
    assert said[page] in printed


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_commands_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        if target not in ("and", "targets"):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
