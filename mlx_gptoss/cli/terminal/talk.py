"""A conversation that is shown as it goes: its session, its settings, and what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.text import Text

from mlx_gptoss.cli.attachments import with_files
from mlx_gptoss.cli.terminal.answer import AnswerView
from mlx_gptoss.cli.terminal.markdown import one_line
from mlx_gptoss.cli.terminal.once import CUT
from mlx_gptoss.cli.terminal.screen import no_echo
from mlx_gptoss.cli.terminal.transcript import Transcript, keep
from mlx_gptoss.errors import RequestError
from mlx_gptoss.harmony import Done, Message, ReasoningEffort, Usage

if TYPE_CHECKING:
    from mlx_gptoss.chat.session import Session
    from mlx_gptoss.llm import LLM
    from mlx_gptoss.sampling import SamplingParams
    from mlx_gptoss.tools.call import ToolLike


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
            progress=True,
        )


class Talk:
    """One conversation on a console. attached: (name, text) of the files that go with the next message."""

    def __init__(self, llm: LLM, settings: Settings, console: Console) -> None:
        self.llm = llm
        self.settings = settings
        self.console = console
        self.session = settings.session(llm)
        self.attached: list[tuple[str, str]] = []
        self.answers, self.seconds = 0, 0.0
        self.last = "none yet"  # what the last answer took
        self.context = 0  # tokens that the next turn starts from
        self.experts = ""  # how many of those chosen were in memory, when not all are
        self._hinted = False
        self._kept = True  # as long as the last chat could be kept
        self.count()

    # --- what is said

    def say(self, text: str) -> None:
        """A line of our own."""
        self.console.print(Text(text, style="dim"))

    def answer(self, text: str) -> None:
        """Stream the answer to a message and its files. Ctrl-C stops it and keeps what was said.

        Raises GptOssError.
        """
        before = len(self.session.history)
        self._answer(with_files(text, self.attached), "your message was taken back")
        if len(self.session.history) > before:
            self.attached.clear()

    def answer_again(self, text: str | None = None) -> None:
        """Answer the last message anew, or another one in its place. Raises GptOssError."""
        before = list(self.session.history)
        removed = self.session.undo()
        if not removed:
            raise RequestError("there is no message yet that could be answered again")
        kept = len(self.session.history)
        try:
            self._answer(text or removed[0].content, "the old one stays")
        finally:
            if len(self.session.history) == kept:
                self.session.history = before
            self.count()

    def _answer(self, message: str, when_stopped: str) -> None:
        view = AnswerView(
            self.console,
            show_reasoning=self.settings.show_reasoning,
            hint="" if self._hinted else " · /reasoning last shows it",
        )
        done: Done | None = None
        began = time.monotonic()
        self.console.print()
        try:
            view.waiting()
            with (
                no_echo(),
                closing(cast(Any, self.session.stream(message))) as events,
            ):
                for event in events:
                    view.show(event)
                    done = event if isinstance(event, Done) else None
        except KeyboardInterrupt:
            done = None
        finally:
            rate, first = view.tokens_per_second, view.seconds_to_first
            view.close()
        self.seconds += time.monotonic() - began
        if done is None:
            self._stopped(message, view.text, when_stopped)
            return
        self._hinted = self._hinted or bool(done.reply.reasoning)
        self.answers += 1
        self._took(done.usage, rate, first)
        if done.finish_reason == "length":
            self.say(CUT)
        elif done.finish_reason == "tool_calls":
            self.say(f"stopped after {self.settings.max_steps} calls of tools: say something to go on")
        self.say(self.last)
        self.keep()

    def _stopped(self, message: str, answer: str, when_stopped: str) -> None:
        """What was said before Ctrl-C stays in the conversation, so that the user can refer to it."""
        if answer.strip():
            self.session.history += [Message.user(message), Message.assistant(answer)]
            self.count()
            self.say("stopped: the conversation goes on from here; /undo takes it back")
            self.keep()
        else:
            self.say(f"stopped before an answer: {when_stopped}")

    def _took(self, usage: Usage, rate: float | None, first: float | None) -> None:
        self.count()
        parts = [f"{usage.completion_tokens:,} tokens"]
        parts += [f"{rate:.1f} tokens/s"] if rate is not None else []
        parts += [f"first after {first:.2f} s"] if first is not None else []
        parts.append(f"prompt {usage.prompt_tokens:,} ({usage.cached_tokens:,} cached)")
        self.last = " · ".join(parts)

    # --- the conversation

    def count(self) -> None:
        """Bring the status line up to date."""
        self.context = len(self.session.tokens)
        hits = self.llm.stats().expert_hit_rate
        self.experts = "" if hits is None else f"{hits:.0%} of experts in memory · "

    def status(self) -> str:
        """One line: the model, and how full its context is."""
        name = one_line(self.llm.name.rstrip("/").rpartition("/")[2], 24)
        return f"{name} · {self.context:,} of {self.llm.max_context:,} tokens · {self.experts}/help"

    def change(self, settings: Settings) -> None:
        """Go on under other settings. Raises RequestError and changes nothing when they are wrong."""
        session = settings.session(self.llm)
        self.settings = settings
        session.history = self.session.history
        session.usage = self.session.usage
        self.session = session
        self.count()

    def forget(self) -> None:
        """Begin a new conversation."""
        self.session = self.settings.session(self.llm)
        self.attached.clear()
        self.count()

    def transcript(self) -> Transcript:
        """The conversation so far."""
        saved, told = datetime.now().isoformat(timespec="seconds"), self.settings
        return Transcript(self.llm.name, saved, told.instructions, told.effort, list(self.session.history))

    def keep(self) -> None:
        """Keep the conversation as the last one, for --resume; where that cannot be, it is said once."""
        if not self.session.history or not self._kept:
            return
        try:
            keep(self.transcript())
        except OSError as error:
            self._kept = False
            self.say(f"this chat cannot be kept for --resume: {error.filename}: {error.strerror}")

    def reasoning(self) -> str:
        """What the model thought before its last answer, "" when it did not."""
        at = max((i for i, m in enumerate(self.session.history) if m.role == "user"), default=0)
        thoughts = (m for m in self.session.history[at:] if m.channel == "analysis" and m.recipient is None)
        return "\n\n".join(m.content.strip() for m in thoughts if m.role == "assistant")
