"""One answer as it comes: reasoning folded away, Markdown drawn block by block, tools in a line each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from mlx_gptoss.cli.prefill import to_read
from mlx_gptoss.cli.terminal.markdown import TerminalMarkdown, one_line, plain, split_blocks
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
from mlx_gptoss.sampling import PromptProgress

FRAME_SECONDS = 0.05  # between two drawings, at least
LONGEST_PAUSE = 0.5  # and at most
PEEK_LINES = 4  # of the reasoning, while it is going on
SHOWN_ARGUMENTS = 300  # characters of a call or of its result


class AnswerView:
    """Draws the events of one answer. `close` it, whatever happens.

    show_reasoning: leave the reasoning on the screen instead of folding it to one line; hint: what that line
    says at its end.
    """

    def __init__(
        self,
        console: Console,
        *,
        show_reasoning: bool = False,
        hint: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.text = ""  # of the answer so far, as the model wrote it
        self.tokens = 0  # deltas so far, about as many as tokens
        self._screen = Screen(console)
        self._show_reasoning = show_reasoning
        self._hint = hint
        self._reading_since: float | None = None
        self._clock = clock
        self._began = clock()
        self._first: float | None = None
        self._pause = FRAME_SECONDS
        self._gap = False  # a blank line is due before the next part
        self._kind = ""  # of the open part: reasoning, text, preamble, call, or "" for none
        self._open = ""  # text of the open part, without the blocks that are settled
        self._open_tokens = 0
        self._open_since = self._began
        self._drawn = -1.0

    def show(self, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, ReasoningDelta | TextDelta | PreambleDelta | ToolCallDelta):
            self.tokens += 1
            if self._first is None:
                self._first = self._clock()
        match event:
            case PromptProgress():
                self._reading(event)
                return
            case ReasoningDelta():
                self._switch("reasoning")
                self._open += plain(event.text)
                self._open_tokens += 1
            case TextDelta() | PreambleDelta():
                self._switch("text" if isinstance(event, TextDelta) else "preamble")
                self._open += plain(event.text)
                self.text += event.text if isinstance(event, TextDelta) else ""
            case ToolCallDelta():
                self._switch("call")
                self._open = event.name
            case ToolCall():
                self._switch("")
                self._settle([self._dim(f"→ {event.name} {one_line(event.arguments, SHOWN_ARGUMENTS)}")])
            case MessageDone() if event.message.role == "tool":
                self._switch("")
                self._settle([self._dim(f"← {one_line(event.message.content, SHOWN_ARGUMENTS)}")])
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

    def _reading(self, progress: PromptProgress) -> None:
        """Show how many tokens of a long prompt are read, and how long the rest will take."""
        counts = to_read(progress)
        if counts is None:
            return
        read, total = counts
        now = self._clock()
        if self._reading_since is None or read == 0:
            self._reading_since = now
        spent = now - self._reading_since
        left = f", {round_seconds(spent / read * (total - read))} left" if read and spent else ""
        self._screen.draw([""] * self._gap, [self._dim(f"reading {read:,} of {total:,} tokens{left}")])

    def _switch(self, kind: str) -> None:
        """The open part ends and one of another kind begins."""
        if kind == self._kind:
            return
        seconds = self._clock() - self._open_since
        if self._kind == "reasoning" and self._show_reasoning:
            self._settle(self._reasoning_lines())
        elif self._kind == "reasoning":
            self._settle(
                [self._dim(f"▸ thought for {seconds:.1f} s ({self._open_tokens} tokens){self._hint}")]
            )
        elif self._kind in ("text", "preamble"):
            self._settle_blocks(self._open)
        self._kind, self._open, self._open_tokens = kind, "", 0
        self._open_since = self._clock()
        self._drawn = -1.0  # something new: draw it at once

    def _settle_blocks(self, markdown: str) -> None:
        for lines in self._blocks(markdown):
            self._settle(lines)

    def _settle(self, lines: list[str]) -> None:
        """Make an open part permanent: parts are kept apart by a blank line."""
        self._screen.settle([""] * self._gap + lines)
        self._gap = True

    def _draw(self) -> None:
        self._drawn = self._clock()
        lines: list[str] = []
        if self._kind == "reasoning":
            lines = self._reasoning_lines()
            if not self._show_reasoning:
                lines = lines[-PEEK_LINES:]
        elif self._kind == "call":
            lines = [self._dim(f"→ {self._open} …")]
        elif self._open:
            whole, line_feed, begun = self._open.rpartition("\n")
            *done, growing = split_blocks(whole + line_feed)
            self._settle_blocks("".join(done))
            self._open = growing + begun
            lines = [line for block in self._blocks(self._open) for line in ("", *block)][1:]
        rate = self.tokens_per_second
        doing = "thinking, " if self._kind == "reasoning" else ""
        speed = "" if rate is None else f", {rate:.1f} tokens/s"
        footer = ["", self._dim(f"{doing}{self.tokens} tokens{speed}")] if self._kind else []
        self._screen.draw([""] * self._gap + lines, footer)

    def _reasoning_lines(self) -> list[str]:
        return self._screen.render(Text(self._open.strip(), style="dim"))

    def _blocks(self, markdown: str) -> Iterator[list[str]]:
        """The lines of each block."""
        for block in split_blocks(markdown):
            if lines := self._screen.render(TerminalMarkdown(block)):
                yield lines

    def _dim(self, line: str) -> str:
        width = self._screen.console.width
        text = Text(line, style="dim")
        text.truncate(max(1, width - 1), overflow="ellipsis")
        return "".join(self._screen.render(text))


def round_seconds(seconds: float) -> str:
    """9 s, 3 min 20 s: as long as people care to know."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
