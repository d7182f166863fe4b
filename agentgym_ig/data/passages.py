"""Passages in the layouts in which corpora are published."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from agentgym_ig.types import Passage

WORDS = 100
"""Words of a passage cut from an article, as in wiki-18."""
_QUOTES = re.compile(r'"+')
_AROUND_NOTHING = re.compile(r'(?<![^\s(\[])""(?![\w"])')


def join_contents(title: str, text: str) -> str:
    """Title and text in Search-R1's `contents`: the title in double quotes, a line break, the text."""
    return f'"{title}"\n{text}'


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of Search-R1's `contents`; the quotes may be missing."""
    title, _, text = contents.partition("\n")
    return title.strip().strip('"'), text


def passage_of(row: dict[str, Any]) -> Passage:
    """The passage of a row `{"id", "title", "text"}` or `{"id", "contents"}`.

    Raises KeyError with the field that is missing, and ValueError for a passage without id or text.
    """
    if row.get("text") is None and row.get("contents") is not None:
        title, text = split_contents(str(row["contents"]))
    else:
        title, text = row["title"], row["text"]
    for field, value in (("id", row["id"]), ("text", text)):
        if value is None or not str(value).strip():
            raise ValueError(f"passage {row['id']!r} has no {field}")
    return Passage(str(row["id"]), str(title or ""), str(text))


def cut(article: str, title: str, text: str, words: int = WORDS) -> Iterator[Passage]:
    """An article in passages of so many white-space words each; the last one holds what is left over.

    The ids are the article's own with -0, -1 and so on, so they depend on nothing but the article.
    """
    every = text.split()
    for number, start in enumerate(range(0, len(every), words)):
        yield Passage(f"{article}-{number}", title, " ".join(every[start : start + words]))


def undouble(text: str) -> str:
    """CSV quoting undone where every quote in the text is doubled, as in the raw wiki-18 file; else the text.

    Quotes around nothing, which wiki-18 has where a title in italics was lost, are no sign of doubling.
    """
    if (
        '"' not in text
        or any(len(run) % 2 for run in _QUOTES.findall(text))
        or '"' not in _AROUND_NOTHING.sub("", text)
    ):
        return text
    return text.replace('""', '"')


def unquote(text: str) -> str:
    r"""A text that as a whole is a CSV field in quotes, without them: `"Who wrote ""Emma""?"` → `Who wrote "Emma"?`."""
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1].replace('""', ""):
        return text[1:-1].replace('""', '"')
    return text
