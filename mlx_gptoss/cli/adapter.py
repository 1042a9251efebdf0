"""`mlx-gptoss adapter`: look at an adapter, write it in another format, or merge it into its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from mlx_gptoss.cli.options import offline_option, revision_option
from mlx_gptoss.cli.progress import progress_bar
from mlx_gptoss.convert.recipes import BFLOAT16, RECIPES, make_recipe

if TYPE_CHECKING:
    from mlx_gptoss.checkpoint.adapter import Adapter
    from mlx_gptoss.model.config import ModelConfig

MERGED_RECIPE = "mxfp4-q8"


@click.group()
def adapter() -> None:
    """Look at an adapter, write it in another format, or merge it into its model."""


@adapter.command("inspect")
@click.argument("model", metavar="MODEL")
@click.argument("folder", metavar="ADAPTER")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@revision_option
@offline_option
def inspect_adapter(model: str, folder: str, as_json: bool, revision: str | None, offline: bool) -> None:
    """Show what ADAPTER changes in MODEL: parts, ranks, sizes."""
    found, _ = _read(model, folder, revision, offline)
    report = describe(found)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    console = Console()
    about = ", ".join(f"{key} {value}" for key, value in report["about"].items() if value is not None)
    console.print(
        f"{report['parameters']:,} parameters, {report['bytes'] / 1e6:.1f} MB, scale {report['scale']:g}"
        + (f"; {about}" if about else ""),
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("part", "layers", "rank", "size of the change"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in report["parts"]:
        table.add_row(row["part"], _spans(row["layers"]), str(row["rank"]), f"{row['change']:.3g}")
    console.print(table)


@adapter.command("export")
@click.argument("model", metavar="MODEL")
@click.argument("folder", metavar="ADAPTER")
@click.argument("target", metavar="OUT", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["mlx-lm", "peft"]), required=True, help="Whose files to write."
)
@revision_option
@offline_option
def export_adapter(
    model: str, folder: str, target: Path, form: str, revision: str | None, offline: bool
) -> None:
    """Write ADAPTER, of MODEL, into the folder OUT as mlx-lm or PEFT (and so vLLM or Unsloth) reads it."""
    from mlx_gptoss.checkpoint.adapter import write_adapter

    found, config = _read(model, folder, revision, offline)
    write_adapter(target, found, config, format=form)
    click.echo(f"{target}: {found.parameters:,} parameters for {form}")


@adapter.command("merge")
@click.argument("model", metavar="MODEL")
@click.argument("folder", metavar="ADAPTER")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--recipe", type=click.Choice([*RECIPES, BFLOAT16.name]), default=MERGED_RECIPE, show_default=True,
    help="How the merged weights are stored; see `convert`. bf16: everything in bfloat16, experts too.",
)  # fmt: skip
@revision_option
@offline_option
def merge_adapter(
    model: str, folder: str, target: Path, recipe: str, revision: str | None, offline: bool
) -> None:
    """Add ADAPTER to MODEL's weights and write the whole as the new folder OUT.

    The result is a checkpoint like any other. What merging and its rounding change is measured against MODEL
    with the adapter apart.
    """
    from mlx_gptoss.checkpoint.hub import resolve, resolve_adapter
    from mlx_gptoss.convert.convert import convert
    from mlx_gptoss.convert.quality import compare_on_text

    source, apart = (
        resolve(model, revision=revision, offline=offline),
        resolve_adapter(folder, offline=offline),
    )
    with progress_bar("merging", in_bytes=True) as tell:
        made = convert(
            *(source, target, BFLOAT16 if recipe == BFLOAT16.name else make_recipe(recipe)),
            adapter=apart,
            progress=lambda now: tell(now.done, now.total),
        )
    with progress_bar("comparing, layer by layer") as tell:
        quality = compare_on_text(made.folder, source, adapter=apart, progress=tell)
    click.echo(
        f"{made.folder}: {made.nbytes / 1e9:.3f} GB; to the model with the adapter apart KL {quality.kl:.5f} "
        f"nats (99th percentile {quality.kl_p99:.5f}), same likeliest token {quality.top1:.2%}"
    )


def _read(model: str, folder: str, revision: str | None, offline: bool) -> tuple[Adapter, ModelConfig]:
    from mlx_gptoss.checkpoint.adapter import read_adapter
    from mlx_gptoss.checkpoint.hub import resolve, resolve_adapter
    from mlx_gptoss.model.config import read_config

    config, _ = read_config(resolve(model, revision=revision, offline=offline))
    return read_adapter(resolve_adapter(folder, offline=offline), config), config


def describe(found: Adapter) -> dict[str, Any]:
    """What `adapter inspect` tells, as JSON-ready values. change: the root mean square of what is added."""
    import mlx.core as mx
    import numpy as np

    rows = []
    for name in found.names:
        pairs = [(layer, pair) for layer, part, pair in found.pairs() if part == name]
        squares = [
            float(np.asarray(mx.mean(mx.square(found.scale * pair.b @ pair.a)).astype(mx.float32)))
            for _, pair in pairs
        ]
        rows.append(
            {
                "part": name,
                "layers": [layer for layer, _ in pairs],
                "rank": max(pair.rank for _, pair in pairs),
                "change": (sum(squares) / len(squares)) ** 0.5,
            }
        )
    return {
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "scale": found.scale,
        "about": found.about,
        "parts": rows,
    }


def _spans(numbers: list[int]) -> str:
    """Layers 0, 1, 2, 5 as 0-2, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
