"""A program in a real terminal: a pseudo-terminal, whose screen an emulator reads."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pexpect
import pyte

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # to wait for anything, on a machine however busy
CHAT_APP = ("-m", "tests.support.chat_app")


class Window:
    """A terminal with a Python program running in it; by default the chat over a scripted model.

    state: where the program keeps what outlives it. sent: everything that it wrote, escape codes included.
    """

    def __init__(
        self,
        state: Path,
        width: int = 80,
        height: int = 24,
        *,
        program: Sequence[str] = CHAT_APP,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.sent = b""
        self.screen = pyte.HistoryScreen(width, height, history=5000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.child = pexpect.spawn(
            sys.executable,
            list(program),
            cwd=str(ROOT),
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": os.environ.get("HOME", "/"),
                "TERM": "xterm-256color",
                "LANG": "C.UTF-8",
                "XDG_STATE_HOME": str(state),
                "HF_HUB_CACHE": str(state / "hub"),
                **(environment or {}),
            },
            dimensions=(height, width),
            timeout=SECONDS,
        )
        self.child.delaybeforesend = None

    def text(self) -> str:
        """What is in the scroll-back and on the screen."""
        above = [
            "".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in (*above, *self.screen.display))

    def until(self, seen: Callable[[str], bool] | str) -> str:
        """Read until the screen shows it; the whole text."""
        deadline = time.monotonic() + SECONDS
        wanted = (lambda text: seen in text) if isinstance(seen, str) else seen
        while not wanted(self.text()):
            assert time.monotonic() < deadline, self.text()
            try:
                data = self.child.read_nonblocking(65536, timeout=0.2)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert wanted(self.text()), self.text()
                break
            self.sent += data
            self._stream.feed(data)
            # The emulator is asked where the cursor is, as a terminal would be.
            if b"\x1b[6n" in data:
                self.child.send(f"\x1b[{self.screen.cursor.y + 1};{self.screen.cursor.x + 1}R")
        return self.text()

    def answers(self, count: int) -> str:
        """Wait until so many answers have been counted and the prompt is back."""
        return self.until(lambda text: text.count("cached)") >= count and "❯" in text.split("cached)")[-1])

    def type(self, text: str) -> None:
        self.child.send(text)

    def finish(self) -> tuple[int | None, str]:
        """Wait for the program to end: its exit status, and the text."""
        text = self.until(lambda text: not self.child.isalive() and self._drained())
        self.child.close()
        return self.child.exitstatus, text

    def _drained(self) -> bool:
        """True when nothing is left to read."""
        try:
            data = self.child.read_nonblocking(65536, timeout=0.2)
        except (pexpect.EOF, pexpect.TIMEOUT):
            return True
        self.sent += data
        self._stream.feed(data)
        return False

    def start_over(self) -> None:
        """A new conversation on an empty screen of the first size."""
        self.resize(80, 24)
        mark = len(self.sent)
        self.type("\x15/reset\r")
        # A prompt that reads keys takes pasted text, and says so.
        self.until(lambda text: "a new conversation" in text and b"\x1b[?2004h" in self.sent[mark:])
        self.screen.reset()
        self.screen.history.top.clear()
        self.type("\x0c")
        self.until("❯")

    def resize(self, width: int, height: int) -> None:
        self.child.setwinsize(height, width)
        self.screen.resize(height, width)
        self.child.kill(signal.SIGWINCH)
