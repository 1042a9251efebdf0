r"""LaTeX mathematics in brackets, which gpt-oss writes most: \( inline \) and \[ displayed \].

The tokens are those of mdit-py-plugins' dollarmath: math_inline, math_inline_double within a paragraph, and
math_block. A formula has no blank line in it, so an opening bracket that is never closed spoils one
paragraph at most.
"""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

_CLOSERS = {"\\(": ("\\)", "math_inline"), "\\[": ("\\]", "math_inline_double")}


def brackets_plugin(md: MarkdownIt) -> None:
    """Add both kinds of brackets to a parser."""
    md.inline.ruler.before("escape", "math_brackets", _inline)
    interrupts = ["paragraph", "reference", "blockquote", "list"]
    md.block.ruler.before("fence", "math_brackets_block", _block, {"alt": interrupts})


def _inline(state: StateInline, silent: bool) -> bool:
    opening = state.src[state.pos : state.pos + 2]
    if opening not in _CLOSERS:
        return False
    closing, kind = _CLOSERS[opening]
    # Searched for once: a text of unclosed brackets is read in linear time.
    ends: dict[str, int] = state.env.setdefault("math_ends", {})
    key = f"{closing}{hash(state.src)}"
    end = ends.get(key, 0)
    if end != -1 and end < state.pos + 2:
        end = ends[key] = state.src.find(closing, state.pos + 2)
    content = state.src[state.pos + 2 : end] if end != -1 and end + 2 <= state.posMax else ""
    if not any(character.isalnum() for character in content):
        return False  # escaped punctuation
    if not silent:
        token = state.push(kind, "math", 0)
        token.content, token.markup = content, opening
    state.pos = end + 2
    return True


def _block(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    first = state.bMarks[start_line] + state.tShift[start_line]
    if state.is_code_block(start_line) or not state.src.startswith("\\[", first):
        return False
    lines: list[str] = []
    for line in range(start_line, end_line):
        begin = first + 2 if line == start_line else state.bMarks[line] + state.tShift[line]
        text = state.src[begin : state.eMarks[line]]
        if line > start_line and (not text.strip() or state.sCount[line] < state.blkIndent):
            return False
        head, found, rest = text.partition("\\]")
        lines.append(head)
        if not found:
            continue
        if rest.strip(" \t.,;") or not "".join(lines).strip():
            return False
        if not silent:
            token = state.push("math_block", "math", 0)
            token.block, token.markup = True, "\\["
            token.content, token.info = "\n".join(lines), rest.strip()
            token.map = [start_line, line + 1]
            state.line = line + 1
        return True
    return False
