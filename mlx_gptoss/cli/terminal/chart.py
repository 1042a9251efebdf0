"""A chart in text: where people would rather look than read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

MARKS = ("·", "●", "▲")
STYLES = ("dim", "cyan", "yellow")


def line_chart(lines: Mapping[str, Sequence[tuple[float, float]]], width: int = 64, height: int = 12) -> Text:
    """The curves over one another, each with a mark of its own, with the axes' ends."""
    points = [p for line in lines.values() for p in line]
    if not points:
        return Text()
    right, low, high = max(x for x, _ in points) or 1, min(y for _, y in points), max(y for _, y in points)
    cells: list[list[tuple[str, str]]] = [[(" ", "")] * width for _ in range(height)]
    for n, line in enumerate(lines.values()):
        for x, y in line:
            column = min(width - 1, int(x / right * (width - 1)))
            row = 0 if high == low else min(height - 1, int((high - y) / (high - low) * (height - 1) + 0.5))
            cells[row][column] = (MARKS[n % len(MARKS)], STYLES[n % len(STYLES)])
    text = Text()
    for row, marks in enumerate(cells):
        value = high - (high - low) * row / (height - 1)
        text.append(f"{value:8.3f} ┤" if row in (0, height // 2, height - 1) else " " * 9 + "│", "dim")
        for mark, style in marks:
            text.append(mark, style)
        text.append("\n")
    text.append(" " * 9 + "└" + "─" * width + "\n", "dim")
    text.append(f"{'':10}0{f'step {right:.0f}':>{width - 1}}\n", "dim")
    text.append(" " * 10)
    for n, label in enumerate(lines):
        text.append(f"{MARKS[n % len(MARKS)]} {label}   ", STYLES[n % len(STYLES)])
    return text
