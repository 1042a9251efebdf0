"""Asking before a tool is used that may change something."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Callable, Sequence
from dataclasses import replace

import click
from rich.console import Console
from rich.text import Text

from mlx_gptoss.cli.terminal.screen import no_echo
from mlx_gptoss.harmony import ToolCall
from mlx_gptoss.mcp.tools import McpTool

SHOWN = 4000  # characters of a call; of a longer one its length is told as well
ANSWERS = {"y": "yes", "n": "no", "\r": "no", "\n": "no", "\x1b": "no", "a": "always"}
REFUSED = "error: the user did not allow this call"

# Asked with the server and the call; the answer is "yes", "no" or "always".
Ask = Callable[[str, ToolCall], str]


def approved(tools: Sequence[McpTool], ask: Ask) -> list[McpTool]:
    """The tools, of which those that are not marked read-only ask before each call; "always" ends that."""
    return [tool if tool.read_only else _asking(tool, ask) for tool in tools]


def _asking(tool: McpTool, ask: Ask) -> McpTool:
    always = False

    def handle(call: ToolCall) -> object:
        nonlocal always
        answer = "yes" if always else ask(tool.server, call)
        always = answer == "always"
        return REFUSED if answer == "no" else tool.handle(call)

    return replace(tool, handle=handle)


def refuse(server: str, call: ToolCall) -> str:
    """Where nobody can be asked."""
    click.echo(f"{server}: {call.name} may change something and was not run: --yes allows it", err=True)
    return "no"


def told(call: ToolCall) -> str:
    """A call as it is put to the user: nothing in it may hide, or stand elsewhere than it is."""
    text = f"{call.name} {call.arguments}"
    length = f" ({len(text):,} characters in all)" if len(text) > SHOWN else ""
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:SHOWN])
    return shown + ("…" if length else "") + length


def ask_in_terminal(console: Console) -> Ask:
    """Asks for a key. What was typed before the question is no answer to it."""

    def ask(server: str, call: ToolCall) -> str:
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
        console.print(Text(f"{server} wants to run {told(call)}", style="yellow"))
        console.print(Text("run it? [y]es, [n]o, [a]lways ", style="yellow"), end="")
        while (key := _key()) not in ANSWERS:
            pass
        console.print(Text(ANSWERS[key], style="yellow"))
        return ANSWERS[key]

    return ask


def _key() -> str:
    """What is typed next, at once; several characters where they came together, as pasted ones do."""
    with no_echo():
        # Not click.getchar, which throws away what was typed since the question was shown.
        return os.read(sys.stdin.fileno(), 32).decode("utf-8", "replace").lower() or "n"
