"""The line where the user types: editing, several lines, pasted text, a history kept between chats.

prompt_toolkit does this because the `readline` of many Pythons on macOS is libedit, which takes every line
of a pasted text for a message of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mlx_gptoss.files import state_folder


def history_file() -> Path:
    """Where what was typed is kept."""
    return state_folder() / "chat_history"


class Prompt:
    """Asks for messages. commands: what the Tab key completes. status: the line at the bottom."""

    def __init__(self, commands: Iterable[str], status: Callable[[], str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=True,
            key_bindings=_keys(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            bottom_toolbar=status,
            prompt_continuation="  ",
            enable_open_in_editor=True,
        )

    def ask(self) -> str:
        """What the user typed. Raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C."""
        return self._session.prompt(HTML("<ansicyan><b>❯ </b></ansicyan>"))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """The file, readable by its owner only; memory where it cannot be written."""
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
