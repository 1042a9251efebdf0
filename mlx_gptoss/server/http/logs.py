"""Log lines that are the server's own: nothing from outside ends a line or steers a terminal."""

from __future__ import annotations

import logging
import re

# Control characters, line separators, invisible and direction marks, halves of surrogate pairs.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with every character that cannot be seen as its escape."""
    return _UNSEEN.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class LogFormatter(logging.Formatter):
    """A record's message in one line, its traceback indented below it, nothing in them unseen."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return visible(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type]
        return "\n".join(f"  {visible(line)}" for line in lines)
