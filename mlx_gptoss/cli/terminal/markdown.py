"""Markdown that arrives in pieces, cut into blocks: what is finished never changes again.

A terminal can only redraw what is on its screen, so an answer is drawn block by block: finished blocks are
printed once, and only the last, open one is drawn again as it grows.
"""

from __future__ import annotations

import re

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ITEM = re.compile(r" {0,3}(?:[-*+]|\d{1,9}[.)])(?:\s|$)")
_MAYBE_ITEM = re.compile(r" {0,3}(?:[-*+]?|\d{1,9}[.)]?)\Z")
_HEADING = re.compile(r" {0,3}#{1,6}(?:\s|$)")
# Everything a terminal could take for a command, except line feed and tab.
_CONTROL = {c: "\N{REPLACEMENT CHARACTER}" for c in (*range(32), *range(127, 160)) if c not in (9, 10)} | {
    13: None
}


def plain(text: str) -> str:
    """Text without control characters, which a model could use to take over the terminal."""
    return text.translate(_CONTROL)


class Blocks:
    """Splits a growing Markdown text into finished blocks and an open rest."""

    def __init__(self) -> None:
        self._rest = ""

    @property
    def open(self) -> str:
        """The block that may still grow."""
        return self._rest

    def push(self, text: str) -> list[str]:
        """Take in more text; the blocks it finishes."""
        self._rest += text
        finished = []
        while (end := _end_of_block(self._rest)) is not None:
            block, self._rest = self._rest[:end].strip("\n"), self._rest[end:].lstrip("\n")
            if block.strip():
                finished.append(block)
        return finished

    def finish(self) -> str:
        """The open rest, as the last block ("" when there is none)."""
        block, self._rest = self._rest.strip("\n"), ""
        return block if block.strip() else ""


def _end_of_block(text: str) -> int | None:
    """Where the first block of a text ends for certain, None while more text could belong to it."""
    lines = text.splitlines(keepends=True)
    position, fence, begun, in_list, blank = 0, "", False, False, False
    for line in lines:
        whole = line.endswith("\n")
        content = line.rstrip("\n")
        if fence:
            position += len(line)
            if whole and content.strip().startswith(fence) and not content.strip().strip(fence[0]):
                fence = ""
                if not in_list:
                    return position
            continue
        if not content.strip():
            position += len(line)
            if begun and whole:
                if not in_list:
                    return position
                blank = True
            continue
        if blank:  # within a list, a blank line was seen: does the list go on?
            if not whole and _MAYBE_ITEM.match(content):
                return None
            if not (content.startswith(("  ", "\t")) or _ITEM.match(content)):
                return position
            blank = False
        if not begun:
            begun, in_list = True, _ITEM.match(content) is not None
            if _HEADING.match(content):
                return position + len(line) if whole else None
        if opening := _FENCE.match(content if not in_list else content.lstrip()):
            if position and not in_list and text[:position].strip():
                return position if whole else None  # a fence ends the paragraph before it
            fence = opening[1]
        position += len(line)
    return None
