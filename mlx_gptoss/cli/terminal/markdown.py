"""Markdown that arrives in pieces, cut into blocks: what is finished never changes again.

A terminal can only redraw what is on its screen, so an answer is drawn block by block: finished blocks are
printed once, and only the last ones are drawn again as they grow.
"""

from __future__ import annotations

from io import StringIO
from itertools import pairwise

from markdown_it import MarkdownIt

# Everything a terminal could take for a command, except line feed and tab.
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
_CONTROL[ord("\r")] = ""
# Of blocks alone, with what rich draws of them.
_PARSER = MarkdownIt().enable("table").disable("inline")


def plain(text: str) -> str:
    """Text without control characters, which a model could use to take over the terminal."""
    return text.translate(_CONTROL)


def one_line(text: str, length: int) -> str:
    """The beginning of a text, without control characters, in at most `length` characters of one line."""
    line = " ".join(plain(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def split_blocks(text: str) -> list[str]:
    """The blocks of a Markdown text, which joined are the text.

    All but the last stay as they are when whole lines are appended to the text.
    """
    lines = list(StringIO(text))
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map]
    edges = [0, *starts[1:], len(lines)]
    return ["".join(lines[begin:end]) for begin, end in pairwise(edges)]
