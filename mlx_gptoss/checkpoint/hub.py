"""From what a person typed to a local folder: "demo", a folder, a short name, the name of a converted model,
or the id of a repository on the Hub.

Downloads go through ``huggingface_hub`` (its cache, its token, its progress bar), and only of the files that
this runtime reads: never the ``metal/`` and ``original/`` copies that triple the download.
"""

import errno
import fnmatch
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mlx_gptoss.checkpoint import registry
from mlx_gptoss.checkpoint.names import DEMO, did_you_mean, expand
from mlx_gptoss.checkpoint.safetensors import MAX_INDEX_BYTES
from mlx_gptoss.errors import GptOssError, HubError, ModelNotFoundError, RequestError
from mlx_gptoss.files import read_limited
from mlx_gptoss.model.config import read_config

DEMO_FOLDER = Path(__file__).parent.parent / "demo_model"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
TERMS = ("LICENSE", "LICENSE.txt", "USAGE_POLICY")
WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "manifest.json",
    *TOKENIZER_FILES,
    *TERMS,
)
"""Top-level files that loading reads, and the terms; the same under ``original/`` if that is all there is."""

ADAPTER_FILES = ("adapters.safetensors", "adapter_model.safetensors", "adapter_config.json", "README.md")

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_TIMEOUT = 10.0  # seconds for the one question that precedes a download


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    gguf: bool = False,
    weights: Collection[str] | None = None,
    announce: Callable[[str], None] | None = None,
) -> Path:
    """The local folder that holds `model`, downloaded first when it is a Hub id that isn't in the cache.

    model: "demo" (the model shipped in this package), an existing folder, a short name (see SHORT_NAMES), the
    name of a model that was converted here, or NAMESPACE/NAME on the Hub.
    revision: branch, tag or commit of a Hub id. offline: never touch the network (like ``HF_HUB_OFFLINE``).
    gguf: a .gguf file will do as well, and a repository of one (or of the parts of one), for `convert`.
    weights: of a repository's files of weights, those alone, by name (default: all).
    announce is told in one line what will be downloaded, where anything is.
    A folder that holds nothing but ``original/`` resolves to that.

    Raises ModelNotFoundError when there is no such folder or repository (or none in the cache while offline)
    or the folder may not be entered, HubError when the Hub refuses, can't be reached, or the disk is full,
    ConfigError, before anything else is downloaded, when config.json is not of a gpt-oss model, and
    RequestError for a revision of what is no Hub id.
    """
    text = expand(model)
    local = _on_disk(text, gguf)
    if local is None and "/" not in text:
        local = registry.find(text)
    if local is not None:
        if revision is not None:
            raise RequestError(
                f"revision {revision!r} was given for {text!r}, which is on this disk: only a model of the "
                "Hub has revisions; leave it out, or give the Hub id",
                "revision",
            )
        return local
    if isinstance(model, Path) or not is_repo_id(text):
        raise ModelNotFoundError(
            f"no folder {text!r}; expected an existing folder, a Hub id like 'openai/gpt-oss-20b', "
            f"a short name like '20b', or 'demo'{did_you_mean(text, _names_here())}"
        )
    return _from_hub(text, revision, offline, gguf, weights, announce or (lambda line: None))


def _names_here() -> list[str]:
    return [folder.name for folder in registry.remembered()] + downloaded()


def downloaded() -> list[str]:
    """The ids of all models in the Hub's cache, of whatever kind, by the names of its folders alone."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    found = (path.name.split("--", 1)[1] for path in cache.glob("models--*--*"))
    return sorted(name.replace("--", "/") for name in found)


def _on_disk(text: str, gguf: bool) -> Path | None:
    """The demo model, or what lies at the path `text`; None where nothing does."""
    if text == DEMO:
        if not DEMO_FOLDER.is_dir():
            raise ModelNotFoundError(
                f"the demo model is not part of this installation ({DEMO_FOLDER} is missing)"
            )
        return DEMO_FOLDER
    try:
        return _local(text, gguf)
    except OSError as error:
        raise ModelNotFoundError(
            f"{text!r} cannot be read: {error.strerror}; expected a folder that you may enter, or a Hub id"
        ) from None


def resolve_adapter(adapter: str | Path, *, revision: str | None = None, offline: bool = False) -> Path:
    """The local folder of an adapter, downloaded first when it is a Hub id that isn't in the cache.

    Raises ModelNotFoundError when there is no such folder or repository, HubError when the Hub refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    text = str(adapter)
    folder = Path(os.path.expanduser(text))
    if text and folder.is_dir():
        return folder
    if isinstance(adapter, Path) or not is_repo_id(text):
        raise ModelNotFoundError(f"no folder {text!r}: expected an adapter's folder or a Hub id")
    try:
        return Path(
            snapshot_download(
                text, revision=revision, local_files_only=offline, allow_patterns=list(ADAPTER_FILES)
            )
        )
    except LocalEntryNotFoundError:
        raise ModelNotFoundError(
            f"{text!r} is not in the local cache and cannot be downloaded now: run the same command once "
            "with a connection"
        ) from None
    except Exception as error:
        raise explain(error, text, revision=revision) from error


