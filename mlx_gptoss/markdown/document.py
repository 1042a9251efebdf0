"""A Markdown text as blocks of HTML that is safe to show, whatever the text says.

The parser treats HTML as text, what is written here is escaped, and `safe` sanitises the result once more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

from mlx_gptoss.markdown.code import highlighted
from mlx_gptoss.markdown.formula import mathml
from mlx_gptoss.markdown.parser import MAX_NESTING, make_parser, written
from mlx_gptoss.markdown.safe import LINK, safe

MAX_LENGTH = 200_000  # characters of a text: a longer one is shown as it was written
MAX_HTML = 4_000_000  # characters of a block
OPEN_CODE = 6_000  # an unfinished block of code is highlighted up to here; it is drawn often

_UNDERLINE = re.compile(r"(?:^|\n) {0,3}(?:-+|=+) *\Z")  # may yet become a list, a rule or a heading


@dataclass(frozen=True)
class Block:
    """A block of the outermost level. `lines`: of the text, to the block's end; None while it may grow."""

    html: str
    lines: int | None


def blocks(text: str, name: str = "0", *, growing: bool = False) -> list[Block]:
    """The blocks of a text, whose lines end in "\\n".

    name: letters and digits that tell its footnotes from those of other texts on the page. growing: more
    will follow, so the last block has no end yet, nor has one before it that the unfinished line may join.
    """
    whole = text.count("\n")  # lines that are finished
    if len(text) > MAX_LENGTH:
        return [Block(plain(text), None if growing else whole + 1)]
    if growing and (line := _UNDERLINE.search(text)):
        text = text[: line.start()]
    md = make_parser()
    env: dict[str, Any] = {"name": re.sub(r"\W", "", name)[:40] or "0", "growing": growing}
    tokens = md.parse(text, env)
    if any(_depth(token) >= MAX_NESTING - 1 for token in tokens):
        return [Block(plain(text), None if growing else whole + 1)]
    renderer = _Renderer()
    groups = _outermost(tokens)
    result = []
    for index, group in enumerate(groups):
        html = renderer.render(group, md.options, env)
        html = safe(html) if len(html) <= MAX_HTML else plain("(This part is too large to be shown.)")
        following = groups[index + 1][0].map if index + 1 < len(groups) else None
        settled = following is not None and following[0] < whole
        lines = following[0] if following else whole + 1
        result.append(Block(html, lines if settled or not growing else None))
    return result


def _depth(token: Token) -> int:
    return token.level + max((child.level for child in token.children or ()), default=0)


def _outermost(tokens: Sequence[Token]) -> list[list[Token]]:
    """The tokens of each block of the outermost level."""
    groups: list[list[Token]] = []
    depth = 0
    for token in tokens:
        if depth == 0:
            groups.append([])
        groups[-1].append(token)
        depth += token.nesting
    return groups


def plain(text: str) -> str:
    """A text as it was written."""
    return f'<div class="plain">{escape(text)}</div>'


class _Renderer(RendererHTML):
    """Writes the tokens of the parser as the page wants them. Rules are found by the token's type."""

    def link_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        href = str(tokens[idx].attrGet("href") or "")
        env.setdefault("links", []).append(href)
        return f'<a href="{escape(href)}" target="_blank">' if LINK.match(href) else ""

    def link_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        href = env["links"].pop()
        # A link to anywhere else leads nowhere: what it says is shown instead.
        return "</a>" if LINK.match(href) else f" ({escape(href)})"

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """A link to it: the page loads nothing from elsewhere."""
        source = str(tokens[idx].attrGet("src") or "")
        words = escape(self.renderInlineAsText(tokens[idx].children or [], options, env) or "image")
        return f'<a href="{escape(source)}" target="_blank">{words}</a>' if LINK.match(source) else words

    def html_inline(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return tokens[idx].content

    def list_item_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        done = tokens[idx].meta.get("checked")
        if done is None:
            return "<li>"
        mark, words = ("☑", "done") if done else ("☐", "to do")
        return f'<li class="todo"><span class="task" role="img" aria-label="{words}">{mark}</span> '

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[idx]
        language = (
            re.sub(r"[^\w+#.-]", "", token.info.split(maxsplit=1)[0])[:30] if token.info.strip() else ""
        )
        if language == "math":
            return self._display(token.content, f"```math\n{token.content}```")
        long = env["growing"] and len(token.content) > OPEN_CODE
        code = escape(token.content) if long else highlighted(token.content, language)
        return f'<pre data-language="{escape(language)}" tabindex="0"><code>{code}</code></pre>\n'

    def code_block(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return f'<pre data-language="" tabindex="0"><code>{escape(tokens[idx].content)}</code></pre>\n'

    def heading_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[idx]
        levels: list[int] = env.setdefault("levels", [])
        while levels and levels[-1] >= int(token.tag[1]):
            levels.pop()
        levels.append(int(token.tag[1]))
        # The page has two levels of its own; an outline leaves none out, whatever the text begins with.
        tag = env["heading"] = f"h{min(6, len(levels) + 2)}"
        return f'<{tag} data-level="{token.tag[1]}">'

    def heading_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return f"</{env['heading']}>\n"

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return '<div class="table" tabindex="0" role="group" aria-label="Table"><table>\n'

    def table_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return "</table></div>\n"

    def th_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return f'<th scope="col"{_alignment(tokens[idx])}>'

    def td_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return f"<td{_alignment(tokens[idx])}>"

    def math_inline(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        found = mathml(tokens[idx].content, display=False)
        return f'<span class="math">{found or escape(written(tokens[idx]))}</span>'

    def math_inline_double(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        found = mathml(tokens[idx].content, display=True)
        return f'<span class="math">{found or escape(written(tokens[idx]))}</span>'

    def math_block(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[idx]
        return self._display(token.content, written(token), token.info)

    def amsmath(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return self._display(tokens[idx].content, tokens[idx].content)

    def _display(self, latex: str, as_written: str, after: str = "") -> str:
        found = mathml(latex, display=True)
        shown = found + escape(after) if found else escape(as_written)
        return f'<div class="math" tabindex="0">{shown}</div>\n'

    def footnote_ref(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        note, again = _note(tokens[idx], env)
        link = f'<a href="#fn-{note}">{_number(tokens[idx])}</a>'
        return f'<sup class="footnote" id="fnref-{note}{again}">{link}</sup>'

    def footnote_block_open(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        return '<section class="footnotes" aria-label="Footnotes"><ol>\n'

    def footnote_block_close(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        return "</ol></section>\n"

    def footnote_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return f'<li id="fn-{_note(tokens[idx], env)[0]}">'

    def footnote_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return "</li>\n"

    def footnote_anchor(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        note, again = _note(tokens[idx], env)
        return f' <a class="back" href="#fnref-{note}{again}">↩</a>'


def _alignment(token: Token) -> str:
    align = str(token.attrGet("style") or "").removeprefix("text-align:")
    return f' data-align="{align}"' if align in ("center", "right") else ""


def _number(token: Token) -> int:
    return int(token.meta["id"]) + 1


def _note(token: Token, env: EnvType) -> tuple[str, str]:
    """The anchor of a footnote, and what tells its second reference from the first."""
    again = token.meta.get("subId") or 0
    return f"{env['name']}-{_number(token)}", f"-{again}" if again else ""
