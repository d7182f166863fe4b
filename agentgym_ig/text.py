"""Text made harmless: foreign text as a policy may see it, and strings that are no Unicode as libraries take them."""

from __future__ import annotations

import re
import unicodedata

_OPENS = re.compile(
    r"[<＜﹤≮](?![\s=]|\d+\b(?!\Z|[>|]))"
    r"|[\[［﹇](?=[/@]?g?(?:(?:[A-Z][A-Z_\d]*@?)?\Z|[A-Z][A-Z_\d]{2,}@?[\]］﹈]))"
)
_SHOWN = dict.fromkeys("<＜﹤≮", "‹") | dict.fromkeys("[［﹇", "⁅")
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})


class _Visible(dict[int, str]):
    """Code point → what is shown of it; filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        invisible = unicodedata.category(character) in _INVISIBLE
        self[code] = shown = " " if character.isspace() else "" if invisible else character
        return shown


_VISIBLE = _Visible()


def neutralise(text: str) -> str:
    """Foreign text in a form that can be mistaken neither for a control tag nor for a chat-template token.

    `<` becomes `‹` unless a space, `=` or a plain number follows, `[` of words in capitals, as Mistral's tokens are,
    becomes `⁅`, and so do the characters that Unicode normalisation (NFKC, NFD) would make one of the two; what only
    begins a token at the very end counts too. Invisible, bidirectional and control characters and lone surrogates
    go; line breaks and tabs become spaces.
    """
    if not text.isprintable():
        text = text.translate(_VISIBLE)
    if any(map(text.__contains__, _SHOWN)):
        text = _OPENS.sub(lambda found: _SHOWN[found.group()], text)
    return text


def clean(text: str) -> str:
    """The text with a question mark for each lone surrogate: they are no Unicode, and no library takes them."""
    return text.encode("utf-8", "replace").decode()
