"""A region at the bottom of the terminal that is drawn again in place; everything above it stays.

Only lines that changed are written, and what outgrows the screen scrolls away for good, so that long
answers neither flicker nor spoil the scroll-back.
"""

from __future__ import annotations

import re
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, RenderableType

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\]8;[^\x1b]*\x1b\\")
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
BEGIN_FRAME, END_FRAME = "\x1b[?2026h", "\x1b[?2026l"  # drawn at once by terminals that know it


class Screen:
    """Writes finished lines, and keeps some unfinished ones below them.

    Below the lines of `draw` the cursor waits at the start of an empty line.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: list[str] = []
        self._scrolled = 0  # lines of the unfinished part that have left the region for good
        self._hidden = False

    def render(self, what: RenderableType) -> list[str]:
        """The lines of a renderable at the present width, with escape codes, without blanks at the ends."""
        with self.console.capture() as captured:
            self.console.print(what)
        lines = [line.rstrip() for line in captured.get().split("\n")]
        shown = [i for i, line in enumerate(lines) if _ESCAPES.sub("", line).strip()]
        return lines[shown[0] : shown[-1] + 1] if shown else []

    def draw(self, lines: Sequence[str], footer: Sequence[str] = ()) -> None:
        """Show the unfinished part as it is now, and a footer below it that never becomes permanent."""
        lines = lines[self._scrolled :]
        room = max(1, self.console.height - 2 - len(footer))
        overflow = max(0, len(lines) - room)
        self._scrolled += overflow
        self._write([*lines, *footer], keep=overflow)

    def settle(self, lines: Sequence[str]) -> None:
        """Make the unfinished part permanent, as these lines."""
        lines = lines[self._scrolled :]
        self._write(lines, keep=len(lines))
        self._scrolled = 0

    def close(self) -> None:
        """Leave the terminal as it was found, the unfinished part where it is."""
        self._live = []
        self._scrolled = 0
        if self._hidden:
            self._hidden = False
            self._send(SHOW_CURSOR)

    def _write(self, lines: Sequence[str], keep: int) -> None:
        """Replace the region by `lines`; the first `keep` of them then leave it for good."""
        same = 0
        while same < min(len(lines), len(self._live)) and lines[same] == self._live[same]:
            same += 1
        stale, fresh = self._live[same:], lines[same:]
        self._live = list(lines[keep:])
        if not stale and not fresh:
            return
        out = "" if self._hidden else HIDE_CURSOR
        self._hidden = True
        rows = sum(self._rows(line) for line in stale)
        if rows:
            out += f"\r\x1b[{rows}A\x1b[0J"
        self._send(BEGIN_FRAME + out + "".join(f"{line}\n" for line in fresh) + END_FRAME)

    def _rows(self, line: str) -> int:
        """Rows a line takes now: terminals wrap what was drawn wider than they have become."""
        return max(1, -(-cell_len(_ESCAPES.sub("", line)) // self.console.width))

    def _send(self, data: str) -> None:
        self.console.file.write(data)
        self.console.file.flush()


@contextmanager
def no_echo() -> Iterator[None]:
    """Keep what is typed meanwhile off the screen; it waits for the next prompt. Ctrl-C works as ever."""
    if not sys.stdin.isatty():
        yield
        return
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    quiet = termios.tcgetattr(handle)
    quiet[0] &= ~termios.ICRNL  # Enter stays Enter
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(handle, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
