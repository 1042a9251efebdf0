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
from typing import TYPE_CHECKING, NoReturn

import click

from mlx_gptoss.errors import GptOssError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["COMMANDS", "cli", "main", "run"]

COMMANDS = {
    "chat": "Chat with a model in the terminal.",
    "generate": "Answer one prompt, or complete a text.",
    "serve": "Serve a model over an OpenAI-compatible HTTP API.",
    "models": "List the models on this machine, and what fits it.",
    "pull": "Download a model.",
    "remove": "Delete a downloaded or a converted model.",
    "convert": "Convert a checkpoint to MLX's layout.",
    "verify": "Check a converted folder against its manifest.",
    "tune": "Train an adapter of a model on your data.",
    "adapter": "Inspect, export or merge an adapter.",
    "share": "Publish a converted folder on the Hub.",
    "inspect": "Show a checkpoint's layout, sizes and memory needs.",
    "bench": "Measure a model's speed on this machine.",
    "hosts": "Check several machines for one model over all of them.",
    "doctor": "Examine this machine, and try what runs on it.",
    "demo": "Run the built-in demo model, no download needed.",
    "completion": "Print what makes the shell complete commands and models.",
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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.NoSuchCommand(name, possibilities=COMMANDS, ctx=ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=line) for name, line in COMMANDS.items()]
        return [item for item in found if item.value.startswith(incomplete)] or super().shell_complete(
            ctx, incomplete
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="gptoss-mlx")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """gpt-oss on Apple Silicon through MLX.

    MODEL is `20b`, `120b`, `safeguard-20b` or `safeguard-120b` (OpenAI's checkpoints), `demo`, a folder, the
    name of a model in the list of `models`, or the id of a repository on the Hugging Face Hub.
    """
    if ctx.invoked_subcommand is not None:
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.exceptions.NoArgsIsHelpError(ctx)
    from mlx_gptoss.cli.start import start

    start()


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
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        click.echo(f"error: {_printable(_usage_line(error))}", err=True)
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


def _usage_line(error: click.ClickException) -> str:
    """What click says, spelled as our own errors are, and where the options are told."""
    message = error.format_message().removesuffix(".")
    message = message[:1].lower() + message[1:]
    context = getattr(error, "ctx", None)
    return message if context is None else f"{message} (see `{context.command_path} --help`)"


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
