"""The report in a real browser: headless Chromium, driven as a person would use it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agentgym_ig.report import write_report
from agentgym_ig.text import clean
from agentgym_ig.types import Passage
from tests.report_runs import HOSTILE, episode, evaluation, rows_of_all_kinds, several, training

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'agentgym_ig[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
expect = api.expect
Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a page; at the end nothing may have gone wrong in it, and nothing may have been loaded but itself."""
    wrong: list[str] = []
    loaded: list[str] = []
    asked: set[str] = set()
    contexts = []

    def opening(path: Path, place: str = "", **settings: Any) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1300, "height": 850}} | settings))
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: loaded.append(request.url.partition("#")[0]))
        asked.add(path.as_uri())
        page.goto(path.as_uri() + place)
        return page

    yield opening
    for context in contexts:
        context.close()
    assert wrong == []
    assert {url for url in loaded if not url.startswith("blob:")} <= asked


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a training run and an evaluation of 12 episodes, of which 1 and 4 are won."""
    folder = tmp_path_factory.mktemp("one")
    training(evaluation(folder / "run", several([1, 4])), rows_of_all_kinds())
    write_report([folder / "run"], folder / "report.html", reload=3600)
    return folder / "report.html"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two evaluations: the first wins 1 and 4, the second 1 and 7, and lacks the last question."""
    folder = tmp_path_factory.mktemp("two")
    runs = [evaluation(folder / "old", several([1, 4])), evaluation(folder / "new", several([1, 7], count=11))]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


def count(page: Page, said: str) -> None:
    expect(page.locator("#count")).to_contain_text(said)


def chosen(page: Page, name: str) -> None:
    """The episode is chosen in the list, shown in the reader, and named in the address."""
    expect(page.locator("#reader")).to_have_attribute("data-id", name)
    expect(page.locator(".row[aria-selected=true] .asked")).to_have_text(page.locator("#reader h2").inner_text())
    assert name.replace("/", "%2F") in page.url


def test_it_opens_on_the_figures_and_curves(one: Path, opened: Open) -> None:
    page = opened(one)
    expect(page.locator("h1")).to_have_text("run on igpo")
    expect(page.locator("#overview table")).to_contain_text("out-of-domain")
    assert page.locator("#overview figure svg").count() >= 5
    expect(page.locator("#alarms + ul")).to_contain_text("run, step 5 to 6: entropy_collapse: it is <b>gone</b>")
    assert page.locator("#overview").evaluate("own => own.querySelectorAll('b').length") > 3
    expect(page.locator("#reload")).to_be_checked()
    page.click("button.example >> nth=0")
    expect(page.locator("#reader .pill").first).to_contain_text("won")
    page.go_back()
    expect(page.locator("#overview")).to_be_visible()


def test_filters(one: Path, opened: Open) -> None:
    page = opened(one, "#view=episodes")
    count(page, "12 episodes, 16.7 % won")
    page.select_option("#outcome", "won")
    count(page, "2 of 12 episodes, 100.0 % won")
    page.select_option("#dataset", "musique")
    count(page, "1 of 12")
    page.select_option("#outcome", "near")
    count(page, "5 of 12")
    page.click("#clear")
    page.select_option("#domain", "in_domain")
    count(page, "6 of 12")
    page.click("#clear")
    page.fill("#turns-min", "3")
    count(page, "6 of 12")
    page.fill("#turns-max", "2")
    count(page, "0 of 12")
    expect(page.locator("#reader")).to_have_text("No episode passes all filters.")
    page.click("#clear")
    page.select_option("#channel", "info_gain")
    page.fill("#channel-min", "1.5")
    count(page, "5 of 12")  # 6, 8, 10: a quarter of the number; 9, 11: half a nat less
    page.click("#clear")
    page.select_option("#stop", "answered")
    count(page, "12 episodes")


def test_search_in_questions_answers_and_turns(one: Path, opened: Open) -> None:
    page = opened(one, "#view=episodes")
    page.fill("#text", "Number 7")
    count(page, "1 of 12")
    chosen(page, "nq/nq-7")
    page.fill("#text", "skłodowska")
    count(page, "12 episodes")
    page.fill("#text", "capital of poland")
    count(page, "0 of 12")
    page.check("#everywhere")
    count(page, "12 episodes")
    page.fill("#text", "number 7")
    count(page, "1 of 12")
    page.fill("#text", "glows in the darkness")
    count(page, "0 of 12")


