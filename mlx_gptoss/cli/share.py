"""`mlx-gptoss share`: publish a converted folder on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.cli.progress import byte_bar
from mlx_gptoss.cli.tables import show_table

if TYPE_CHECKING:
    from mlx_gptoss.convert.share import SharePlan


@click.command()
@click.argument("folder", type=click.Path(), metavar="FOLDER")
@click.argument("repository", metavar="NAMESPACE/NAME")
@click.option("--public", is_flag=True, help="Let everyone read it.  [default: private]")
@click.option("--dry-run", is_flag=True, help="Print exactly what would be sent; send nothing.")
@click.option("--license", metavar="ID", help="The base model's license.  [default: apache-2.0 for openai/*]")
@click.option("--base-model", metavar="ID", help="The base model's id.  [default: the manifest's source]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def share(
    folder: str,
    repository: str,
    public: bool,
    dry_run: bool,
    license: str | None,
    base_model: str | None,
    as_json: bool,
) -> None:
    """Upload FOLDER (or its name in `models`), written by `convert` or `tune`, to NAMESPACE/NAME on the Hub.

    Sent are the files of its manifest, the manifest, and a model card made from it; nothing else. A folder
    that does not verify is refused. Of an adapter its own two files and a card are sent. Run the same command
    again to go on after an interruption.
    """
    from mlx_gptoss.checkpoint import registry
    from mlx_gptoss.convert.manifest import read_manifest
    from mlx_gptoss.convert.share import plan, upload
    from mlx_gptoss.convert.share_adapter import is_adapter, plan_adapter
    from mlx_gptoss.convert.verify import bytes_to_read

    if "/" not in folder and not Path(folder).exists():
        folder = str(registry.find(folder) or folder)
    about: dict[str, Any] = {"public": public, "license": license, "base_model": base_model}
    if is_adapter(Path(folder)):
        made = plan_adapter(Path(folder), repository, **about)
    else:
        with byte_bar("checking", bytes_to_read(read_manifest(folder)), quiet=as_json) as tick:
            made = plan(folder, repository, **about, progress=tick)
    if not as_json:
        _print_plan(made)
    address = None if dry_run else upload(made)
    if as_json:
        click.echo(json.dumps(made.to_dict() | {"commit": address}, indent=2))
    elif address is None:
        click.echo(f"\n{made.card}\ndry run: nothing was sent")
    else:
        click.echo(f"sent: {address}")


def _print_plan(made: SharePlan) -> None:
    from mlx_gptoss.checkpoint.memory import gigabytes

    kind = "public" if made.public else "private"
    click.echo(f"{made.folder} -> {made.repo_id} ({kind}): {len(made.files)} files, {gigabytes(made.bytes)}")
    rows = [
        (name, (entry.sha256 or "")[:16], f"{entry.size:,}") for name, entry in sorted(made.files.items())
    ]
    show_table(("file", "SHA-256 begins", "bytes"), rows, left=2)
    for name in made.not_sent:
        click.echo(f"stays here, not in the manifest: {name}")
