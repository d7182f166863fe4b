"""MediaWiki XML dumps: their articles, and the plain text of an article's wiki text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agentgym_ig.data.jsonl import BROKEN, open_bytes
from agentgym_ig.errors import CorpusError

if TYPE_CHECKING:
    from mwparserfromhell.nodes import Node
    from mwparserfromhell.wikicode import Wikicode

BATCH = 64
"""Pages that a worker takes at a time."""
AHEAD = 3
"""Batches that are read ahead for every worker."""

TAIL = frozenset({"references", "external links", "see also", "further reading", "notes", "footnotes", "sources"})
TAIL |= {"bibliography", "citations", "notes and references", "works cited", "gallery"}
"""Sections that hold no prose; each is left out with those below it."""
MEDIA = frozenset({"file", "image", "category", "media"})
HIDDEN = frozenset({"ref", "references", "table", "gallery", "math", "timeline", "imagemap", "score", "graph", "hiero"})
HIDDEN |= {"syntaxhighlight", "source", "templatestyles", "chem", "section", "noinclude", "includeonly"}

_DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:[\w -]*disambig(?:uation)?(?: cleanup| page)?|dab|hndis|geodis|numberdis)\s*[|}]"
    r"|__DISAMBIG__",
    re.IGNORECASE,
)
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*|simple")
_MAGIC = re.compile(r"__[A-Z]+__")
_EMPTIED = (
    (re.compile(r"\(\s*(?:[,;:]\s*)+"), "("),
    (re.compile(r"(?:\s*[,;:])+\s*\)"), ")"),
    (re.compile(r"\s*\(\s*\)"), ""),
    (re.compile(r"\s+([,.;:])(?=\s|$)"), r"\1"),
)
"""What is left of brackets that held templates alone."""

KEPT_TEMPLATES: dict[str, Callable[[list[str]], str]] = {
    "nowrap": lambda given: given[0],
    "nobr": lambda given: given[0],
    "lang": lambda given: given[1],
    "transl": lambda given: given[-1],
    "transliteration": lambda given: given[-1],
    "abbr": lambda given: given[0],
    "ill": lambda given: given[0],
    "interlanguage link": lambda given: given[0],
    "formatnum": lambda given: given[0],
    "convert": lambda given: f"{given[0]} {given[1]}",
    "cvt": lambda given: f"{given[0]} {given[1]}",
    "circa": lambda given: f"c. {given[0]}",
    "c.": lambda given: f"c. {given[0]}",
    "'": lambda given: "'",
    "'s": lambda given: "'s",
    "snd": lambda given: " – ",
    "spaced ndash": lambda given: " – ",
}
"""Templates that stand for words of the sentence they are in; all others are left out."""


class Page(NamedTuple):
    """A page of a dump. `why` says why it is no article; its text is then empty."""

    id: str
    title: str
    text: str
    why: str | None = None


def read_pages(path: Path) -> Iterator[Page]:
    """All pages of an XML dump (`.xml`, `.xml.bz2`, `.xml.gz`) in its order, in bounded memory.

    Redirects, pages outside of the main namespace and disambiguation pages have a reason in `why`.

    Raises FileNotFoundError, and CorpusError for a file that is no dump, or is cut short.
    """
    number = 0
    try:
        with open_bytes(path) as content:
            events = ET.iterparse(content, events=("start", "end"))
            _, root = next(events)
            if _tag(root) != "mediawiki":
                raise ValueError(f"its first element is {_tag(root)}, wanted mediawiki")
            for event, element in events:
                if event == "end" and _tag(element) == "page":
                    yield _page(element)
                    number += 1
                    root.clear()
    except (ET.ParseError, ValueError, StopIteration, *BROKEN) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise CorpusError(
            f"{path} is no whole MediaWiki dump: page {number + 1}: {error or 'nothing in it'}"
        ) from error


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _page(element: ET.Element) -> Page:
    fields = {_tag(child): child for child in element}
    missing = [name for name in ("title", "ns", "id", "revision") if name not in fields]
    if missing:
        raise ValueError(f"no {', '.join(missing)} in it")
    own, title = (str(fields[name].text or "") for name in ("id", "title"))
    if fields["ns"].text != "0":
        return Page(own, title, "", "namespace")
    if "redirect" in fields:
        return Page(own, title, "", "redirect")
    text = next((str(child.text or "") for child in fields["revision"] if _tag(child) == "text"), "")
    if title.endswith("(disambiguation)") or _DISAMBIGUATION.search(text):
        return Page(own, title, "", "disambiguation")
    return Page(own, title, text)


def plain_pages(pages: Iterable[Page], workers: int = 1) -> Iterator[Page]:
    """The pages with plain text for wiki text, in their order; `workers` processes share the work."""
    if workers <= 1:
        yield from map(_plain_page, pages)
        return
    left = iter(pages)
    batches = iter(lambda: tuple(islice(left, BATCH)), ())
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        going: deque[Future[list[Page]]] = deque()
        going.extend(pool.submit(_plain_batch, batch) for batch in islice(batches, workers * AHEAD))
        while going:
            made = going.popleft().result()
            going.extend(pool.submit(_plain_batch, batch) for batch in islice(batches, 1))
            yield from made


def _plain_batch(pages: tuple[Page, ...]) -> list[Page]:
    return [_plain_page(page) for page in pages]


def _plain_page(page: Page) -> Page:
    from mwparserfromhell.parser import ParserError

    try:
        return page._replace(text=plain_text(page.text)) if page.why is None else page
    except (ParserError, RecursionError):
        return page._replace(text="", why="unreadable")


def plain_text(wikitext: str) -> str:
    """The prose of an article: no markup, tables, references, media, headings, lists of sources; white space folded.

    Templates are left out but for a few that stand for words (`KEPT_TEMPLATES`).
    """
    import mwparserfromhell

    pieces: list[str] = []
    skipped = 0
    for node in mwparserfromhell.parse(_MAGIC.sub("", wikitext)).nodes:
        level = getattr(node, "level", 0)
        if level:  # a heading
            if skipped and level > skipped:
                continue
            skipped = level if str(node.title).strip().strip("'").lower() in TAIL else 0
            pieces.append(" ")
        elif not skipped:
            pieces.append(_plain(node))
    text = " ".join("".join(pieces).split())
    for pattern, replacement in _EMPTIED:
        text = pattern.sub(replacement, text)
    return text


def _texts(code: Wikicode | None) -> str:
    return "" if code is None else "".join(_plain(node) for node in code.nodes)


def _plain(node: Node) -> str:
    from mwparserfromhell import nodes

    if isinstance(node, nodes.Text):
        return str(node.value)
    if isinstance(node, nodes.Wikilink):
        return _link(node)
    if isinstance(node, nodes.ExternalLink):
        return _texts(node.title) if node.brackets else str(node.url)
    if isinstance(node, nodes.HTMLEntity):
        return str(node.normalize())
    if isinstance(node, nodes.Tag):
        name = str(node.tag).strip().lower()
        return "" if name in HIDDEN else " " if name in ("br", "li", "dd", "dt", "hr") else _texts(node.contents)
    if isinstance(node, nodes.Template):
        return _template(node)
    return ""  # comments, arguments


def _link(node: Any) -> str:
    target = str(node.title).strip()
    prefix, colon, _ = target.partition(":")
    prefix = prefix.strip().lower()
    if colon and (prefix in MEDIA or (node.text is None and _LANGUAGE.fullmatch(prefix))):
        return ""
    return _texts(node.title if node.text is None else node.text)


def _template(node: Any) -> str:
    shown = KEPT_TEMPLATES.get(" ".join(str(node.name).split()).lower())
    if shown is None:
        return ""
    given = [_texts(parameter.value).strip() for parameter in node.params if not parameter.showkey]
    try:
        return shown(given)
    except IndexError:
        return ""
