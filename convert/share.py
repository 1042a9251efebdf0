"""Upload a converted folder to the Hub: exactly the manifest's files, the manifest, and a model card.

`plan` decides what is sent and refuses a folder that does not verify; `upload` sends a plan. One commit makes
everything visible at once; until then nothing changes for whoever downloads. Files already stored on the Hub
are not sent again, so an interrupted upload goes on when it is started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_gptoss.checkpoint.hub import explain, is_repo_id
from mlx_gptoss.convert.card import model_card
from mlx_gptoss.convert.manifest import MANIFEST_NAME, FileEntry
from mlx_gptoss.convert.verify import CARD_NAME, Progress, verify
from mlx_gptoss.errors import ConversionError, GptOssError, HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class SharePlan:
    """What `upload` will send to `repo_id`. `files`: name -> size in bytes and SHA-256, the card included."""

    folder: Path
    repo_id: str
    public: bool
    files: dict[str, FileEntry]
    card: str
    not_sent: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "repository": self.repo_id,
            "visibility": "public" if self.public else "private",
            "bytes": self.bytes,
            "files": {name: {"size": e.size, "sha256": e.sha256} for name, e in sorted(self.files.items())},
            "card": self.card,
            "not_sent": list(self.not_sent),
        }


def plan(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> SharePlan:
    """Verify the folder and list what would be sent. Touches no network.

    Raises ConversionError for a folder without a manifest, an id that isn't NAMESPACE/NAME or an unknown
    license, VerificationError for a folder that isn't what its manifest says.
    """
    if not is_repo_id(repo_id):
        raise ConversionError(
            f"{repo_id!r} is no Hub id, expected NAMESPACE/NAME such as 'someone/gpt-oss-20b-q4'"
        )
    found = verify(folder, progress=progress)
    found.check()
    card = model_card(found.manifest, repo_id, license=license, base_model=base_model)
    files = {name: entry for name, entry in found.manifest.files.items() if name != CARD_NAME}
    files[MANIFEST_NAME] = FileEntry.of((found.folder / MANIFEST_NAME).read_bytes())
    files[CARD_NAME] = FileEntry.of(card.encode())
    return SharePlan(found.folder, repo_id, public, files, card, found.extra)


def upload(plan: SharePlan) -> str:
    """Create the repository where it doesn't exist, send the plan, check what arrived; the commit's address.

    Raises HubError: refused, unreachable, a repository that is public although `plan.public` isn't set, or
    one that holds other weights.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(plan.repo_id, private=not plan.public, exist_ok=True)
        info = api.model_info(plan.repo_id)
        _check_target(plan, bool(info.private), [s.rfilename for s in info.siblings or []])
        operations = [
            CommitOperationAdd(
                path_in_repo=name,
                path_or_fileobj=plan.card.encode() if name == CARD_NAME else str(plan.folder / name),
            )
            for name in sorted(plan.files)
        ]
        commit = api.create_commit(plan.repo_id, operations, commit_message="Upload with mlx-gptoss")
        _check_arrived(api, plan, commit.oid)
    except GptOssError:
        raise
    except Exception as error:
        raise explain(error, plan.repo_id, doing="upload") from error
    return str(commit.commit_url)


def _check_target(plan: SharePlan, private: bool, present: Sequence[str]) -> None:
    """Refuse a repository that others can read unasked, and one whose weights would mix with these."""
    if not private and not plan.public:
        raise HubError(
            f"{plan.repo_id!r} exists and is public; say --public to upload there, or choose another name"
        )
    others = [
        n for n in present if n.endswith((".safetensors", ".safetensors.index.json")) and n not in plan.files
    ]
    if others:
        shown = ", ".join(others[:3]) + (" .." if len(others) > 3 else "")
        raise HubError(
            f"{plan.repo_id!r} already holds other weights ({shown}); "
            "delete them there, or choose another name"
        )


def _check_arrived(api: HfApi, plan: SharePlan, commit: str) -> None:
    """Compare sizes, and hashes where the Hub knows them, of every file in the commit."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(plan.repo_id, revision=commit, recursive=True)
    there = {item.path: item for item in tree if isinstance(item, RepoFile)}
    for name, entry in plan.files.items():
        item = there.get(name)
        if (
            item is None
            or item.size != entry.size
            or (item.lfs is not None and item.lfs.sha256 != entry.sha256)
        ):
            raise HubError(f"{name} did not arrive whole in {plan.repo_id!r}; run the same command again")
