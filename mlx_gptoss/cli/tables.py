"""Tables that stay whole in a terminal of any width."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Cell = str | Text


def show_table(
    headings: Sequence[str], rows: Sequence[Sequence[Cell]], *, left: int = 1, total: Sequence[Cell] = ()
) -> None:
    """Print rows under their headings; the first `left` columns are words, the others numbers.

    Columns without any content are left out. Where the terminal is too narrow for the table, each row becomes
    a paragraph under its first cell. `total` is a last row, set apart.
    """
    console = Console(highlight=False)
    every = [*rows, *([total] if total else [])]
    kept = [i for i in range(len(headings)) if any(row[i] for row in every)]
    table = Table(box=box.SIMPLE_HEAD)
    for i in kept:
        table.add_column(headings[i], justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    if total:
        table.add_section()
        table.add_row(*(total[i] for i in kept))
    if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
        console.print(table)
    else:
        _show_paragraphs(console, [headings[i] for i in kept], [[row[i] for i in kept] for row in every])


def _show_paragraphs(console: Console, headings: list[str], rows: list[list[Cell]]) -> None:
    for first, *others in rows:
        console.print()
        console.print(Text(str(first), style="bold"))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(overflow="fold")
        for heading, cell in zip(headings[1:], others, strict=True):
            if cell:
                grid.add_row(heading, cell)
        console.print(Padding(grid, (0, 0, 0, 2), expand=False))
    console.print()