def _local(text: str, gguf: bool) -> Path | None:
    """The folder (or .gguf file) at the path `text`, None when nothing is there. Raises OSError."""
    folder = Path(os.path.expanduser(text))
    if text and folder.is_dir():
        return layout_folder(folder)
    if gguf and folder.suffix == ".gguf" and folder.is_file():
        return folder
    if text and folder.exists():
        raise ModelNotFoundError(f"{text!r} is a file; expected a model's folder (the one that holds it?)")
    return None


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a Hub id, NAMESPACE/NAME (nothing is asked of the network)."""
    return _REPO_ID.fullmatch(text) is not None and len(text) <= 96 and ".." not in text and "--" not in text


def explain(
    error: Exception, repo: str, *, revision: str | None = None, doing: str = "download"
) -> GptOssError:
    """The one-line error for whatever ``huggingface_hub`` raised while `doing` something with `repo`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, GatedRepoError):
        return HubError(f"{repo!r} is gated: accept its terms at {where}, then log in with `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        near = _nearby_folder(repo)
        meant = did_you_mean(repo, set(_names_here()) - {repo})
        return ModelNotFoundError(
            f"no model {repo!r} on the Hub{near}; check the spelling, "
            f"or log in with `hf auth login` if it is private{meant}"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFoundError(
            f"{repo!r} has no revision {revision!r}; expected a branch, a tag or a commit"
        )
    if isinstance(error, LocalTokenNotFoundError):
        return HubError(f"cannot {doing} {repo!r}: not logged in; run `hf auth login` or set HF_TOKEN")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        cure = {
            401: "the token is missing or invalid: run `hf auth login`",
            403: "this account may not do that: check the token's permissions",
            404: "not found",
            429: "too many requests: wait a little and run the same command again",
        }.get(
            status,
            "run the same command again: finished files are kept" if status >= 500 else _first_line(error),
        )
        return HubError(f"cannot {doing} {repo!r}: the Hub answered {status}; {cure}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"cannot {doing} {repo!r}: the disk is full; free some space or set HF_HOME to another disk, "
            "then run the same command again"
        )
    if isinstance(error, PermissionError):
        return HubError(
            f"cannot {doing} {repo!r}: no permission to write {error.filename}; set HF_HOME elsewhere"
        )
    return HubError(
        f"cannot {doing} {repo!r} ({_first_line(error)}); check the connection to {constants.ENDPOINT} "
        "and run the same command again: finished files are kept"
    )


def _first_line(error: BaseException) -> str:
    """The deepest cause's first line: ``huggingface_hub`` wraps what went wrong, sometimes twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _nearby_folder(repo: str) -> str:
    """A remark when NAMESPACE is a local folder, so that NAMESPACE/NAME may be a mistyped path."""
    parent = Path(repo).parent
    return f" and no folder of that name in {str(parent)!r}" if parent.is_dir() else ""


def layout_folder(folder: Path) -> Path:
    """`folder`, or its ``original/`` where that alone holds a model."""
    original = folder / "original"
    if not (folder / "config.json").exists() and (original / "config.json").exists():
        return original
    return folder


def _from_hub(
    repo: str,
    revision: str | None,
    offline: bool,
    gguf: bool,
    weights: Collection[str] | None,
    announce: Callable[[str], None],
) -> Path:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if offline or constants.is_offline_mode():
        cached = _cached(repo, revision, gguf, weights)
        if cached is None:
            at = f" at revision {revision!r}" if revision else ""
            raise ModelNotFoundError(
                f"{repo!r}{at} is not wholly in the local cache, and offline was asked for; "
                f"run the same command once with a connection{did_you_mean(repo, _names_here())}"
            )
        return cached
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except Exception as error:
        # No connection, the Hub is down, an expired token: a whole copy in the cache will do.
        cached = _cached(repo, revision, gguf, weights)
        if cached is not None:
            return cached
        raise explain(error, repo, revision=revision) from error
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    names = _choose(repo, list(sizes), gguf)
    if weights is not None:
        names = [n for n in names if not n.endswith(".safetensors") or Path(n).name in weights]
    missing = [n for n in names if not isinstance(try_to_load_from_cache(repo, n, revision=info.sha), str)]
    if missing:
        from mlx_gptoss.checkpoint.memory import gigabytes

        cache = Path(constants.HF_HUB_CACHE)
        left = sum(sizes[name] for name in missing)
        _check_space(repo, left, cache)
        there = sum(sizes[name] for name in names) - left
        announce(f"{repo}: {gigabytes(left)} to download into {cache}{_already(there)}")
    return layout_folder(_download(repo, revision, names, info.sha))


def _choose(repo: str, names: list[str], gguf: bool) -> list[str]:
    """The files to download: those WANTED, from the first place in the repository that holds weights."""
    for prefix in ("", "original/"):
        here = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        chosen = [
            n for n in here if any(fnmatch.fnmatchcase(n, pattern) for pattern in WANTED) and "/" not in n
        ]
        if any(name.endswith(".safetensors") for name in chosen):
            return [prefix + name for name in chosen]
    quantised = [name for name in names if name.endswith(".gguf") and "/" not in name]
    models = {re.sub(r"-\d{5}-of-\d{5}", "", name) for name in quantised}  # a split file is one model
    if gguf and len(models) == 1:
        return quantised
    if gguf and quantised:
        shown = ", ".join(quantised[:5]) + (" .." if len(quantised) > 5 else "")
        raise ModelNotFoundError(
            f"{repo!r} holds {len(quantised)} GGUF files ({shown}); download one and name it"
        )
    found = ", ".join(sorted({Path(name).suffix for name in names} - {""})) or "no files"
    raise ModelNotFoundError(
        f"{repo!r} holds no safetensors weights (it has {found}); "
        "expected a gpt-oss checkpoint such as 'openai/gpt-oss-20b'"
    )


def _already(nbytes: int) -> str:
    from mlx_gptoss.checkpoint.memory import gigabytes

    return f"; {gigabytes(nbytes)} are there" if nbytes > 10**6 else ""


def partial_files(repo: str) -> list[Path]:
    """What downloads of `repo` left in the cache that were killed; no other one goes on from there."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    return list(folder.glob("blobs/*.incomplete"))


def _check_space(repo: str, size: int, cache: Path) -> None:
    """Refuse before the first byte when the cache's disk can't hold `size` more bytes."""
    from mlx_gptoss.checkpoint.memory import gigabytes

    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise HubError(
            f"{repo!r} needs {gigabytes(size)} more in {cache}, where {gigabytes(free)} are free; "
            "free some space or set HF_HOME to another disk"
        )


def _download(repo: str, revision: str | None, names: Sequence[str], commit: str | None) -> Path:
    """The snapshot with these files. config.json comes first, so another kind of model is refused early."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        for name in {"config.json", "original/config.json"} & set(names):
            read_config(Path(hf_hub_download(repo, name, revision=commit)).parent)
        # The names are exact, but the library takes patterns: escape them.
        patterns = [glob.escape(name) for name in names]
        # By its branch, so that it is found offline; which may have moved since its config was read.
        # One file at a time: an interrupted one is lost, those before it are kept.
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, max_workers=1))
        if commit is not None and snapshot.name != commit:
            raise HubError(f"{repo!r} was changed while it was downloaded: run the same command again")
        return snapshot
    except GptOssError:
        raise
    except Exception as error:
        raise explain(error, repo, revision=revision) from error


def _cached(
    repo: str, revision: str | None, gguf: bool, weights: Collection[str] | None = None
) -> Path | None:
    """The snapshot of `repo` in the local cache, or None when it isn't there or isn't whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # An empty list of patterns: the library checks no files, since which are needed differs by layout.
        snapshot = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
    except LocalEntryNotFoundError:
        return None
    folder = layout_folder(Path(snapshot))
    return folder if is_whole(folder, weights) or (gguf and any(folder.glob("*.gguf"))) else None


def is_whole(folder: Path, weights: Collection[str] | None = None) -> bool:
    """Whether config.json and every shard of the index are there (an interrupted download lacks some).

    weights: those of the shards that count.
    """
    if not (folder / "config.json").exists():
        return False
    if weights is not None:
        return all((folder / name).exists() for name in weights)
    indexes = list(folder.glob("*.safetensors.index.json"))
    if not indexes:
        return any(folder.glob("*.safetensors"))
    for index in indexes:
        try:
            shards = set(json.loads(read_limited(index, MAX_INDEX_BYTES))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return True  # present but broken: the checkpoint's reader names what is wrong with it
        if not all((folder / str(shard)).exists() for shard in shards):
            return False
    return True
