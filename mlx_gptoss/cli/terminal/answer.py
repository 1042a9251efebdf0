"""One answer as it comes: reasoning folded away, Markdown drawn block by block, tools in a line each."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from mlx_gptoss.cli.terminal.markdown import Blocks, plain
from mlx_gptoss.cli.terminal.screen import Screen
from mlx_gptoss.harmony import (
    Done,
    Event,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
)

FRAME_SECONDS = 0.05  # between two drawings, at least
LONGEST_PAUSE = 0.5  # and at most
PEEK_LINES = 4  # of the reasoning, while it is going on
CODE_THEME = "ansi_dark"
SHOWN_ARGUMENTS = 300  # characters of a call or of its result


class AnswerView:
    """Draws the events of one answer. `close` it, whatever happens.

    show_reasoning: leave the reasoning on the screen instead of folding it to one line.
    """

    def __init__(
        self, console: Console, *, show_reasoning: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.text = ""  # of the answer so far, as the model wrote it
        self.tokens = 0  # deltas so far, about as many as tokens
        self._screen = Screen(console)
        self._show_reasoning = show_reasoning
        self._clock = clock
        self._began = clock()
        self._first: float | None = None
        self._drawn = -1.0
        self._pause = FRAME_SECONDS
        self._kind = ""  # of the open part: reasoning, text, preamble, call
        self._kind_began = 0.0
        self._reasoning = ""
        self._reasoning_tokens = 0
        self._blocks = Blocks()
        self._gap = False  # a blank line is due before the next block
        self._calling = ""

    def show(self, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, ReasoningDelta | TextDelta | PreambleDelta | ToolCallDelta):
            self.tokens += 1
            if self._first is None:
                self._first = self._clock()
        match event:
            case ReasoningDelta():
                self._switch("reasoning")
                self._reasoning += plain(event.text)
                self._reasoning_tokens += 1
            case TextDelta() | PreambleDelta():
                self._switch("text" if isinstance(event, TextDelta) else "preamble")
                if isinstance(event, TextDelta):
                    self.text += event.text
                for block in self._blocks.push(plain(event.text)):
                    self._settle_block(block)
            case ToolCallDelta():
                self._switch("call")
                self._calling = event.name
            case ToolCall():
                self._switch("")
                self._settle_line(f"→ {event.name} {_brief(event.arguments)}")
            case MessageDone() if event.message.role == "tool":
                self._switch("")
                self._settle_line(f"← {_brief(event.message.content)}")
            case Done():
                self._switch("")
        if self._clock() - self._drawn >= self._pause:
            began = time.monotonic()
            self._draw()
            # A long block takes long to draw: spend no more than a fifth of the time on it, unless that
            # made the answer look stuck.
            self._pause = min(LONGEST_PAUSE, max(FRAME_SECONDS, 4 * (time.monotonic() - began)))

    def waiting(self) -> None:
        """Show that something is going on before the first token."""
        self._screen.draw([], [self._dim("…")])

    def close(self) -> None:
        """Finish what is open, and give the cursor back."""
        self._switch("")
        self._screen.settle([])
        self._screen.close()

    @property
    def seconds_to_first(self) -> float | None:
        """From the beginning to the first token."""
        return None if self._first is None else self._first - self._began

    @property
    def tokens_per_second(self) -> float | None:
        """Since the first token; None before there are two."""
        if self._first is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(1e-9, self._clock() - self._first)

    def _switch(self, kind: str) -> None:
        """The open part ends and one of another kind begins."""
        if kind == self._kind:
            return
        if self._kind == "reasoning":
            self._end_reasoning()
        elif self._kind in ("text", "preamble") and (rest := self._blocks.finish()):
            self._settle_block(rest)
        self._kind = kind
        self._kind_began = self._clock()
        self._drawn = -1.0  # something new: draw it at once

    def _end_reasoning(self) -> None:
        seconds = self._clock() - self._kind_began
        if self._show_reasoning:
            self._settle(self._screen.render(Text(self._reasoning.strip(), style="dim")))
        else:
            self._settle([self._dim(f"▸ thought for {seconds:.1f} s ({self._reasoning_tokens} tokens)")])
        self._reasoning = ""
        self._reasoning_tokens = 0

    def _settle_block(self, block: str) -> None:
        self._settle(self._markdown(block))

    def _settle_line(self, line: str) -> None:
        self._settle([self._dim(line)])

    def _settle(self, lines: list[str]) -> None:
        """Make an open part permanent: parts are kept apart by a blank line."""
        self._screen.settle([""] * self._gap + lines)
        self._gap = True

    def _draw(self) -> None:
        self._drawn = self._clock()
        lines: list[str] = []
        if self._kind == "reasoning":
            lines = self._screen.render(Text(self._reasoning.strip(), style="dim"))
            if not self._show_reasoning:
                lines = lines[-PEEK_LINES:]
        elif self._kind in ("text", "preamble") and self._blocks.open.strip():
            lines = self._markdown(self._blocks.open)
        elif self._kind == "call":
            lines = [self._dim(f"→ {self._calling} …")]
        footer = [] if self._kind == "" else ["", self._dim(self._progress())]
        self._screen.draw([""] * self._gap + lines, footer)

    def _progress(self) -> str:
        rate = self.tokens_per_second
        doing = "thinking, " if self._kind == "reasoning" else ""
        return f"{doing}{self.tokens} tokens" + (f", {rate:.1f} tokens/s" if rate is not None else "")

    def _markdown(self, block: str) -> list[str]:
        return self._screen.render(Markdown(block, code_theme=CODE_THEME))

    def _dim(self, line: str) -> str:
        width = self._screen.console.width
        text = Text(line, style="dim")
        text.truncate(max(1, width - 1), overflow="ellipsis")
        return "".join(self._screen.render(text))


def _brief(text: str) -> str:
    """A text in one line."""
    line = " ".join(plain(text).split())
    return line if len(line) <= SHOWN_ARGUMENTS else f"{line[:SHOWN_ARGUMENTS]}… ({len(text)} characters)"
