"""`mlx-gptoss completion`: the script that makes a shell complete commands, options and models."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["zsh", "bash", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    In ~/.zshrc or ~/.bashrc: eval "$(mlx-gptoss completion zsh)"; with fish: mlx-gptoss completion fish >
    ~/.config/fish/completions/mlx-gptoss.fish
    """
    root = ctx.find_root()
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(root.command, {}, "mlx-gptoss", "_MLX_GPTOSS_COMPLETE").source())
