"""One answer to standard output: its text and nothing else, for pipes and scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from mlx_gptoss.cli.terminal.markdown import plain
from mlx_gptoss.harmony import Event, ReasoningDelta, TextDelta


def answer_once(events: Iterator[Event], *, show_reasoning: bool = False) -> None:
    """Print the answer as it comes, and the reasoning to stderr if asked to."""
    said, thought = "", False
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
    if thought:
        click.echo(err=True)
    if not said.endswith("\n"):
        click.echo()
