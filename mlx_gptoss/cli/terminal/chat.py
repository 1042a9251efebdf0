"""The terminal chat: a loop of prompt and answer, and the commands that begin with "/"."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Protocol, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_gptoss.cli.terminal.answer import AnswerView
from mlx_gptoss.cli.terminal.markdown import one_line
from mlx_gptoss.cli.terminal.screen import no_echo
from mlx_gptoss.cli.terminal.transcript import Saver, Transcript, answer_of, load_transcript
from mlx_gptoss.errors import GptOssError, RequestError
from mlx_gptoss.harmony import Done, Message, ReasoningEffort, Usage
from mlx_gptoss.tools import BUILTIN
from mlx_gptoss.tools.call import as_tool

if TYPE_CHECKING:
    from mlx_gptoss.chat.session import Session
    from mlx_gptoss.llm import LLM
    from mlx_gptoss.sampling import SamplingParams
    from mlx_gptoss.tools.call import ToolLike

KEYS = "Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer"


class Asks(Protocol):
    """Where messages come from: `prompt.Prompt`, or a test."""

    def ask(self) -> str:
        """The next message. Raises EOFError at the end and KeyboardInterrupt on Ctrl-C."""
        ...


@dataclass
class Settings:
    """How a chat is held; the commands change it."""

    instructions: str | None = None
    effort: ReasoningEffort = "medium"
    show_reasoning: bool = False
    tools: Sequence[ToolLike] = ()
    params: SamplingParams | None = None
    max_steps: int = 16

    def session(self, llm: LLM) -> Session[Any]:
        """A new conversation under these settings. Raises RequestError when they are wrong."""
        return llm.chat(
            instructions=self.instructions,
            reasoning_effort=self.effort,
            current_date=date.today().isoformat(),
            tools=self.tools,
            params=self.params,
            max_steps=self.max_steps,
        )


class Chat:
    """A chat with a model in a terminal."""

    def __init__(self, llm: LLM, settings: Settings, console: Console) -> None:
        self._llm = llm
        self._settings = settings
        self._console = console
        self._saver = Saver()
        self._context = 0  # tokens in it
        self._answers, self._seconds = 0, 0.0
        self._last = "none yet"  # what the last answer took
        self._session = self._settings.session(self._llm)
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "what can be typed here"),
            "/reset": (self._reset, "forget the conversation"),
            "/undo": (self._undo, "take back your last message and its answer"),
            "/effort": (self._effort, "low, medium or high: how long the model reasons"),
            "/system": (self._system, "TEXT: the instructions; alone, shows them; - clears them"),
            "/reasoning": (self._reasoning, "show or hide the reasoning"),
            "/save": (self._save, "NAME: write NAME.json and NAME.md"),
            "/load": (self._load, "NAME: go on with a saved chat"),
            "/tools": (self._tools, "the tools that are enabled"),
            "/stats": (self._stats, "tokens, speed and memory"),
            "/exit": (self._exit, "leave (also Ctrl-D)"),
        }
        self._over = False

    def run(self, prompt: Asks) -> None:
        """Ask and answer until the user leaves."""
        self._say(f"{self._llm.name} · {KEYS} · /help")
        while not self._over:
            try:
                text = prompt.ask()
            except KeyboardInterrupt:
                self._say("Ctrl-D or /exit leaves the chat")
                continue
            except EOFError:
                break
            try:
                self.handle(text)
            except GptOssError as error:
                self._error(error)
            except KeyboardInterrupt:
                self._say("stopped")

    def handle(self, text: str) -> None:
        """A command, or a message to answer. Raises GptOssError."""
        if not text.strip():
            return
        if not text.startswith("/"):
            self.answer(text)
            return
        name, _, rest = text.strip().partition(" ")
        if name not in self.commands:
            raise RequestError(
                f"{name} is not a command: /help lists them; put a space before a message that begins with /"
            )
        self.commands[name][0](rest.strip())

    def answer(self, text: str) -> None:
        """Stream the answer to a message. Ctrl-C stops it and keeps what was said. Raises GptOssError."""
        view = AnswerView(self._console, show_reasoning=self._settings.show_reasoning)
        done: Done | None = None
        began = time.monotonic()
        self._console.print()
        try:
            view.waiting()
            with no_echo(), closing(cast(Any, self._session.stream(text))) as events:
                for event in events:
                    view.show(event)
                    done = event if isinstance(event, Done) else None
        except KeyboardInterrupt:
            done = None
        finally:
            rate, first = view.tokens_per_second, view.seconds_to_first
            view.close()
        self._seconds += time.monotonic() - began
        if done is None:
            self._stopped(text, view.text)
            return
        self._answers += 1
        self._count(done.usage, rate, first)
        if done.finish_reason == "length":
            self._say("the answer was cut: it reached --max-tokens or the end of the context")
        elif done.finish_reason == "tool_calls":
            self._say(f"stopped after {self._settings.max_steps} calls of tools: say something to go on")
        self._say(self._last)

    def status(self) -> str:
        """One line: the model, and how full its context is."""
        return f"{self._llm.name} · context {self._context:,} of {self._llm.max_context:,} tokens · /help"

    def _change(self, settings: Settings) -> None:
        """Go on under other settings. Raises RequestError and changes nothing when they are wrong."""
        session = settings.session(self._llm)
        self._settings = settings
        session.history = self._session.history
        session.usage = self._session.usage
        self._session = session

    def _stopped(self, text: str, answer: str) -> None:
        """What was said before Ctrl-C stays in the conversation, so that the user can refer to it."""
        if answer.strip():
            self._session.history += [Message.user(text), Message.assistant(answer)]
            self._say("stopped: the conversation goes on from here; /undo takes it back")
        else:
            self._say("stopped before an answer: your message was taken back")

    def _count(self, usage: Usage, rate: float | None, first: float | None) -> None:
        self._context = usage.prompt_tokens + usage.completion_tokens
        parts = [f"{usage.completion_tokens:,} tokens"]
        parts += [f"{rate:.1f} tokens/s"] if rate is not None else []
        parts += [f"first after {first:.2f} s"] if first is not None else []
        parts.append(f"context {self._context:,} ({usage.cached_tokens:,} cached)")
        self._last = " · ".join(parts)

    # --- commands

    def _help(self, rest: str) -> None:
        self._list({name: text for name, (_, text) in self.commands.items()})
        self._say(f"{KEYS}, Ctrl-X Ctrl-E opens your editor")

    def _reset(self, rest: str) -> None:
        self._session = self._settings.session(self._llm)
        self._context = 0
        self._say("a new conversation")

    def _undo(self, rest: str) -> None:
        removed = self._session.undo()
        if not removed:
            raise RequestError("there is nothing to take back")
        self._say(f"took back: {one_line(removed[0].content, 80)}")

    def _effort(self, rest: str) -> None:
        if not rest:
            self._say(f"reasoning effort: {self._settings.effort}")
            return
        self._change(replace(self._settings, effort=cast(ReasoningEffort, rest)))
        self._say(f"reasoning effort: {rest}")

    def _system(self, rest: str) -> None:
        if not rest:
            self._say(f"instructions: {self._settings.instructions or 'none'}")
            return
        self._change(replace(self._settings, instructions=None if rest == "-" else rest))
        self._say("instructions cleared" if rest == "-" else "instructions set")

    def _reasoning(self, rest: str) -> None:
        self._settings.show_reasoning = not self._settings.show_reasoning
        self._say(f"reasoning is {'shown' if self._settings.show_reasoning else 'folded'}")

    def _save(self, rest: str) -> None:
        name = rest or f"chat-{datetime.now():%Y-%m-%d-%H%M%S}"
        saved, told = datetime.now().isoformat(timespec="seconds"), self._settings
        transcript = Transcript(
            self._llm.name, saved, told.instructions, told.effort, list(self._session.history)
        )
        first, second = self._saver.save(transcript, name)
        self._say(f"saved {first} and {second}")

    def _load(self, rest: str) -> None:
        if not rest:
            raise RequestError("/load needs the name of a file that /save wrote")
        found = load_transcript(rest)
        effort = cast(ReasoningEffort, found.reasoning_effort)
        self._change(replace(self._settings, instructions=found.instructions, effort=effort))
        self._session.history = found.messages
        self._context = 0
        users = sum(m.role == "user" for m in found.messages)
        self._say(f"loaded {users} messages of yours with {found.model}; the last answer was:")
        self._console.print(Text(one_line(answer_of(found.messages), 500) or "none", style="dim"))

    def _tools(self, rest: str) -> None:
        names = [as_tool(tool).name for tool in self._settings.tools]
        self._say(", ".join(names) or f"none: --tool enables the built-in ones, {' and '.join(BUILTIN)}")

    def _stats(self, rest: str) -> None:
        stats, usage = self._llm.stats(), self._session.usage
        used, budget = (stats.live_kv_bytes + stats.prefix_bytes) / 1e6, stats.kv_budget / 1e6
        rows = {
            "answers": f"{self._answers} in {self._seconds:.1f} s",
            "last answer": self._last,
            "prompt tokens": f"{usage.prompt_tokens:,}, of which {usage.cached_tokens:,} were cached",
            "output tokens": f"{usage.completion_tokens:,}, of which {usage.reasoning_tokens:,} reasoning",
            "KV caches": f"{used:,.0f} MB of {budget:,.0f} MB",
        }
        self._list(rows)

    def _exit(self, rest: str) -> None:
        self._over = True

    def _list(self, rows: dict[str, str]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, text in rows.items():
            table.add_row(Text(name, style="cyan"), text)
        self._console.print(table)

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def _error(self, error: GptOssError) -> None:
        self._console.print(Text(f"error: {' '.join(str(error).split())}", style="red"))
