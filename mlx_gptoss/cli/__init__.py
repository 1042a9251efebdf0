"""The command `mlx-gptoss`: a click group that imports a command's module only when that command runs."""

from __future__ import annotations

import click


@click.group()
def main() -> None:
    """gpt-oss on Apple Silicon through MLX."""
