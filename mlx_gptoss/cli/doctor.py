"""`mlx-gptoss doctor`: what this machine can do, and whether everything works on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_gptoss.cli.options import NewFile, optional_model_argument

if TYPE_CHECKING:
    from mlx_gptoss.doctor import Finding

# The mark of a verdict, and its style.
MARKS = {
    "ok": ("ok", "green"),
    "info": ("", ""),
    "warning": ("note", "yellow"),
    "failed": ("FAILED", "bold red"),
    "none": ("--", "dim"),
}


@click.command()
@optional_model_argument
@click.option("--report", type=NewFile(), metavar="FILE", help="Write a Markdown report.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(model: str | None, report: Path | None, as_json: bool) -> None:
    """Examine this machine: memory, disk, versions, the demo model's answers, kernels, the sandbox.

    With MODEL, which must be on this machine, also whether its files are whole, whether it fits in memory,
    and what the memory's bandwidth allows; the disk's speed is then that of its files.

    Takes some seconds. The exit status is 1 when something has failed. Report and JSON hold no names of
    people, machines or folders: they can be pasted into an issue.
    """
    from mlx_gptoss.doctor import examine
    from mlx_gptoss.doctor.private import without_names

    findings, found = examine(model), []
    try:
        for finding in findings:
            found.append(finding)
            if not as_json:
                _show(finding, first=len(found) == 1 or found[-2].section != finding.section)
    finally:
        public = [f._replace(detail=without_names(f.detail, model)) for f in found]
        if report is not None and found:
            report.write_text(markdown(public), encoding="utf-8")
    failed = sum(finding.verdict == "failed" for finding in found)
    if as_json:
        click.echo(json.dumps([finding.as_data() for finding in public], indent=2))
    else:
        told = f"{failed} of {len(found)} failed" if failed else "everything that applies here works"
        click.secho(told, fg="red" if failed else "green", bold=True)
    sys.exit(1 if failed else 0)


def _show(finding: Finding, first: bool) -> None:
    """A line, or as many as its detail takes; with its section's name where that begins."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    mark, style = MARKS[finding.verdict]
    table = Table.grid(padding=(0, 1, 0, 0))
    for width in (10, 6, 15):
        table.add_column(width=width)
    table.add_column(ratio=1)
    section = Text(finding.section if first else "", "bold")
    table.add_row(section, Text(mark, style), finding.name, Text(finding.detail))
    Console(highlight=False).print(table)


def markdown(found: Iterable[Finding]) -> str:
    """The findings as a table to paste into an issue."""
    rows = ["| | | | |", "|---|---|---|---|"]
    for section, name, verdict, detail, _ in found:
        cells = (cell.replace("|", r"\|") for cell in (section, name, MARKS[verdict][0], detail))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"
