"""The command `mlx-gptoss`: a click group that imports a command's module only when that command runs.

A command NAME lives in the module `mlx_gptoss/cli/NAME.py`, as a click command of the same name; its line in
the help stands in COMMANDS, so that `--help` imports nothing. Expected failures (GptOssError, OSError) end as
one line on stderr and exit status 1, Ctrl-C as status 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from mlx_gptoss.errors import GptOssError

__all__ = ["COMMANDS", "cli", "main", "run"]

COMMANDS = {
    "chat": "Chat with a model in the terminal.",
    "generate": "Complete a text, raw or in the chat format.",
    "serve": "Serve a model over an OpenAI-compatible HTTP API.",
    "convert": "Convert a checkpoint to MLX's layout.",
    "verify": "Check a converted folder against its manifest.",
    "share": "Publish a converted folder on the Hub.",
    "inspect": "Show a checkpoint's layout, sizes and memory needs.",
    "bench": "Measure a model's speed on this machine.",
    "doctor": "Examine this machine, and try what runs on it.",
    "demo": "Run the built-in demo model, no download needed.",
}

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


class LazyGroup(click.Group):
    """Knows its commands by name and help line; imports the module of the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="gptoss-mlx")
def cli() -> None:
    """gpt-oss on Apple Silicon through MLX.

    MODEL is a folder, the id of a repository on the Hugging Face Hub, or `demo`.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    _open_closed_streams()
    try:
        status = cli.main(args, prog_name="mlx-gptoss", standalone_mode=False)
        sys.stdout.flush()
    except GptOssError as error:
        click.echo(f"error: {_printable(str(error))}", err=True)
        return 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        _flush_or_drop()
        return 1
    except OSError as error:
        told = f"{error.filename or 'output'}: {error.strerror or error}"
        click.echo(f"error: {_printable(told)}", err=True)
        _flush_or_drop()
        return 1
    return status if isinstance(status, int) else 0


def _printable(text: str) -> str:
    """On one line, and without what could take over the terminal: files may have any name."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def _open_closed_streams() -> None:
    """Standard streams that the caller closed (`>&-`) are None in Python: read and write nothing there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _flush_or_drop() -> None:
    """Write what stdout still holds; if that fails, drop it, or Python complains again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
