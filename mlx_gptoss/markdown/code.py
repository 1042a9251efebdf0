"""Highlighted code: spans with Pygments' short class names, no style of its own."""

from __future__ import annotations

from html import escape

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

MAX_LENGTH = 50_000  # characters that are worth the time
CLASSES = frozenset(name for name in STANDARD_TYPES.values() if name)
_FORMATTER: HtmlFormatter[str] = HtmlFormatter(nowrap=True)


def highlighted(code: str, language: str) -> str:
    """The code as HTML: plain where the language is not known or the code is too long."""
    if len(code) > MAX_LENGTH or not language:
        return escape(code)
    try:
        lexer = get_lexer_by_name(language.lower(), stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escape(code)
    return highlight(code, lexer, _FORMATTER)
