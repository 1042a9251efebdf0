"""Prefix nodes on disk: a restarted process reads a conversation instead of computing it.

A file holds one node: a keyed checksum of the rest, then a safetensors file. It is written under a temporary
name, synced and renamed, so it is whole or absent. The key lies beside the files, in a folder that only its
owner may enter: a file of another version or model, a damaged or a forged one is ignored with a warning.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
import io
import json
import logging
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.fingerprint import fingerprint as model_fingerprint
from mlx_gptoss.errors import RequestError
from mlx_gptoss.files import open_regular, read_limited
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.sequence_cache import WindowState

logger = logging.getLogger("mlx_gptoss.engine")

FORMAT = "mlx-gptoss prefix"
VERSION = "3"
SUFFIX = ".prefix"
KEY, KEY_BYTES = "key", 32
DIGEST = "sha256"
# A file's header and its tokens are read before its checksum is known: no more of each than this, bytes.
MAX_HEAD = 1 << 20
# What reading a file that anybody may have written can raise.
_UNUSABLE = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError),
    *(OverflowError, RecursionError, MemoryError, OSError),
)
# A file that is still being written is no older than this, seconds.
WRITING = 3600


def fingerprint(folder: Path, dtype: mx.Dtype, kv_bits: KVBits) -> str:
    """What KV depends on beside the tokens: the model's files, the compute dtype, the KV format."""
    return model_fingerprint(folder, f"{VERSION} {dtype} {kv_bits}")


@dataclass(frozen=True)
class SavedSpan:
    """A span by its file's header. `before` and `upto` name the tokens [0, start) and [0, end)."""

    path: Path
    before: str
    upto: str
    start: int
    tokens: np.ndarray


@dataclass
class Span:
    """What a file holds: as prefix.Node."""

    tokens: np.ndarray
    parts: list[mx.array] = field(default_factory=list)
    states: dict[int, WindowState] = field(default_factory=dict)


