"""`mlx-gptoss convert`: any gpt-oss checkpoint becomes a folder of MLX weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.checkpoint.names import expand
from mlx_gptoss.cli.options import offline_option, revision_option, size, source_argument, whole
from mlx_gptoss.cli.progress import byte_bar, progress_bar
from mlx_gptoss.cli.tables import show_table
from mlx_gptoss.convert.recipes import DEFAULT_RECIPE, RECIPES, make_recipe
from mlx_gptoss.model.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES

if TYPE_CHECKING:
    from mlx_gptoss.convert.convert import Converted

PART_BITS: dict[str, Any] = {"type": click.Choice([*map(str, AFFINE_BITS), "16"]), "callback": whole}
GROUP_SIZES = click.Choice(list(map(str, AFFINE_GROUP_SIZES)))


@click.command()
@source_argument
@click.argument("target", metavar="[TARGET]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=DEFAULT_RECIPE,
    show_default=True,
    help=" ".join(f"{recipe.name}: {recipe.summary}." for recipe in RECIPES.values()),
)
@click.option("--head", **PART_BITS, help="Bits of the output head; 16 keeps it.")
@click.option("--attention", **PART_BITS, help="Bits of the attention projections; 16 keeps them.")
@click.option("--embedding", **PART_BITS, help="Bits of the embedding; 16 keeps it.")
@click.option("--group-size", type=GROUP_SIZES, callback=whole, help="Weights sharing a scale.")
@click.option("--fast", is_flag=True, help="MLX's own quantiser instead of the search; no file hashes.")
@click.option(
    "--for-streaming", is_flag=True, help="Lay each expert out in one run, to be read from the disk."
)
@click.option("--mxfp4-search", is_flag=True, help="Search the scales of experts that are not MXFP4 yet.")
@click.option("--shard-size", type=size, help="Most bytes of weights in a file.  [default: 5GB]")
@click.option("--tokenizer", metavar="FOLDER", help="Where the tokenizer is, when SOURCE has none.")
@click.option("--no-tokenizer", is_flag=True, help="Go without a tokenizer.")
@click.option("--restart", is_flag=True, help="Throw away an unfinished conversion instead of finishing it.")
@click.option("--verify", "check", is_flag=True, help="Compare the result with SOURCE afterwards.")
@revision_option
@offline_option
def convert(
    source: str,
    target: Path | None,
    recipe: str,
    head: int | None,
    attention: int | None,
    embedding: int | None,
    group_size: int | None,
    shard_size: int | None,
    no_tokenizer: bool,
    check: bool,
    revision: str | None,
    offline: bool,
    **options: Any,
) -> None:
    """Convert a gpt-oss checkpoint into the new folder TARGET.

    SOURCE is a folder (Hugging Face's or OpenAI's layout, a bf16 fine-tune, an mlx-lm conversion), a .gguf
    file, 20b or 120b, or the id of a Hub repository. TARGET is named after SOURCE and the recipe if it is not
    given, in the current folder; `models` lists it, and its name can be used anywhere. Experts keep their
    MXFP4 bytes. A conversion that was stopped goes on when it is started again.
    """
    from mlx_gptoss.convert.convert import SHARD_SIZE
    from mlx_gptoss.convert.convert import convert as run

    chosen = make_recipe(recipe, head=head, attention=attention, embedding=embedding, group_size=group_size)
    folder = target or Path(f"{default_name(source)}-{recipe}")
    with progress_bar("converting", in_bytes=True) as tell:
        result = run(
            source,
            folder,
            chosen,
            shard_size=SHARD_SIZE if shard_size is None else shard_size,
            need_tokenizer=not no_tokenizer,
            revision=revision,
            offline=offline,
            progress=lambda progress: tell(progress.done, progress.total),
            **options,
        )
    _print_summary(result)
    _remember(result.folder)
    if check:
        _verify(result, source, revision, offline)


def default_name(source: str) -> str:
    """What to call a conversion of `source`: the last part of its path or id."""
    name = Path(source).resolve().name if Path(source).exists() else expand(source).rpartition("/")[2]
    return re.sub(r"-\d{5}-of-\d{5}$", "", name.removesuffix(".gguf"))  # of a part, the model's name


def _remember(folder: Path) -> None:
    """Note the folder for `models`; where that cannot be written the conversion is no worse for it."""
    from mlx_gptoss.checkpoint import registry

    try:
        registry.remember(folder)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}"
        click.echo(f"note: `mlx-gptoss models` will not list {folder} ({told})", err=True)


def _print_summary(result: Converted) -> None:
    from mlx_gptoss.checkpoint.memory import gigabytes
    from mlx_gptoss.convert.verify import part_reports

    recipe = result.manifest.recipe["name"]
    again = f", {gigabytes(result.resumed)} of them by an earlier run" if result.resumed else ""
    click.echo(f"{result.folder}: {gigabytes(result.nbytes)}, recipe {recipe}{again}")
    rows = []
    for part in part_reports(result.manifest.tensors):
        error = "exact" if part.recorded == 0 else f"{part.recorded:.2%}"
        rows.append((part.part, ", ".join(part.actions), gigabytes(part.bytes), error))
    show_table(("part", "made by", "size", "relative error"), rows, left=2)
    for note in result.notes:
        click.echo(f"note: {note}")


def _verify(result: Converted, source: str, revision: str | None, offline: bool) -> None:
    from mlx_gptoss.checkpoint.hub import resolve
    from mlx_gptoss.convert.verify import bytes_to_read
    from mlx_gptoss.convert.verify import verify as check

    origin = resolve(source, revision=revision, offline=offline, gguf=True)
    with byte_bar("checking", bytes_to_read(result.manifest, origin)) as tick:
        found = check(result.folder, origin, progress=tick)
    found.check()
    click.echo(f"verified: {found.files} files, {found.copies:,} tensors bit-identical to {origin}")
