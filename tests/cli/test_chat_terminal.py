"""The chat as a program in a real terminal (a pseudo-terminal, its screen read by an emulator)."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # to wait for anything, on a machine however busy


class Window:
    """A terminal with the chat running in it."""

    def __init__(self, state: Path, width: int = 80, height: int = 24) -> None:
        self.screen = pyte.HistoryScreen(width, height, history=5000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "tests.support.chat_app"],
            cwd=str(ROOT),
            env={
                "PATH": "/usr/bin:/bin",
                "TERM": "xterm-256color",
                "LANG": "C.UTF-8",
                "XDG_STATE_HOME": str(state),
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

    def start_over(self) -> None:
        """A new conversation on an empty screen of the first size."""
        self.resize(80, 24)
        self.type("\x15/reset\r")
        self.until("a new conversation")
        self.screen.reset()
        self.screen.history.top.clear()
        self.type("\x0c")
        self.until("❯")

    def resize(self, width: int, height: int) -> None:
        self.child.setwinsize(height, width)
        self.screen.resize(height, width)
        self.child.kill(signal.SIGWINCH)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """One program for all tests: it takes seconds to start."""
    window = Window(tmp_path_factory.mktemp("state"))
    window.until("❯")
    yield window
    window.child.close(force=True)


@pytest.fixture
def window(opened: Window) -> Window:
    opened.start_over()
    return opened


def test_a_conversation_in_a_terminal(window: Window) -> None:
    """Streaming, non-ASCII, several lines and undo."""
    window.type("héllo 日本 🙂\r")
    text = window.answers(1)
    assert "You said: héllo 日本 🙂" in text.replace("🙂 ", "🙂")
    assert re.search(r"▸ thought for \d+\.\d s \(\d+ tokens\)", text)
    window.type("line one\x1b\rline two\r")
    assert "You said: line one line two" in window.answers(2)
    window.type("/undo\r")
    assert "took back: line one line two" in window.until("took back")
    window.type("markdown\r")
    text = window.answers(3)
    assert " • one\n • two\n" in text and 'print("hello")' in text and "```" not in text


def test_ctrl_c_stops_the_answer_and_not_the_program(window: Window) -> None:
    window.type("long\r")
    window.until("Paragraph 2 of a long answer.")
    window.child.sendintr()
    text = window.until("stopped: the conversation goes on from here")
    assert "Paragraph 399" not in text
    window.type("after\r")
    assert "You said: after" in window.answers(1)
    window.child.sendintr()
    window.until("Ctrl-D or /exit leaves the chat")
    assert window.child.isalive()


def test_a_paste_of_ten_thousand_characters_is_one_message(window: Window) -> None:
    lines = ["count é日本"]
    while len("\n".join(lines)) < 10_000:
        lines.append(f"line {len(lines)} of the paste")
    pasted = "\n".join(lines)[:10_000]
    window.type("\x1b[200~" + pasted + "\x1b[201~")
    window.until(lambda text: pasted.rsplit("\n", 1)[-1] in text)
    window.type("\r")
    assert "10000 characters" in window.until("10000 characters")


def test_a_window_that_is_resized_during_an_answer_shows_it_once(window: Window) -> None:
    window.type("long\r")
    window.until("Paragraph 1 of a long answer.")
    window.resize(100, 30)
    text = window.until("Paragraph 6 of a long answer.")
    window.child.sendintr()
    window.until("stopped:")
    for i in range(6):
        assert text.count(f"Paragraph {i} of a long answer.") == 1


def test_what_is_typed_during_an_answer_waits_for_the_prompt(window: Window) -> None:
    window.type("long\r")
    window.until("Paragraph 1 of a long answer.")
    window.type("typed ahead")
    text = window.until("Paragraph 4 of a long answer.")
    assert "typed ahead" not in text
    window.child.sendintr()
    window.until("stopped:")
    window.type(" and more\r")
    assert "more" in window.answers(1)


def test_leaving_ends_the_program_and_what_was_typed_is_kept(tmp_path: Path) -> None:
    window = Window(tmp_path)
    window.until("❯")
    window.type("héllo\x1b\rline two\r")
    window.answers(1)
    window.type("\x04")
    window.child.expect(pexpect.EOF)
    window.child.close()
    assert window.child.exitstatus == 0
    kept = (tmp_path / "mlx-gptoss" / "chat_history").read_text(encoding="utf-8")
    assert "+héllo" in kept and "+line two" in kept