class PrefixDisk:
    """The files of one model under `root`, at most `limit` bytes of them (see `trim`).

    Raises RequestError when there can be no such folder, or others could put files in it.
    """

    def __init__(self, root: Path, model: str, limit: int) -> None:
        self.model = model
        self.limit = limit
        self.folder = root / model[:32]
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            _require_private(root, self.folder)
            self._key = _own_key(self.folder / KEY)
        except OSError as error:
            raise RequestError(
                f"prefix_cache is {str(root)!r}: {error.strerror}; name a folder that can be written",
                "prefix_cache",
            ) from None
        for left_over in self.folder.glob("*.partial"):
            if _abandoned(left_over):
                with suppress(OSError):
                    left_over.unlink()

    def name(self, tokens: np.ndarray, adapter: str = "") -> str:
        """The name of a prefix: a digest of the model, the adapter's digest and all tokens, int32 [n]."""
        made_with = (self.model + adapter).encode()
        return hashlib.sha256(made_with + tokens.astype("<i4").tobytes()).hexdigest()[:40]

    def path(self, upto: str, before: str) -> Path:
        """Where the span that leads from the prefix `before` to the prefix `upto` lies."""
        return self.folder / f"{upto}-{before}{SUFFIX}"

    def write(self, before: np.ndarray, start: int, span: Span, adapter: str = "") -> Path:
        """Save a span that follows `before`, int32 [start]. The file appears whole or not at all.

        adapter: the digest of the one that it was computed with.
        """
        arrays = {f"part.{i}": part for i, part in enumerate(span.parts)}
        arrays |= {f"state.{s.start}.{e}": s.data for e, s in span.states.items() if s.data is not None}
        upto = self.name(np.concatenate([before, span.tokens]), adapter)
        about = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "before": self.name(before, adapter),
            "upto": upto,
            "start": str(start),
            "tokens": " ".join(map(str, span.tokens.tolist())),
        }
        data = io.BytesIO()
        mx.save_safetensors(data, arrays, about)
        path = self.path(upto, about["before"])
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(hmac.digest(self._key, data.getbuffer(), DIGEST))
                file.write(data.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink()  # on a full disk above all
            raise
        return path

    def index(self) -> Iterator[SavedSpan]:
        """What is saved, by start: headers and tokens only, unusable files left out with a warning."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                found.append(self._head(path))
            except _UNUSABLE as error:
                logger.warning("%s is ignored: %s", path, error)
        yield from sorted(found, key=lambda saved: saved.start)

    def read(self, path: Path) -> Span | None:
        """A whole span, or None (with a warning) when the file is not what it should be."""
        try:
            raw = memoryview(read_limited(path, self.limit))
            digest, data = raw[:KEY_BYTES], raw[KEY_BYTES:]
            if not hmac.compare_digest(hmac.digest(self._key, data, DIGEST), digest):
                raise ValueError("its checksum is wrong")
            loaded = mx.load(io.BytesIO(data), format="safetensors", return_metadata=True)
            assert isinstance(loaded, tuple)
            arrays, about = loaded
            self._check_kind(about)
            span = Span(_tokens(about))
            span.parts = [arrays.pop(f"part.{i}") for i in range(sum(n[0] == "p" for n in arrays))]
            for name, array in arrays.items():
                _, start, stop = name.split(".")
                span.states[int(stop)] = WindowState(int(start), int(stop), array)
            mx.eval(span.parts, list(arrays.values()))
            return span
        except _UNUSABLE as error:
            logger.warning("%s is ignored: %s", path, error)
            return None

    def touch(self, path: Path) -> None:
        """Note that a file's prefix is used, for `trim`."""
        with suppress(OSError):
            os.utime(path)

    def trim(self) -> None:
        """Delete files until the limit holds: what nothing continues first, of that the longest unused."""
        files: dict[Path, os.stat_result] = {}
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process trims too
                files[path] = path.stat()
        total = sum(status.st_size for status in files.values())
        # By their names: a file that cannot be read takes room as well.
        continued = Counter(_ends(path)[1] for path in files)
        by_upto: dict[str, list[tuple[int, Path]]] = {}
        for path, status in files.items():
            by_upto.setdefault(_ends(path)[0], []).append((status.st_mtime_ns, path))
        leaves = [entry for upto, entries in by_upto.items() if not continued[upto] for entry in entries]
        heapq.heapify(leaves)
        while leaves and total > self.limit:
            _, path = heapq.heappop(leaves)
            with suppress(OSError):
                path.unlink()
            total -= files[path].st_size
            before = _ends(path)[1]
            continued[before] -= 1
            if not continued[before]:
                for parent in by_upto.get(before, []):
                    heapq.heappush(leaves, parent)

    def _head(self, path: Path) -> SavedSpan:
        with open_regular(path) as file:
            file.seek(KEY_BYTES)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= MAX_HEAD:
                raise ValueError("it is not a safetensors file")
            header = json.loads(file.read(length))
            about = header.pop("__metadata__")
            self._check_kind(about)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if KEY_BYTES + 8 + length + end != os.fstat(file.fileno()).st_size:
                raise ValueError("it is cut off")
        return SavedSpan(path, about["before"], about["upto"], int(about["start"]), _tokens(about))

    def _check_kind(self, about: dict[str, str]) -> None:
        if not all(isinstance(value, str) for value in about.values()):
            raise ValueError("its metadata are not all strings")
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise ValueError(f"it is of format {about.get('format')!r} version {about.get('version')!r}")
        if about["model"] != self.model:
            raise ValueError("it was made with another model")


def _tokens(about: dict[str, str]) -> np.ndarray:
    """The span's tokens, int32 [n > 0]."""
    tokens = np.array(about["tokens"].split(), np.int32)
    if not len(tokens):
        raise ValueError("it has no tokens")
    return tokens


def _require_private(root: Path, folder: Path) -> None:
    """Raise RequestError unless only this user can put files into `folder`."""
    for place, forbidden in ((root, 0o022), (folder, 0o077)):
        status = place.stat()
        ours = status.st_uid == os.geteuid() or (place == root and status.st_uid == 0)
        sticky = place == root and status.st_mode & stat.S_ISVTX
        if not ours or (status.st_mode & forbidden and not sticky):
            raise RequestError(
                f"prefix_cache: {place} belongs to another user, or others may write it (its mode is "
                f"{status.st_mode & 0o777:o}): name a folder of your own, with mode 700",
                "prefix_cache",
            )


def _own_key(path: Path) -> bytes:
    """The key of a folder's checksums, made by whoever comes first."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    if not path.exists():
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):
            os.link(partial, path)  # fails where another process was faster
        partial.unlink()
    key = read_limited(path, KEY_BYTES)
    if len(key) != KEY_BYTES:
        raise RequestError(f"prefix_cache: {path} is damaged: delete the folder it lies in", "prefix_cache")
    return key


def _abandoned(partial: Path) -> bool:
    """True when nobody writes the file any more: its process has ended, or it is too old."""
    try:
        if time.time() - partial.stat().st_mtime > WRITING:
            return True
        os.kill(int(partial.name.split(".")[-2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        pass  # another user's, or not named as ours
    return False


def _ends(path: Path) -> tuple[str, str]:
    """`upto` and `before` of a file, by its name."""
    upto, _, before = path.stem.partition("-")
    return upto, before
