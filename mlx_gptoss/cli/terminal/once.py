"""One answer to standard output: its text and nothing else, for pipes and scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from mlx_gptoss.cli.terminal.markdown import plain
from mlx_gptoss.harmony import Done, Event, ReasoningDelta, TextDelta

CUT = "the answer was cut: it reached --max-tokens or the end of the context"


def answer_once(events: Iterator[Event], *, show_reasoning: bool = False) -> None:
    """Print the answer as it comes; to stderr the reasoning, if asked to, and that the answer was cut."""
    said, thought, cut = "", False, False
    to_terminal = sys.stdout.isatty()
    for event in events:
        match event:
            case ReasoningDelta() if show_reasoning:
                click.secho(plain(event.text), nl=False, err=True, dim=True)
                thought = True
            case TextDelta():
                if thought:
                    click.echo(err=True)
                    thought = False
                said = event.text or said
                click.echo(plain(event.text) if to_terminal else event.text, nl=False)
            case Done():
                cut = event.finish_reason == "length"
    if thought:
        click.echo(err=True)
    if not said.endswith("\n"):
        click.echo()
    if cut:
        click.echo(CUT, err=True)