def test_keyboard(one: Path, opened: Open) -> None:
    page = opened(one, "#view=episodes")
    chosen(page, "nq/nq-1")
    page.keyboard.press("j")
    chosen(page, "nq/nq-3")
    page.keyboard.press("k")
    chosen(page, "nq/nq-1")
    page.keyboard.press("/")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("jk")
    count(page, "0 of 12")
    page.keyboard.press("Escape")
    page.fill("#text", "")
    page.focus("#text")
    page.keyboard.press("Enter")
    expect(page.locator("#list")).to_be_focused()
    for key, name in (("End", "musique/musique-10"), ("ArrowUp", "musique/musique-8"), ("Home", "nq/nq-1")):
        page.keyboard.press(key)
        chosen(page, name)
    page.keyboard.press("Enter")
    expect(page.locator("#reader")).to_be_focused()
    page.keyboard.press("m")
    expect(page.locator("#mask")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Escape")
    expect(page.locator("#list")).to_be_focused()
    outline = page.locator("#list").evaluate("own => getComputedStyle(own).outlineStyle")
    assert outline == "solid"


def test_everything_can_be_reached_by_tab_and_has_a_name(one: Path, opened: Open) -> None:
    page = opened(one, "#view=episodes")
    chosen(page, "nq/nq-1")
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"to-overview", "text", "outcome", "dataset", "channel-max", "clear", "list", "mask", "Next"} <= seen
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, [role]')].filter((own) => own.offsetParent
        && !(own.ariaLabel || own.labels?.length || own.textContent.trim())).map((own) => own.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("[role=option]").first.get_attribute("aria-setsize") == "12"
    active = page.locator("#list").get_attribute("aria-activedescendant")
    expect(page.locator(f"#{active}")).to_have_attribute("aria-selected", "true")


def test_a_link_leads_to_its_episode_and_filters(one: Path, opened: Open) -> None:
    page = opened(one, "#id=musique%2Fmusique-4&outcome=won")
    chosen(page, "musique/musique-4")
    count(page, "2 of 12")
    page.goto(page.url.partition("#")[0] + "#view=episodes&id=nq/nq-9")
    chosen(page, "nq/nq-9")
    count(page, "12 episodes")


def test_an_episode_as_a_person_reads_it(one: Path, opened: Open) -> None:
    page = opened(one, "#id=nq/nq-9")
    reader = page.locator("#reader")
    expect(reader.locator("h2")).to_have_text("Who was born in Warsaw, number 9?")
    expect(reader.locator("p.gold")).to_contain_text("Marie Curie")
    expect(reader.locator(".pill")).to_have_text("✗ lost")
    expect(reader.locator(".turn")).to_have_count(3)
    first = reader.locator(".turn").first
    expect(first.locator(".think p")).to_have_text("I must look it up.")
    expect(first.locator(".search p")).to_have_text("born in Warsaw")
    expect(first.locator("mark")).to_have_text("Marie  Curie")
    expect(first.locator(".passage.gold .badge").first).to_have_text("supporting")
    folded = first.locator(".passage").nth(1)
    height = folded.bounding_box()
    folded.locator("button").click()
    expect(folded.locator("button")).to_have_attribute("aria-expanded", "true")
    opened_height = folded.bounding_box()
    assert height
    assert opened_height
    assert opened_height["height"] > height["height"]
    widths = reader.locator(".bar").evaluate_all("bars => bars.map((bar) => [bar.className, bar.style.width])")
    assert widths[0] == ["bar up", "50%"]  # the largest, 2.25
    assert widths[1][0] == "bar down"
    assert float(widths[1][1].rstrip("%")) == pytest.approx(50 * 0.5 / 2.25, abs=0.01)
    assert len(widths) == 2  # the last turn has no gain


def test_the_token_mask_shows_exactly_what_was_sampled(one: Path, opened: Open) -> None:
    page = opened(one, "#id=nq/nq-9&mask=yes")
    whole = episode(9, answer="Pierre Curie", gains=(2.25, -0.5))
    sampled = page.locator("pre.sampled")
    expect(sampled).to_have_count(3)
    assert sampled.evaluate_all("all => all.map((own) => own.textContent)") == [t.action.text for t in whole.turns]
    masked = page.locator("pre.masked").evaluate_all("all => all.map((own) => own.textContent)")
    assert masked == [*(m.text for m in whole.opening), *(t.observation for t in whole.turns if t.observation)]
    expect(page.locator(".exact .label").nth(1)).to_have_text("agent: 9 tokens, with loss")
    page.click("#mask")
    expect(page.locator("pre.sampled")).to_have_count(0)


def test_two_runs_side_by_side(two: Path, opened: Open) -> None:
    page = opened(two, "#view=episodes")
    expect(page.locator("#beside")).to_have_value("old")
    count(page, "11 episodes")
    page.select_option("#outcome", "won-lost")
    count(page, "1 of 11")
    chosen(page, "nq/nq-7")
    expect(page.locator("#reader article h3")).to_have_text(["new", "old"])
    expect(page.locator("#reader article .pill")).to_have_text(["✓ won", "✗ lost"])
    page.select_option("#outcome", "lost-won")
    count(page, "1 of 11")
    chosen(page, "musique/musique-4")
    page.select_option("#run", "old")
    page.click("#clear")
    count(page, "12 episodes")
    page.fill("#text", "number 11")
    expect(page.locator("#reader article").nth(1)).to_contain_text("No episode of this question")
    page.select_option("#beside", "-")
    expect(page.locator("#reader article")).to_have_count(1)
    page.click("#to-overview")
    expect(page.locator("#overview table").first).to_contain_text("difference")


def test_hostile_text_is_shown_as_it_is_and_never_runs(tmp_path: Path, opened: Open) -> None:
    passages = [Passage("<b>p1", HOSTILE, HOSTILE), Passage("p2", "`${1}`", HOSTILE)]
    bad = episode(2, question=HOSTILE, think=HOSTILE, passages=passages, error=HOSTILE)  # its first turn is malformed
    own = episode(3, question=HOSTILE, passages=passages, error=HOSTILE, think="fine")
    evaluation(tmp_path / "run", [own, bad], note={clean(HOSTILE): {"deeper": clean(HOSTILE)}})
    rows = rows_of_all_kinds()
    rows[-1] |= {"alarms": [f"{HOSTILE}: {HOSTILE}"], HOSTILE: 1.0}
    training(tmp_path / "run", rows)
    write_report([tmp_path / "run"], tmp_path / "report.html", title=HOSTILE)
    page = opened(tmp_path / "report.html")
    title = page.title()
    assert "<script>document.title='owned'" in title
    for place in ("#id=nq/nq-2", "#id=nq/nq-3", "#id=nq/nq-3&mask=yes", f"#view=episodes&text={HOSTILE[:40]}"):
        page.goto(page.url.partition("#")[0] + place)
        expect(page.locator("#reader h2")).to_contain_text("document.title='owned'")
        assert "{{ 7 * 7 }} ${document.title" in page.locator("#reader h2").inner_text()
    page.click("#to-overview")
    for details in page.locator("#overview details").all():
        details.evaluate("own => { own.open = true; }")
    page.wait_for_timeout(200)
    assert page.title() == title
    made = "() => document.querySelectorAll('main img, main script, main style, main textarea, main [onload]').length"
    assert page.evaluate(made) == 0


def test_the_policy_stops_a_script_that_did_get_in(one: Path, browser: Browser, tmp_path: Path) -> None:
    planted = tmp_path / "planted.html"
    inline = (
        "<main id='overview'><script>document.title='owned'</script><b id='x' onclick=\"document.title='owned'\">x</b>"
    )
    planted.write_text(one.read_text().replace('<main id="overview">', inline))
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(planted.as_uri())
    page.click("#x")
    tried = "() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } }"
    assert page.evaluate(tried) == "TypeError"
    assert page.title() == "run on igpo"
    assert len([text for text in refused if "Content Security Policy" in text]) >= 2
    page.close()


def test_a_long_list_makes_few_rows(tmp_path: Path, opened: Open) -> None:
    evaluation(tmp_path / "run", [episode(number, passages=[]) for number in range(1500)])
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = opened(tmp_path / "report.html", "#view=episodes")
    count(page, "1,500 episodes")
    assert page.locator(".row").count() < 40
    page.focus("#list")
    page.keyboard.press("End")
    chosen(page, "nq/nq-1499")
    assert page.locator(".row").count() < 40
    page.mouse.move(200, 500)
    page.mouse.wheel(0, -70 * 700)
    expect(page.locator(".row[aria-posinset='800']")).to_be_attached()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(two: Path, one: Path, opened: Open, scheme: str) -> None:
    for path in (one, two):
        page = opened(path, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
        fits = "() => document.documentElement.scrollWidth <= innerWidth"
        assert page.evaluate(fits)
        page.click("#to-episodes")
        expect(page.locator("#list")).to_be_visible()
        expect(page.locator("#reader")).to_be_hidden()
        page.click("#more")
        expect(page.locator("#outcome")).to_be_visible()
        page.click("#more")
        page.locator(".row").nth(1).tap()
        expect(page.locator("#reader h2")).to_be_visible()
        expect(page.locator("#list")).to_be_hidden()
        assert page.evaluate(fits)
        page.click("text=← List")
        expect(page.locator("#list")).to_be_visible()
        page.goto(page.url.partition("#")[0] + "#id=nq/nq-3")
        expect(page.locator("#reader h2")).to_contain_text("number 3?")
        paper = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        red = int(re.findall(r"\d+", paper)[0])
        assert red > 200 if scheme == "light" else red < 60


def test_a_run_without_episodes_has_no_list(tmp_path: Path, opened: Open) -> None:
    training(tmp_path / "run", [])
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = opened(tmp_path / "report.html", "#view=episodes")
    expect(page.locator("#overview")).to_contain_text("no step done yet")
    expect(page.locator("#overview")).to_contain_text("kept no episodes")
    expect(page.locator("#to-episodes")).to_be_hidden()
