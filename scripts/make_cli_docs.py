"""Write docs/cli.md from the commands' own help texts; with --check only say whether it is in step.

python scripts/make_cli_docs.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlx_gptoss.cli import COMMANDS, cli

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 100
HEADER = """# The command line

Made from the commands' help by `make docs`; do not edit by hand.
"""


def help_of(command: click.Command, path: str, parent: click.Context | None) -> list[str]:
    """The sections of a command and, where it is a group, of its subcommands."""
    context = click.Context(command, info_name=path.split()[-1], parent=parent, **command.context_settings)
    context.terminal_width = WIDTH
    sections = [f"## {path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"]
    if isinstance(command, click.Group) and command is not cli:
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            sections += help_of(child, f"{path} {name}", context)
    return sections


def render() -> str:
    """The whole page."""
    root = click.Context(cli, info_name="mlx-gptoss")
    sections = help_of(cli, "mlx-gptoss", None)
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        sections += help_of(command, f"mlx-gptoss {name}", root)
    return "\n".join([HEADER, *sections])


def main() -> int:
    """Write the page, or with --check tell whether it is in step."""
    page = render()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(page, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == page:
        return 0
    print(f"{TARGET} is not in step with the commands' help: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
