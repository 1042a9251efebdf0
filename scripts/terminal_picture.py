"""Draw docs/images/terminal.svg: the demo model's chat as a real terminal shows it.

python -m scripts.terminal_picture
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from tests.support.window import Window

TARGET = Path(__file__).parent.parent / "docs/images/terminal.svg"
WIDTH, HEIGHT = 88, 26
ASKED = ("What is the capital of Peru?", "/reasoning", "What is 358 + 267?")
PROGRAM = ("-m", "mlx_gptoss", "chat", "demo", "--temperature", "0")
COLOURS = {"brown": "yellow", "default": None}  # pyte's names for what rich calls otherwise


def drawn(window: Window) -> list[Text]:
    """The lines of a terminal's screen, with their styles."""
    lines = []
    for y in range(window.screen.lines):
        line = Text()
        for x in range(window.screen.columns):
            cell = window.screen.buffer[y][x]
            colour = COLOURS.get(cell.fg, cell.fg.replace("bright", "bright_"))
            line.append(cell.data, Style(color=colour, bold=cell.bold, italic=cell.italics))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def main() -> None:
    """Chat, and draw what is on the screen."""
    with tempfile.TemporaryDirectory() as state:
        window = Window(Path(state), WIDTH, HEIGHT, program=PROGRAM)
        window.until("❯")
        for said, count in zip(ASKED, (1, 1, 2), strict=True):
            window.type(f"{said}\r")
            window.answers(count)
        lines = drawn(window)
        window.type("/bye\r")
        window.finish()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), legacy_windows=False)
    for line in lines:
        console.print(line)
    TARGET.write_text(
        console.export_svg(title="mlx-gptoss chat demo", theme=SVG_EXPORT_THEME), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
