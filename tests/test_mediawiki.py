"""MediaWiki dumps of our own writing: which pages are articles, and what is left of their wiki text."""

import bz2
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig import CorpusError
from agentgym_ig.data.mediawiki import Page, plain_pages, plain_text, read_pages

ADA = """{{Short description|Playwright}}
{{Infobox person
| name = Ada Brook
| birth_place = [[Norwick]]
}}
'''Ada Brook''' ({{IPAc-en|x}}; née '''Lane'''; 3 May 1815 – 1852) was a
[[Playwright|writer of plays]]<ref name="a">{{cite book|title=No}}</ref>
from [[Norwick]].<!-- a remark --> She walked {{convert|5|km|mi}}
&amp; more. [[File:Ada.jpg|thumb|A [[portrait]] of her]]
[[Category:Writers]] [[de:Ada Brook]] [http://example.org her site] __NOTOC__

== Life ==
* first entry
* second ''entry''
{| class="wikitable"
! heading
|-
| cell
|}
=== Youth ===
Of {{nowrap|her youth}} little is known.<math>x^2</math>
== References ==
{{reflist}}
a source
=== Older ===
another
== Legacy ==
A play, [[:Category:Plays|remembered]]. <br/>End {{unknown|x}}.
"""
PLAIN = (
    "Ada Brook (née Lane; 3 May 1815 – 1852) was a writer of plays from Norwick. She walked 5 km & more. her site "
    "first entry second entry Of her youth little is known. A play, remembered. End."
)
PAGES = [
    ("1", "Ada Brook", 0, "", ADA),
    ("2", "Talk:Ada Brook", 1, "", "a remark"),
    ("3", "A. Brook", 0, '<redirect title="Ada Brook" />', "#REDIRECT [[Ada Brook]]"),
    ("4", "Brook", 0, "", "'''Brook''' may be:\n* [[Ada Brook]]\n{{disambiguation|surname}}"),
    ("5", "Reed (disambiguation)", 0, "", "many"),
    ("6", "Norwick", 0, "", "'''Norwick''' is a town.{{disambiguation needed|date=May 2020}} " + "word " * 230),
    ("7", "Void", 0, "", "{{Infobox}}"),
]


def dump(path: Path, pages: list[tuple[str, str, int, str, str]] = PAGES) -> Path:
    body = "".join(
        f"<page><title>{escape(title)}</title><ns>{space}</ns><id>{own}</id>{redirect}<revision><id>9{own}</id>"
        f"<contributor><username>x</username><id>77</id></contributor>"
        f'<text bytes="1">{escape(text)}</text></revision></page>'
        for own, title, space, redirect, text in pages
    )
    info = "<siteinfo><sitename>Wikipedia</sitename></siteinfo>"
    whole = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="en">{info}{body}</mediawiki>'
    path.write_bytes(bz2.compress(whole.encode()) if path.suffix == ".bz2" else whole.encode())
    return path


def test_markup_goes_and_prose_stays() -> None:
    assert plain_text(ADA) == PLAIN


@pytest.mark.parametrize(
    ("wikitext", "plain"),
    [
        ("a [[b|c]]s [[d]]e [[#part|f]]", "a cs de f"),
        ("''it'' '''bold''' ''''' both '''''", "it bold both"),
        ("[[File:a.jpg|thumb|left|see [[b]] and {{c}}]]text", "text"),
        ("a<ref>b {{c|<nowiki>d</nowiki>}}</ref>, e<ref name=f /> g", "a, e g"),
        ("{{lang|fr|bon ''mot''}} {{circa|1850}} {{ill|Ann|de}} {{lang}}", "bon mot c. 1850 Ann"),
        ("x ({{a}}) y ( ; z) w ({{b}}, )", "x y (z) w"),
        ("price &pound;5&nbsp;m &lt;b&gt; 3 < 4", "price £5 m <b> 3 < 4"),
        ("== Notes ==\nno\n== See also ==\n* no\n== After ==\nyes", "yes"),
        ("[http://a.b] [http://a.b words here] http://c.d", "words here http://c.d"),
        ("{{unclosed [[also unclosed", "{{unclosed [[also unclosed"),
        ("", ""),
    ],
)
def test_pieces_of_wiki_text(wikitext: str, plain: str) -> None:
    assert plain_text(wikitext) == plain


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="[]{}|'=<>/&;*#:!- \nabrefFil.", max_size=80))
def test_no_wiki_text_stops_a_run(wikitext: str) -> None:
    text = plain_text(wikitext)
    assert text == " ".join(text.split())


@pytest.mark.parametrize("name", ["dump.xml", "dump.xml.bz2"])
def test_articles_are_told_from_other_pages(tmp_path: Path, name: str) -> None:
    pages = list(read_pages(dump(tmp_path / name)))
    assert [(page.id, page.why) for page in pages] == [
        ("1", None), ("2", "namespace"), ("3", "redirect"), ("4", "disambiguation"), ("5", "disambiguation"),
        ("6", None), ("7", None),
    ]  # fmt: skip
    assert pages[0].title == "Ada Brook"
    assert all(page.text == "" for page in pages if page.why)


def test_a_dump_of_several_streams(tmp_path: Path) -> None:
    """As the multistream dumps have it: an archive of archives, end to end."""
    whole = bz2.decompress(dump(tmp_path / "one.xml.bz2").read_bytes())
    half = len(whole) // 2
    (tmp_path / "two.xml.bz2").write_bytes(bz2.compress(whole[:half]) + bz2.compress(whole[half:]))
    assert list(read_pages(tmp_path / "two.xml.bz2")) == list(read_pages(tmp_path / "one.xml.bz2"))


@pytest.mark.slow
def test_workers_change_nothing() -> None:
    pages = [Page(str(i), f"T{i}", f"'''T{i}''' has [[link {i}]]s.", None if i % 3 else "redirect") for i in range(400)]
    assert list(plain_pages(pages, workers=2)) == list(plain_pages(pages))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "page 1: no element found"),
        ("<html></html>", "its first element is html, wanted mediawiki"),
        ("<mediawiki><page><title>a</title></page></mediawiki>", "page 1: no ns, id, revision in it"),
        ("<mediawiki><page><title>a</title>", "page 1: no element found"),
        ("plain text", "page 1: syntax error"),
    ],
)
def test_what_is_no_dump_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "dump.xml").write_text(content)
    with pytest.raises(CorpusError, match=message):
        list(read_pages(tmp_path / "dump.xml"))


def test_a_dump_cut_short_is_told(tmp_path: Path) -> None:
    whole = dump(tmp_path / "dump.xml.bz2").read_bytes()
    (tmp_path / "cut.xml.bz2").write_bytes(whole[:-20])
    with pytest.raises(CorpusError, match=r"cut\.xml\.bz2 is no whole MediaWiki dump"):
        list(read_pages(tmp_path / "cut.xml.bz2"))
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.xml"):
        list(read_pages(tmp_path / "none.xml"))
