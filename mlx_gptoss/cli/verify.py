"""`mlx-gptoss verify`: compare a converted folder with its manifest, its source, the source's predictions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_gptoss.cli.options import offline_option
from mlx_gptoss.cli.progress import byte_bar, progress_bar
from mlx_gptoss.cli.tables import show_table

if TYPE_CHECKING:
    from mlx_gptoss.convert.manifest import Quality
    from mlx_gptoss.convert.verify import Verification


@click.command()
@click.argument("folder", metavar="FOLDER")
@click.option("--source", metavar="SRC", help="Folder or Hub id it was converted from; compares the weights.")
@click.option(
    "--adapter", metavar="ADAPTER", help="Adapter that was merged into FOLDER: compares with SRC beside it."
)
@click.option("--source-revision", help="Branch, tag or commit of SRC.  [default: the manifest's]")
@click.option(
    "--quality", is_flag=True, help="Compare predictions on a text as well, and record it (needs --source)."
)
@click.option("--text", type=click.Path(), help="UTF-8 text for --quality.  [default: one that is built in]")
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify(
    ctx: click.Context,
    folder: str,
    source: str | None,
    adapter: str | None,
    source_revision: str | None,
    quality: bool,
    text: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Check every file and tensor of FOLDER against its manifest.json.

    With --source, verbatim tensors must be the source's own bytes, and the errors of the others are measured.
    FOLDER may also be a Hub id. The exit status is 1 when anything differs.
    """
    from mlx_gptoss.checkpoint.hub import resolve, resolve_adapter
    from mlx_gptoss.checkpoint.names import expand
    from mlx_gptoss.convert.manifest import read_manifest
    from mlx_gptoss.convert.verify import bytes_to_read
    from mlx_gptoss.convert.verify import verify as check

    if (quality or text) and source is None:
        raise click.UsageError("--quality compares with the source: add --source SRC")
    if adapter and source is None:
        raise click.UsageError("--adapter is of the source: add --source SRC")
    if source_revision and source is None:
        raise click.UsageError("--source-revision is of the source: add --source SRC")
    source = source and expand(source)
    root = resolve(folder, offline=offline)
    manifest = read_manifest(root)
    same = source == manifest.source.id and not Path(source).exists()  # a folder has no revisions
    revision = source_revision or (manifest.source.revision if same else None)
    origin = None
    if source is not None:
        origin = resolve(source, revision=revision, offline=offline, gguf=True)
    apart = None if adapter is None else resolve_adapter(adapter, offline=offline)
    with byte_bar("checking", bytes_to_read(manifest, origin), quiet=as_json) as tick:
        found = check(root, origin, adapter=apart, progress=tick)
    measured = None
    if origin is not None and (quality or text) and found.ok:
        measured = _measure(root, origin, apart, text, as_json)
    if as_json:
        click.echo(json.dumps(found.to_dict() | {"quality": measured and asdict(measured)}, indent=2))
        ctx.exit(0 if found.ok else 1)
    _print_tables(found, measured)
    found.check()


def _measure(root: Path, origin: Path, adapter: Path | None, text: str | None, quiet: bool) -> Quality:
    """Run both models over the text, and note the result in the manifest."""
    from mlx_gptoss.convert.manifest import MANIFEST_NAME
    from mlx_gptoss.convert.quality import compare_on_text, record
    from mlx_gptoss.errors import ConversionError

    with progress_bar("comparing, layer by layer", quiet=quiet) as tell:
        measured = compare_on_text(root, origin, text, adapter=adapter, progress=tell)
    if not (root / MANIFEST_NAME).is_symlink():  # a download in the Hub's cache stays what was downloaded
        try:
            record(root, measured)
        except ConversionError as error:
            click.echo(f"note: the figures were not recorded: {error}", err=True)
    return measured


def _print_tables(found: Verification, measured: Quality | None) -> None:
    from mlx_gptoss.checkpoint.memory import gigabytes

    source = "" if found.source is None else f", {found.copies:,} tensors bit-identical to {found.source}"
    click.echo(
        f"{found.folder}: {found.files} files, {gigabytes(found.bytes)}, "
        f"{len(found.manifest.tensors):,} tensors{source}"
    )
    rows = []
    for part in found.parts:
        errors = [
            "" if e is None else "exact" if e == 0 else f"{e:.3%}" for e in (part.recorded, part.measured)
        ]
        rows.append((part.part, ", ".join(part.actions), f"{part.tensors:,}", gigabytes(part.bytes), *errors))
    show_table(("part", "made by", "tensors", "size", "recorded error", "measured error"), rows, left=2)
    if measured is not None:
        click.echo(
            f"{measured.tokens:,} tokens of {measured.text}: KL divergence {measured.kl:.4f} nats "
            f"(99th percentile {measured.kl_p99:.4f}), same likeliest token {measured.top1:.1%}, "
            f"perplexity {measured.perplexity_source:.3f} -> {measured.perplexity:.3f}"
        )
    for name in found.extra:
        click.echo(f"not in the manifest: {name}")
    for note in found.notes:
        click.echo(f"note: {note}")
    if found.ok:
        click.secho("everything agrees", fg="green")
