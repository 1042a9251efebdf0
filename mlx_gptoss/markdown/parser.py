"""The one configuration of Markdown: GitHub's flavour, footnotes, LaTeX mathematics, and a few HTML tags."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.footnote import footnote_plugin
from mdit_py_plugins.gfm_autolink import gfm_autolink_plugin

from mlx_gptoss.markdown.brackets import brackets_plugin

MAX_NESTING = 60  # levels of blocks and of inline markup; what lies deeper is not parsed
_TAG = re.compile(r"<(?:br ?/?|/?(?:sub|sup|kbd|mark|u))>")


def make_parser() -> MarkdownIt:
    """A parser for what a language model writes.

    HTML is text, so that `List<int>` stays readable and nothing runs, but for the tags of `_TAG`. One tilde
    strikes nothing through (models write "~5 km") and "$5 and $6" is no formula.
    """
    md = MarkdownIt("commonmark", {"html": False, "maxNesting": MAX_NESTING, "tasklists": True})
    md.enable(["table", "strikethrough"])
    md.use(gfm_autolink_plugin)
    md.use(footnote_plugin, inline=False)
    md.use(
        dollarmath_plugin,
        allow_labels=False,
        allow_space=False,
        allow_digits=False,
        allow_blank_lines=False,
        double_inline=True,
    )
    md.use(amsmath_plugin)
    md.use(brackets_plugin)
    md.inline.ruler.before("html_inline", "tag", _tag)
    return md


def written(formula: Token) -> str:
    """A formula with its delimiters, as the text has it."""
    closing = {"\\(": "\\)", "\\[": "\\]"}.get(formula.markup, formula.markup)
    after = formula.info if formula.type == "math_block" else ""
    delimited = formula.type != "amsmath"
    return formula.markup + formula.content + closing + after if delimited else formula.content


def _tag(state: StateInline, silent: bool) -> bool:
    """`<br>` and the tags that Markdown has no other spelling for."""
    if not (found := _TAG.match(state.src, state.pos)):
        return False
    if not silent:
        state.push("html_inline", "", 0).content = found[0]
    state.pos = found.end()
    return True
