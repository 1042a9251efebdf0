"""What the chat draws, read back through a terminal emulator: streaming must leave what one print would."""

from __future__ import annotations

import io
import random
import re

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mlx_gptoss.cli.terminal.answer import AnswerView, round_seconds
from mlx_gptoss.cli.terminal.markdown import plain, split_blocks
from mlx_gptoss.cli.terminal.screen import SHOW_CURSOR, Screen
from mlx_gptoss.harmony import (
    Done,
    Event,
    Message,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    Reply,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from mlx_gptoss.sampling import PromptProgress

DOCUMENT = """# A title

Some **bold** text that is long enough to wrap over several lines in a narrow terminal, and `code` as well.
A second line of the same paragraph.

1. first
2. second

   of two paragraphs
10. tenth

- a
  - b

      deep

Text straight before a fence:
```python
def f(x):

    return x + 1
```
~~~
```
~~~

| a | b |
|---|---|
| 1 | 2 |

> a quote
> of two lines

## Another heading
---
Last é 日本 🙂 with *emphasis*.
"""
LONG = "\n\n".join(
    ["Intro.", "\n".join(f"- item {i}" for i in range(15)), "```\n" + "line\n" * 15 + "```", "End."]
)


class Terminal:
    """A console whose output an emulator shows."""

    def __init__(self, width: int, height: int) -> None:
        self.file = io.StringIO()
        self.console = Console(
            file=self.file,
            force_terminal=True,
            width=width,
            height=height,
            color_system="standard",
            highlight=False,
        )
        self._screen = pyte.HistoryScreen(width, height, history=5000, ratio=0.5)
        self._stream = pyte.Stream(self._screen)
        self._read = 0

    @property
    def raw(self) -> str:
        return self.file.getvalue()

    def lines(self) -> list[str]:
        """Everything in the scroll-back and on the screen, without blank ends."""
        fresh = self.raw[self._read :]
        self._read = len(self.raw)
        self._stream.feed(fresh.replace("\n", "\r\n"))
        above = [
            "".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top
        ]
        shown = [line.rstrip() for line in (*above, *self._screen.display)]
        while shown and not shown[-1]:
            shown.pop()
        return shown

    def resize(self, width: int, height: int) -> None:
        self.lines()
        self._screen.resize(height, width)
        self.console._width, self.console._height = width, height


def play(events: list[Event], width: int = 60, height: int = 20, show_reasoning: bool = False) -> Terminal:
    """Draw events, each of them at once."""
    terminal = Terminal(width, height)
    ticks = iter(range(10**6))
    view = AnswerView(terminal.console, clock=lambda: float(next(ticks)), show_reasoning=show_reasoning)
    view.waiting()
    for event in events:
        view.show(event)
    view.close()
    return terminal


def cut(text: str, seed: int) -> list[Event]:
    """Text as deltas of random lengths."""
    pick, pieces = random.Random(seed), []
    while text:
        n = pick.choice([1, 1, 2, 3, 5, 9, 40])
        pieces.append(TextDelta(text[:n]))
        text = text[n:]
    return list(pieces)


@pytest.mark.parametrize(
    ("document", "width", "height", "seed"),
    [(DOCUMENT, 60, 20, 1), (DOCUMENT, 33, 8, 2), (DOCUMENT, 120, 50, 3), (LONG, 33, 8, 4)],
)
def test_a_streamed_answer_leaves_what_a_whole_one_does(
    document: str, width: int, height: int, seed: int
) -> None:
    whole = play([TextDelta(document)], width, height)
    streamed = play(cut(document, seed), width, height)
    assert streamed.lines() == whole.lines()


LINES = [
    "a",
    "  y",
    "    z",
    "- x",
    "- ",
    "1. q",
    "2) q",
    "> b",
    "```",
    "~~~",
    "# h",
    "---",
    "===",
    "|a|",
    "|-|",
]
LINES += ["[r]: /u", "<!-- c", "-->", "\tt", "\u2028u", ""]


@given(st.lists(st.sampled_from(LINES), max_size=12))
def test_blocks_lose_no_character_and_all_but_the_last_are_final(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    whole = split_blocks(text)
    assert "".join(whole) == text
    for count in range(len(lines)):
        *finished, _ = split_blocks("".join(f"{line}\n" for line in lines[:count]))
        assert whole[: len(finished)] == finished


def test_lists_and_fences_stay_in_one_block() -> None:
    found = [block.strip() for block in split_blocks(DOCUMENT)]
    assert any(b.startswith("1. first") and "of two paragraphs" in b and "10. tenth" in b for b in found)
    assert any(b.startswith("```python") and b.endswith("return x + 1\n```") for b in found)
    assert "~~~\n```\n~~~" in found
    assert "Text straight before a fence:" in found


def test_an_open_fence_at_the_end_is_shown_as_code() -> None:
    terminal = play([TextDelta("Look:\n\n```\nunfinished")])
    assert [line.strip() for line in terminal.lines()] == ["Look:", "", "unfinished"]


def test_only_what_changed_is_written_again() -> None:
    terminal = play([TextDelta(f"word{i} ") for i in range(80)], width=40, height=40)
    per_event = len(terminal.raw) / 80
    assert per_event < 250  # a line or two, and the footer: never the whole paragraph of 15 lines


def test_reasoning_is_folded_to_one_line_when_the_answer_starts() -> None:
    events: list[Event] = [ReasoningDelta(f"thought {i}\n") for i in range(30)]
    terminal = play([*events, TextDelta("The answer.")])
    lines = terminal.lines()
    assert re.fullmatch(r"▸ thought for \d+\.\d s \(30 tokens\)", lines[0])
    assert lines[1:] == ["", "The answer."]


def test_reasoning_peeks_while_it_goes_on() -> None:
    terminal = Terminal(60, 20)
    ticks = iter(range(10**6))
    view = AnswerView(terminal.console, clock=lambda: float(next(ticks)))
    for i in range(30):
        view.show(ReasoningDelta(f"thought {i}\n"))
    lines = terminal.lines()
    assert lines[:4] == ["thought 26", "thought 27", "thought 28", "thought 29"]
    assert lines[5].startswith("thinking, 30 tokens, ")


def test_a_prompt_that_is_being_read_tells_how_much_and_how_long() -> None:
    terminal = Terminal(60, 20)
    ticks = iter(range(10**6))
    view = AnswerView(terminal.console, clock=lambda: float(next(ticks)))
    view.waiting()
    view.show(PromptProgress(1000, 1000, 13_000))
    assert terminal.lines() == ["reading 0 of 12,000 tokens"]
    view.show(PromptProgress(4000, 1000, 13_000))
    assert terminal.lines() == ["reading 3,000 of 12,000 tokens, 3 s left"]
    view.show(TextDelta("Read."))
    view.close()
    assert terminal.lines() == ["Read."]


@pytest.mark.parametrize(("seconds", "told"), [(0.2, "0 s"), (59.4, "59 s"), (200, "3 min 20 s")])
def test_seconds_are_told_as_people_count_them(seconds: float, told: str) -> None:
    assert round_seconds(seconds) == told


def test_reasoning_can_be_left_on_the_screen() -> None:
    events: list[Event] = [ReasoningDelta(f"thought {i}\n") for i in range(30)]
    terminal = play([*events, TextDelta("The answer.")], show_reasoning=True)
    assert terminal.lines() == [*(f"thought {i}" for i in range(30)), "", "The answer."]


def test_tools_take_a_line_each() -> None:
    call = ToolCall(0, "c", "python", "print(1)\nprint(2)", "python")
    result = Message.tool_result("1\n2\n" + "x" * 400, name="python", call_id="c")
    reply = Reply("Done.", "", (), (), "stop", Usage())
    terminal = play(
        [
            PreambleDelta("Let me compute."),
            ToolCallDelta(0, "c", "python", ""),
            ToolCallDelta(0, "c", "python", "print"),
            call,
            MessageDone(result),
            TextDelta("Done."),
            Done("stop", Usage(), reply),
        ]
    )
    lines = terminal.lines()
    assert lines[0] == "Let me compute."
    assert lines[2] == "→ python print(1) print(2)"
    assert lines[4].startswith("← 1 2 xxx") and lines[4].endswith("…") and len(lines[4]) < 60
    assert lines[6:] == ["Done."]


def test_a_narrower_window_wraps_what_was_drawn_and_all_of_it_is_erased() -> None:
    terminal = Terminal(60, 20)
    screen = Screen(terminal.console)
    screen.draw(["\x1b[2m" + "x" * 59 + "\x1b[0m", "", "日本" * 10])
    terminal.console._width = 30  # the terminal now shows these lines as 2, 1 and 2 rows
    before = len(terminal.raw)
    screen.draw(["short"])
    assert "\x1b[5A\x1b[0J" in terminal.raw[before:]


def test_a_wider_window_in_the_middle_of_an_answer_leaves_no_debris() -> None:
    terminal = Terminal(40, 20)
    ticks = iter(range(10**6))
    view = AnswerView(terminal.console, clock=lambda: float(next(ticks)))
    words = " ".join(f"word{i}" for i in range(20))
    view.show(TextDelta(words))
    terminal.resize(80, 20)
    view.show(TextDelta(" end"))
    view.close()
    assert " ".join(" ".join(terminal.lines()).split()) == f"{words} end"


def test_a_model_cannot_send_commands_to_the_terminal() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b1m\rcarriage\x08\x7f"
    assert plain(evil) == "�]0;owned��[2J�1mcarriage��"
    terminal = play([ReasoningDelta(evil), TextDelta(evil), ToolCall(0, "c", "f", evil, "functions.f")])
    for command in ("\x1b]0;", "\x1b[2J", "\x9b", "\x07", "\x08"):
        assert command not in terminal.raw


def test_the_cursor_is_given_back() -> None:
    assert play([TextDelta("x")]).raw.endswith(SHOW_CURSOR)
