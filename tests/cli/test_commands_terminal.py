"""The commands as a person meets them: in a real terminal, on the demo model, at several widths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.window import Window


def command(state: Path, *words: str, width: int = 80) -> Window:
    return Window(state, width, 50, program=("-m", "mlx_gptoss", *words))


@pytest.mark.parametrize("width", [60, 100, 200])
def test_alone_it_shows_what_is_here_and_the_next_command(tmp_path: Path, width: int) -> None:
    status, text = command(tmp_path, width=width).finish()
    assert status == 0 and "…" not in text
    for part in ("On this machine", "demo", "To download", "20b", "mlx-gptoss pull 20b", "Next"):
        assert part in text
    assert re.search(r"mlx-gptoss chat demo +talk to a toy", text)


@pytest.mark.parametrize("width", [60, 100, 200])
@pytest.mark.parametrize("words", ["models", "inspect demo"])
def test_tables_are_whole(tmp_path: Path, words: str, width: int) -> None:
    status, text = command(tmp_path, *words.split(), width=width).finish()
    assert status == 0 and "…" not in text and "demo" in text


def test_a_question_and_the_answer_on_one_screen(tmp_path: Path) -> None:
    options = ["-p", "What is 17 + 25?", "--temperature", "0", "--show-reasoning", "--max-tokens", "300"]
    status, text = command(tmp_path, "generate", "demo", *options).finish()
    assert status == 0 and "42" in text and "Traceback" not in text


def test_a_chat_is_left_and_resumed(tmp_path: Path) -> None:
    options = ["chat", "demo", "--temperature", "0", "--max-tokens", "300"]
    window = command(tmp_path, *options)
    window.until("❯")
    window.type("What is 17 + 25?\r")
    assert "42" in window.answers(1)
    window.type("/quit\r")
    assert window.finish()[0] == 0
    window = command(tmp_path, *options, "--resume")
    text = window.until("❯")
    assert "loaded 1 messages of yours with demo" in text and "42" in text
    window.type("\x04")
    assert window.finish()[0] == 0


def test_nothing_can_be_resumed_before_the_first_chat(tmp_path: Path) -> None:
    status, text = command(tmp_path, "chat", "demo", "--resume").finish()
    assert status == 1 and "there is no chat to resume yet" in text


def test_removing_asks_and_takes_no_for_an_answer(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    assert command(tmp_path, "convert", "demo", str(target)).finish()[0] == 0
    window = command(tmp_path, "remove", "tiny", width=200)
    window.until("[y/N]")
    window.type("n\r")
    assert window.finish()[0] == 130 and (target / "config.json").exists()
    window = command(tmp_path, "remove", "tiny", width=200)
    window.until("[y/N]")
    window.type("y\r")
    status, text = window.finish()
    assert status == 0 and "MB freed" in text and not target.exists()
