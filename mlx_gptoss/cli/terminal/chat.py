"""The terminal chat: a loop of prompt and answer, and the commands that begin with "/"."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_gptoss.cli.attachments import read_text
from mlx_gptoss.cli.terminal.clipboard import copy
from mlx_gptoss.cli.terminal.markdown import one_line, plain
from mlx_gptoss.cli.terminal.talk import Settings, Talk
from mlx_gptoss.cli.terminal.transcript import Saver, Transcript, answer_of, load_transcript
from mlx_gptoss.errors import GptOssError, RequestError
from mlx_gptoss.harmony import ReasoningEffort
from mlx_gptoss.tools import BUILTIN
from mlx_gptoss.tools.call import as_tool

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM

KEYS = "Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer"
ALIASES = {"/?": "/help", "/clear": "/reset", "/quit": "/exit", "/bye": "/exit"}


class Asks(Protocol):
    """Where messages come from: `prompt.Prompt`, or a test."""

    def ask(self) -> str:
        """The next message. Raises EOFError at the end and KeyboardInterrupt on Ctrl-C."""
        ...


class Chat:
    """A chat with a model in a terminal."""

    def __init__(self, llm: LLM, settings: Settings, console: Console) -> None:
        self.talk = Talk(llm, settings, console)
        self._console = console
        self._saver = Saver()
        self._over = False
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "what can be typed here (also /?)"),
            "/file": (
                self._file,
                "PATH: a text file that goes with your next message; alone, lists; - drops",
            ),
            "/retry": (self._retry, "answer your last message again"),
            "/edit": (self._edit, "change your last message in $EDITOR, and have it answered"),
            "/undo": (self._undo, "take back your last message and its answer"),
            "/copy": (self._copy, "the last answer to the clipboard"),
            "/reasoning": (
                self._reasoning,
                "show or fold the reasoning; last: shows that of the last answer",
            ),
            "/effort": (self._effort, "low, medium or high: how long the model reasons"),
            "/system": (self._system, "TEXT: the instructions; alone, shows them; - clears them"),
            "/save": (self._save, "NAME: write NAME.json and NAME.md"),
            "/load": (self._load, "NAME: go on with a saved chat"),
            "/reset": (self._reset, "forget the conversation (also /clear)"),
            "/tools": (self._tools, "the tools that are enabled"),
            "/stats": (self._stats, "tokens, speed and memory"),
            "/exit": (self._exit, "leave (also /quit, /bye, Ctrl-D)"),
        }

    def run(self, prompt: Asks) -> None:
        """Ask and answer until the user leaves."""
        self.talk.say(f"{self.talk.llm.name} · {KEYS} · /help")
        while not self._over:
            try:
                text = prompt.ask()
            except KeyboardInterrupt:
                self.talk.say("Ctrl-D or /exit leaves the chat")
                continue
            except EOFError:
                break
            try:
                self.handle(text)
            except GptOssError as error:
                self._error(error)
            except KeyboardInterrupt:
                self.talk.say("stopped")

    def handle(self, text: str) -> None:
        """A command, or a message to answer. Raises GptOssError."""
        if not text.strip():
            return
        if not text.startswith("/"):
            self.talk.answer(text)
            return
        name, _, rest = text.strip().partition(" ")
        name = ALIASES.get(name, name)
        if name not in self.commands:
            near = get_close_matches(name, [*self.commands, *ALIASES], n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise RequestError(
                f"{name} is not a command: {meant}/help lists them; put a space before a message that begins "
                "with /"
            )
        self.commands[name][0](rest.strip())

    def go_on(self, name: str) -> Transcript:
        """Go on with a saved chat, under its settings. Raises RequestError."""
        found = load_transcript(name)
        effort = cast(ReasoningEffort, found.reasoning_effort)
        settings = replace(self.talk.settings, instructions=found.instructions, effort=effort)
        history = self.talk.session.history
        self.talk.session.history = found.messages
        try:
            self.talk.change(settings)
        except GptOssError:
            self.talk.session.history = history
            raise
        users = sum(m.role == "user" for m in found.messages)
        self.talk.say(f"loaded {users} messages of yours with {found.model}; the last answer was:")
        self._console.print(Text(one_line(answer_of(found.messages), 500) or "none", style="dim"))
        return found

    # --- commands

    def _help(self, rest: str) -> None:
        self._list({name: text for name, (_, text) in self.commands.items()})
        self.talk.say(f"{KEYS}, Ctrl-X Ctrl-E opens your editor")

    def _file(self, rest: str) -> None:
        attached = self.talk.attached
        if rest == "-":
            attached.clear()
            self.talk.say("no files go with your next message")
        elif not rest:
            names = ", ".join(name for name, _ in attached)
            self.talk.say(f"with your next message: {names or 'no files; /file PATH adds one'}")
        else:
            path = typed_path(rest)
            text = read_text(path)
            attached.append((str(path), text))
            tokens = len(self.talk.llm.tokenizer.encode(text))
            self.talk.say(f"{path}: {tokens:,} tokens, sent with your next message")

    def _retry(self, rest: str) -> None:
        self.talk.answer_again()

    def _edit(self, rest: str) -> None:
        said = [m.content for m in self.talk.session.history if m.role == "user"]
        try:
            text = click.edit(said[-1] if said else "", extension=".md")
        except click.ClickException as error:
            raise RequestError(f"{error.format_message()}: set $EDITOR to your editor") from None
        if text is None or not text.strip() or (said and text.strip() == said[-1].strip()):
            self.talk.say("not changed")
            return
        self.talk.say(one_line(text, 500))
        if said:
            self.talk.answer_again(text.rstrip("\n"))
        else:
            self.talk.answer(text.rstrip("\n"))

    def _undo(self, rest: str) -> None:
        removed = self.talk.session.undo()
        if not removed:
            raise RequestError("there is nothing to take back")
        self.talk.count()
        self.talk.say(f"took back: {one_line(removed[0].content, 80)}")

    def _copy(self, rest: str) -> None:
        text = answer_of(self.talk.session.history)
        if not text:
            raise RequestError("there is no answer to copy yet")
        try:
            how = copy(text, self._console.file)
        except OSError as error:
            raise RequestError(f"the answer was not copied: {error}; /save writes it to a file") from None
        self.talk.say(f"copied {len(text):,} characters {how}")

    def _reasoning(self, rest: str) -> None:
        settings = self.talk.settings
        if rest == "last":
            thought = self.talk.reasoning()
            self._console.print(Text(plain(thought) or "the last answer has no reasoning", style="dim"))
        elif rest:
            raise RequestError(f"/reasoning {rest}: expected nothing, or last")
        else:
            settings.show_reasoning = not settings.show_reasoning
            self.talk.say(f"reasoning is {'shown' if settings.show_reasoning else 'folded'}")

    def _effort(self, rest: str) -> None:
        if not rest:
            self.talk.say(f"reasoning effort: {self.talk.settings.effort}")
            return
        self.talk.change(replace(self.talk.settings, effort=cast(ReasoningEffort, rest)))
        self.talk.say(f"reasoning effort: {rest}")

    def _system(self, rest: str) -> None:
        if not rest:
            self.talk.say(f"instructions: {self.talk.settings.instructions or 'none'}")
            return
        self.talk.change(replace(self.talk.settings, instructions=None if rest == "-" else rest))
        self.talk.say("instructions cleared" if rest == "-" else "instructions set")

    def _save(self, rest: str) -> None:
        name = rest or self._saver.name or f"chat-{datetime.now():%Y-%m-%d-%H%M%S}"
        first, second = self._saver.save(self.talk.transcript(), name)
        self.talk.say(f"saved {first} and {second}")

    def _load(self, rest: str) -> None:
        if not rest:
            raise RequestError("/load needs the name of a file that /save wrote")
        self._saver.loaded(self.go_on(rest), rest)

    def _reset(self, rest: str) -> None:
        self.talk.forget()
        self.talk.say("a new conversation")

    def _tools(self, rest: str) -> None:
        names = [as_tool(tool).name for tool in self.talk.settings.tools]
        none = f"none: --tool enables the built-in ones, {' and '.join(BUILTIN)}; --mcp others"
        self.talk.say(", ".join(names) or none)

    def _stats(self, rest: str) -> None:
        stats, usage = self.talk.llm.stats(), self.talk.session.usage
        used, budget = (stats.live_kv_bytes + stats.prefix_bytes) / 1e6, stats.kv_budget / 1e6
        streamed = {}
        if (hits := stats.expert_hit_rate) is not None:
            streamed["experts"] = (
                f"{hits:.1%} of those chosen were in memory; {stats.expert_read_bytes / 1e9:,.1f} GB read, "
                f"{stats.expert_wait_seconds:,.1f} s waited for them"
            )
        rows = {
            "answers": f"{self.talk.answers} in {self.talk.seconds:.1f} s",
            "last answer": self.talk.last,
            "prompt tokens": f"{usage.prompt_tokens:,}, of which {usage.cached_tokens:,} were cached",
            "output tokens": f"{usage.completion_tokens:,}, of which {usage.reasoning_tokens:,} reasoning",
            "KV caches": f"{used:,.0f} MB of {budget:,.0f} MB",
            **streamed,
        }
        self._list(rows)

    def _exit(self, rest: str) -> None:
        self._over = True

    def _list(self, rows: dict[str, str]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, text in rows.items():
            table.add_row(Text(name, style="cyan"), Text(text))
        self._console.print(table)

    def _error(self, error: GptOssError) -> None:
        self._console.print(Text(f"error: {' '.join(str(error).split())}", style="red"))


def typed_path(text: str) -> Path:
    """A path as people type it or drop it on a terminal: as it is, or quoted, or with escaped blanks."""
    path = Path(text).expanduser()
    if not path.exists():
        try:
            words = shlex.split(text)
        except ValueError:  # a lone quote is a character of the name
            words = []
        if len(words) == 1:
            return Path(words[0]).expanduser()
    return path
