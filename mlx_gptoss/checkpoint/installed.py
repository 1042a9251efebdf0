"""The models on this machine: the demo, those that were converted here, and those in the Hub's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlx_gptoss.checkpoint import registry
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER, is_whole, layout_folder, partial_files
from mlx_gptoss.checkpoint.memory import MemoryPlan, plan_checkpoint
from mlx_gptoss.checkpoint.names import DEMO, short_name
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.errors import CheckpointError, ConfigError
from mlx_gptoss.model.config import read_config

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo


@dataclass(frozen=True)
class Installed:
    """A model on this machine. `name` is what to type for it, `nbytes` what it takes on the disk.

    plan: with all experts in memory; least: with those of one token, the others being read when they are
    wanted. problem: why it cannot be loaded as it is; both plans are None then.
    """

    name: str
    origin: Literal["built in", "converted", "downloaded"]
    folder: Path
    nbytes: int
    plan: MemoryPlan | None
    least: MemoryPlan | None = None
    problem: str | None = None


def installed() -> Iterator[Installed]:
    """All of them: the demo, conversions from the newest on, downloads by name. Raises ConfigError."""
    if DEMO_FOLDER.is_dir():
        yield _look(DEMO, "built in", DEMO_FOLDER, _bytes_in(DEMO_FOLDER))
    seen: set[str] = set()
    for folder in registry.remembered():
        # Of two with one name the newest is found by it.
        yield _look(
            str(folder) if folder.name in seen else folder.name, "converted", folder, _bytes_in(folder)
        )
        seen.add(folder.name)
    for repo in sorted(cached_repos(), key=lambda repo: repo.repo_id):
        snapshot = _snapshot(repo)
        if snapshot is not None:
            nbytes = repo.size_on_disk + sum(path.stat().st_size for path in partial_files(repo.repo_id))
            yield _look(short_name(repo.repo_id), "downloaded", snapshot, nbytes)


def cached_repos() -> list[CachedRepoInfo]:
    """The models in the Hub's cache, gpt-oss or not; what is damaged there is left out."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    return [repo for repo in found.repos if repo.repo_type == "model"]


def _snapshot(repo: CachedRepoInfo) -> Path | None:
    """The revision that is loaded by default, or else the newest; None when it is not of a gpt-oss model."""
    revisions = sorted(repo.revisions, key=lambda r: ("main" in r.refs, r.last_modified))
    if not revisions:
        return None
    folder = layout_folder(revisions[-1].snapshot_path)
    try:
        read_config(folder)
    except ConfigError:
        return None
    return folder


def _look(
    name: str, origin: Literal["built in", "converted", "downloaded"], folder: Path, nbytes: int
) -> Installed:
    if not is_whole(folder):
        return Installed(name, origin, folder, nbytes, None, problem="incomplete")
    try:
        checkpoint = Checkpoint(folder)
        least = plan_checkpoint(checkpoint, checkpoint.config.experts_per_token)
        return Installed(name, origin, folder, nbytes, plan_checkpoint(checkpoint), least)
    except (CheckpointError, ConfigError) as error:
        return Installed(name, origin, folder, nbytes, None, problem=str(error))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
