"""`mlx-gptoss models`: what is on this machine, and whether it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlx_gptoss.checkpoint.installed import Installed

CONTEXT = 4096  # tokens of the conversation that must fit beside the weights


@click.command()
@click.argument("folders", metavar="[FOLDER]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the models on this machine: name, bytes on disk, recipe, memory needed, place.

    These are the demo, what was downloaded (in the Hub's cache) and what `convert` made. Models elsewhere are
    listed from now on when their FOLDER, or the one that holds their folders, is given. A name of the list
    works wherever a command takes a MODEL. Memory is that of a conversation of 4,096 tokens.
    """
    from mlx_gptoss.checkpoint.installed import installed
    from mlx_gptoss.device import available_memory

    for folder in folders:
        _add(folder)
    free = available_memory()
    found = [describe(item, free) for item in installed()]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print_table(found)


def _add(folder: Path) -> None:
    """Put a model's folder on the list, or those right under `folder`. Raises ModelNotFoundError."""
    from mlx_gptoss.checkpoint import registry
    from mlx_gptoss.errors import ConfigError, ModelNotFoundError
    from mlx_gptoss.model.config import read_config

    candidates = [folder] if (folder / "config.json").is_file() else sorted(folder.expanduser().glob("*/"))
    added = 0
    for candidate in candidates:
        try:
            read_config(candidate)
        except ConfigError:
            continue
        registry.remember(candidate)
        added += 1
    if not added:
        raise ModelNotFoundError(
            f"{folder} holds no gpt-oss model: expected a model's folder (with its config.json), or one that "
            "holds such folders"
        )


def describe(item: Installed, free: int) -> dict[str, Any]:
    """What is told of a model, JSON-ready; bytes. `free`: what a model may take."""
    from mlx_gptoss.checkpoint.names import short_name

    needed = least = None
    if item.plan is not None and item.least is not None:
        context = min(CONTEXT, item.plan.config.max_position)
        needed, least = item.plan.total(context), item.least.total(context)
    return {
        "name": short_name(item.name),
        "origin": item.origin,
        "bytes": item.nbytes,
        "recipe": _recipe(item),
        "memory": needed,
        "fits": None if needed is None else needed <= free,
        "streams": None if least is None else least <= free,
        "folder": str(item.folder),
        "problem": item.problem,
    }


def _recipe(item: Installed) -> str | None:
    """The recipe of the manifest, or the formats that its largest parts are stored in."""
    from mlx_gptoss.convert.manifest import MANIFEST_NAME, read_manifest
    from mlx_gptoss.errors import ConversionError

    if (item.folder / MANIFEST_NAME).is_file():
        try:
            return str(read_manifest(item.folder).recipe.get("name"))
        except ConversionError:  # `verify` tells what is wrong with it
            return "unreadable manifest"
    if item.plan is None:
        return None
    stored = {part.format: part.stored for part in sorted(item.plan.parts, key=lambda part: part.stored)}
    return " + ".join([form for form in reversed(stored) if form != "float32"][:2])


def _print_table(found: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from mlx_gptoss.checkpoint.memory import gigabytes
    from mlx_gptoss.cli.tables import show_table

    rows = []
    for item in found:
        fits = {
            True: Text("yes", "green"),
            False: Text("from the SSD", "yellow") if item["streams"] else Text("no", "red"),
            None: Text(item["problem"] or "", "red"),
        }
        rows.append(
            (
                item["name"],
                item["origin"],
                item["recipe"] or "",
                gigabytes(item["bytes"]),
                "" if item["memory"] is None else gigabytes(item["memory"]),
                fits[item["fits"]],
            )
        )
    show_table(("model", "origin", "weights", "on disk", "memory", "fits now"), rows, left=3)
    width = max(len(item["name"]) for item in found)
    for item in found:
        click.echo(f"  {item['name']:<{width}}  {home_relative(item['folder'])}")
    for item in found:
        if item["problem"] == "incomplete" and item["origin"] == "downloaded":
            click.echo(f"{item['name']} is incomplete: `mlx-gptoss pull {item['name']}` goes on with it")


def home_relative(path: str) -> str:
    """A path as people write it, from ~ on."""
    home = str(Path.home())
    return f"~{path[len(home) :]}" if path.startswith(home + "/") else path
