"""The chat as a program in a real terminal (a pseudo-terminal, its screen read by an emulator)."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.support.window import Window


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


def test_commands_and_paths_are_completed_by_the_tab_key(window: Window, tmp_path: Path) -> None:
    (tmp_path / "notes-of-today.md").write_text("bees dance")
    window.type("/ret\t")
    window.until("❯ /retry")
    window.type(f"\x15/file {tmp_path}/not\t")
    window.until(lambda text: "notes-of-today.md" in re.sub(r"\s", "", text))
    window.type("\r")
    window.until(lambda text: "sent with your next message" in " ".join(text.split()))
    window.type("what?\r")
    assert "You said:" in window.answers(1)
    window.type("/effort h\t")
    window.until("❯ /effort high")
    window.type("\r")
    window.until("reasoning effort: high")


def test_retry_copy_and_the_last_reasoning(window: Window) -> None:
    window.type("hello\r")
    window.answers(1)
    window.type("/retry\r")
    assert window.answers(2).count("You said: hello") == 2
    window.type("/copy\r")
    window.until("copied 15 characters through the terminal")
    assert b"\x1b]52;c;" + base64.b64encode(b"You said: hello") in window.sent
    window.type("/reasoning last\r")
    assert "Let me think about what was said." in window.until("Let me think about what was said.")
    window.type("/?\r")
    window.until("/exit")
    window.type("/clear\r")
    window.until("a new conversation")


def test_the_last_message_is_changed_in_the_users_editor(tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "changed" > "$1"\n')
    editor.chmod(0o755)
    window = Window(tmp_path, environment={"VISUAL": str(editor), "EDITOR": str(editor)})
    window.until("❯")
    window.type("hello\r")
    window.answers(1)
    window.type("/edit\r")
    assert "You said: changed" in window.answers(2)
    window.type("more\x18\x05")  # Ctrl-X Ctrl-E
    window.until("❯ changed")
    window.type("\r")
    window.answers(3)
    window.type("/bye\r")
    assert window.finish()[0] == 0


def test_a_long_prompt_tells_how_much_of_it_is_read(window: Window) -> None:
    window.type("\x1b[200~count " + "words of a long text " * 800 + "\x1b[201~\r")
    window.until("characters")
    # Of all that was drawn: by now the answer may stand where it was.
    assert re.search(rb"reading [\d,]+ of 1\d,\d{3} tokens, \d+ s left", window.sent)


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_bottom_line_and_the_help_are_whole_at_every_width(tmp_path: Path, width: int) -> None:
    window = Window(tmp_path, width, 40)
    window.until("❯")
    window.type("/help\r")
    bottom = re.compile(r"leave \(also.*scripted · \d+ of 20,000 tokens · /help", re.S)
    text = window.until(lambda text: bottom.search(text) is not None)
    assert "…" not in text
    window.type("markdown\r")
    window.answers(1)
    used = set(re.findall(rb"\x1b\[(?:[\d;]*;)?((?:[39][0-7])|(?:4[0-7])|(?:10[0-7]))m", window.sent))
    assert used <= {b"31", b"32", b"34", b"35", b"36"}  # what light and dark terminals show alike
    window.type("\x04")
    assert window.finish()[0] == 0


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
