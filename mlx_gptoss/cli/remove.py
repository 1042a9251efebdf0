"""`mlx-gptoss remove`: delete a downloaded or a converted model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_gptoss.cli.options import installed_argument
from mlx_gptoss.errors import ConversionError, ModelNotFoundError, RequestError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo


@dataclass(frozen=True)
class Removal:
    """What is to be deleted, how many bytes that frees, and what stays behind."""

    name: str
    folder: Path
    nbytes: int
    delete: Callable[[], None]
    stays: tuple[str, ...] = ()


@click.command()
@installed_argument
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def remove(model: str, yes: bool) -> None:
    """Delete MODEL from this machine: a download, or a folder that `convert` made.

    Asks first. Of a converted folder the files of its manifest are deleted; others stay.
    """
    from mlx_gptoss.checkpoint.memory import gigabytes

    found = find(model)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError(f"{found.folder} would be deleted, and nobody can be asked: add --yes")
        click.confirm(f"Delete {found.name}, {gigabytes(found.nbytes)} in {found.folder}?", abort=True)
    found.delete()
    click.echo(f"deleted {found.name}: {gigabytes(found.nbytes)} freed")
    if found.stays:
        click.echo(f"left in {found.folder}, not in its manifest: {', '.join(found.stays)}")


def find(model: str) -> Removal:
    """What to delete for a name. Raises ModelNotFoundError, RequestError or ConversionError."""
    from mlx_gptoss.checkpoint import registry
    from mlx_gptoss.checkpoint.installed import cached_repos
    from mlx_gptoss.checkpoint.names import DEMO, did_you_mean, expand

    if model == DEMO:
        raise RequestError("the demo model is part of this package and stays: expected another model")
    text = expand(model)
    path = Path(text).expanduser()
    folder = path if path.is_dir() else registry.find(text) if "/" not in text else None
    if folder is not None:
        return _conversion(folder)
    repos = {repo.repo_id: repo for repo in cached_repos()}
    if text in repos:
        return _download(repos[text])
    raise ModelNotFoundError(
        f"{model!r} is not on this machine: `mlx-gptoss models` lists what is"
        f"{did_you_mean(model, [*repos, *(folder.name for folder in registry.remembered())])}"
    )


def _download(repo: CachedRepoInfo) -> Removal:
    from huggingface_hub import constants, scan_cache_dir

    from mlx_gptoss.checkpoint.hub import partial_files

    commits = [revision.commit_hash for revision in repo.revisions]
    strategy = scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(*commits)
    begun = sum(path.stat().st_size for path in partial_files(repo.repo_id))
    return Removal(repo.repo_id, repo.repo_path, strategy.expected_freed_size + begun, strategy.execute)


def _conversion(folder: Path) -> Removal:
    from mlx_gptoss.checkpoint import registry
    from mlx_gptoss.convert.manifest import MANIFEST_NAME, read_manifest

    if not (folder / MANIFEST_NAME).is_file():
        raise ConversionError(
            f"{folder} has no {MANIFEST_NAME}: only what `convert` made is deleted here; rm -r does it"
        )
    if "snapshots" in folder.resolve().parts:
        raise RequestError(f"{folder} is part of the Hub's cache: give the Hub id instead")
    named = {*read_manifest(folder).files, MANIFEST_NAME}
    files = [folder / name for name in sorted(named) if (folder / name).is_file()]
    stays = tuple(sorted(path.name for path in folder.iterdir() if path not in files))

    def delete() -> None:
        for path in files:
            path.unlink()
        if not stays:
            folder.rmdir()
        registry.forget(folder)

    return Removal(folder.name, folder, sum(path.stat().st_size for path in files), delete, stays)
