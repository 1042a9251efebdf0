"""The line where the user types: editing, several lines, pasted text, a history kept between chats.

prompt_toolkit does this because the `readline` of many Pythons on macOS is libedit, which takes every line
of a pasted text for a message of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mlx_gptoss.files import state_folder

TAKE_PATHS = ("/file", "/load", "/save")
WORDS = {"/effort": ("low", "medium", "high"), "/reasoning": ("last",)}


def history_file() -> Path:
    """Where what was typed is kept."""
    return state_folder() / "chat_history"


class CommandCompleter(Completer):
    """Commands with what they do, and what may follow them: a path, a word."""

    def __init__(self, commands: Mapping[str, str]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, blank, rest = text.partition(" ")
        if blank and command in TAKE_PATHS:
            yield from self._paths.get_completions(Document(rest), event)
            return
        choices = dict.fromkeys(WORDS.get(command, ()), "") if blank else self._commands
        begun = rest if blank else text
        for word, meaning in choices.items():
            if word.startswith(begun) and text:
                yield Completion(word, -len(begun), display_meta=meaning)


class Prompt:
    """Asks for messages. commands: what the Tab key completes, and what it means. status: the bottom line."""

    def __init__(self, commands: Mapping[str, str], status: Callable[[], str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=True,
            key_bindings=_keys(),
            completer=CommandCompleter(commands),
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
