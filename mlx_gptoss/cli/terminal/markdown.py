"""Markdown that arrives in pieces, cut into blocks: what is finished never changes again.

A terminal can only redraw what is on its screen, so an answer is drawn block by block: finished blocks are
printed once, and only the last ones are drawn again as they grow.
"""

from __future__ import annotations

from io import StringIO
from itertools import pairwise
from typing import cast

from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown

from mlx_gptoss.cli.terminal.formulas import unicode_formula
from mlx_gptoss.cli.terminal.theme import CODE_THEME, THEME
from mlx_gptoss.markdown.parser import make_parser, written

# Everything a terminal could take for a command, except line feed and tab.
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
_CONTROL[ord("\r")] = ""
_PARSER = make_parser()
_BLOCKS = make_parser().disable("inline")


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
    starts = [token.map[0] for token in _BLOCKS.parse(text) if token.level == 0 and token.map]
    edges = [0, *starts[1:], len(lines)]
    return ["".join(lines[begin:end]) for begin, end in pairwise(edges)]


class TerminalMarkdown(Markdown):
    """A text as rich draws it, read by the page's parser: what rich has no element for is written out."""

    def __init__(self, text: str) -> None:
        super().__init__(text, code_theme=cast(str, CODE_THEME))  # rich takes themes as well as their names
        self.parsed = _drawable(_PARSER.parse(text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with console.use_theme(THEME):
            yield from super().__rich_console__(console, options)


def _drawable(tokens: list[Token]) -> list[Token]:
    """The tokens in those that rich knows: formulas in Unicode, boxes of tasks, numbers of footnotes."""
    result = []
    mark = ""  # for the beginning of the next text
    for token in tokens:
        if token.type in ("math_block", "amsmath"):
            result += _paragraph(_formula(token))
        elif token.type == "footnote_open":
            mark = f"[{token.meta['id'] + 1}] "
        elif token.type == "inline":
            token.children = [_drawable_inline(child) for child in token.children or ()]
            if mark:
                token.children.insert(0, _text(mark))
                mark = ""
            result.append(token)
        elif not token.type.startswith("footnote"):
            if "checked" in token.meta:
                mark = "☑ " if token.meta["checked"] else "☐ "
            result.append(token)
    return result


def _drawable_inline(token: Token) -> Token:
    match token.type:
        case "math_inline" | "math_inline_double":
            return _text(_formula(token))
        case "footnote_ref":
            return _text(f"[{token.meta['id'] + 1}]")
        case "html_inline":
            return Token("hardbreak", "br", 0) if token.content.startswith("<br") else _text("")
    return token


def _formula(token: Token) -> str:
    """In Unicode where that is easy to read, else as the model wrote it."""
    shown = unicode_formula(token.content)
    if shown is None:
        return written(token)
    return shown + (token.info if token.type == "math_block" else "")


def _text(content: str) -> Token:
    return Token("text", "", 0, content=content)


def _paragraph(content: str) -> list[Token]:
    children: list[Token] = []
    for line in content.split("\n"):
        children += [Token("hardbreak", "br", 0)] * bool(children) + [_text(line)]
    inline = Token("inline", "", 0, content=content, children=children)
    return [Token("paragraph_open", "p", 1), inline, Token("paragraph_close", "p", -1)]
