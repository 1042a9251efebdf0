"""Prefix nodes on disk: a restarted process reads a conversation instead of computing it.

One safetensors file a node, written to a temporary name, synced and renamed, so a file is whole or absent.
Its metadata hold the format's version, the fingerprint of the model, what precedes the span, and a SHA-256
of everything. A file of another version or model, or a damaged one, is ignored with a warning.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.safetensors import read_folder
from mlx_gptoss.errors import RequestError
from mlx_gptoss.model.cache import KVBits, WindowState

logger = logging.getLogger("mlx_gptoss.engine")

FORMAT = "mlx-gptoss prefix"
VERSION = "2"
SUFFIX = ".safetensors"
# Of each tensor, the bytes at both ends and in the middle that go into the fingerprint (all take minutes).
SAMPLED = 1 << 12
# What reading a file that anybody may have written can raise.
_UNUSABLE = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(OverflowError, RecursionError, MemoryError, OSError),
)
# A file that is still being written is at most so old, seconds.
WRITING = 3600

# numpy has no bfloat16: its bits travel as uint16 under this name.
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32"}
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "I32": np.int32}


def fingerprint(folder: Path, dtype: mx.Dtype, kv_bits: KVBits) -> str:
    """What KV depends on beside the tokens: the model's files, the compute dtype, the KV format."""
    digest = hashlib.sha256(f"{VERSION} {dtype} {kv_bits}".encode())
    digest.update((folder / "config.json").read_bytes())
    for name, tensor in sorted(read_folder(folder).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        with tensor.path.open("rb") as file:
            last = max(0, tensor.nbytes - SAMPLED)
            for at in (0, last // 2, last):
                file.seek(tensor.start + at)
                digest.update(file.read(min(SAMPLED, tensor.nbytes)))
    return digest.hexdigest()


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

    Raises RequestError when there can be no such folder.
    """

    def __init__(self, root: Path, model: str, limit: int) -> None:
        self.model = model
        self.limit = limit
        self.folder = root / model[:32]
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"prefix_cache is {str(root)!r}: {error.strerror}; name a folder that can be written",
                "prefix_cache",
            ) from None
        for left_over in self.folder.glob("*.partial"):
            if _abandoned(left_over):
                with suppress(OSError):
                    left_over.unlink()

    def name(self, tokens: np.ndarray) -> str:
        """The name of a prefix: a digest of the model and all its tokens, int32 [n]."""
        return hashlib.sha256(self.model.encode() + tokens.astype("<i4").tobytes()).hexdigest()[:40]

    def path(self, upto: str, before: str) -> Path:
        """Where the span that leads from the prefix `before` to the prefix `upto` lies."""
        return self.folder / f"{upto}-{before}{SUFFIX}"

    def write(self, before: np.ndarray, start: int, span: Span) -> Path:
        """Save a span that follows `before`, int32 [start]. The file appears whole or not at all."""
        arrays = {"tokens": mx.array(span.tokens.astype(np.int32))}
        arrays |= {f"part.{i}": part for i, part in enumerate(span.parts)}
        arrays |= {f"state.{s.start}.{e}": s.data for e, s in span.states.items() if s.data is not None}
        upto = self.name(np.concatenate([before, span.tokens]))
        about = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "before": self.name(before),
            "upto": upto,
            "start": str(start),
        }
        raw = _encode(arrays, about)
        path = self.path(upto, about["before"])
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(raw)
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
            header, data = _split(path.read_bytes())
            self._check(header.pop("__metadata__"), header, data)
            span = Span(np.zeros(0, np.int32))
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                kind = entry["dtype"]
                values = np.frombuffer(data[begin:end], _NUMPY[kind]).reshape(entry["shape"])
                array = mx.array(values)
                array = array.view(mx.bfloat16) if kind == "BF16" else array
                if name == "tokens":
                    span.tokens = values.astype(np.int32)
                elif name.startswith("part."):
                    span.parts.append(array)
                else:
                    _, start, stop = name.split(".")
                    span.states[int(stop)] = WindowState(int(start), int(stop), array)
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
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError("it is no safetensors file")
            header = json.loads(file.read(length))
            about = header["__metadata__"]
            self._check_kind(about)
            begin, end = header["tokens"]["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError("its offsets lie outside of it")
            file.seek(8 + length + begin)
            tokens = np.frombuffer(file.read(end - begin), "<i4").astype(np.int32)
        if len(tokens) != header["tokens"]["shape"][0] or not len(tokens):
            raise ValueError("it is cut off")
        return SavedSpan(path, about["before"], about["upto"], int(about["start"]), tokens)

    def _check_kind(self, about: dict[str, str]) -> None:
        if not all(isinstance(value, str) for value in about.values()):
            raise ValueError("its metadata are no strings")
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise ValueError(f"it is of format {about.get('format')!r} version {about.get('version')!r}")
        if about["model"] != self.model:
            raise ValueError("it was made with another model")

    def _check(self, about: dict[str, str], header: dict[str, Any], data: bytes) -> None:
        self._check_kind(about)
        expected = about.pop("sha256")
        if _digest(about, header, data) != expected:
            raise ValueError("its checksum is wrong")


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


def _encode(arrays: dict[str, mx.array], about: dict[str, str]) -> bytes:
    """A safetensors file with a checksum of everything else in its metadata."""
    header: dict[str, Any] = {}
    chunks, at = [], 0
    for name, array in arrays.items():
        kind = _NAMES[array.dtype]
        raw = np.array(array.view(mx.uint16) if kind == "BF16" else array).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + len(raw)]}
        chunks.append(raw)
        at += len(raw)
    data = b"".join(chunks)
    metadata = about | {"sha256": _digest(about, header, data)}
    head = json.dumps({"__metadata__": metadata, **header}).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + data


def _digest(about: dict[str, str], header: dict[str, Any], data: bytes) -> str:
    digest = hashlib.sha256(json.dumps([about, header], sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def _split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data. Raises ValueError."""
    length = int.from_bytes(raw[:8], "little")
    if not 2 <= length <= len(raw) - 8:
        raise ValueError("it is no safetensors file")
    header = json.loads(raw[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, raw[8 + length :]
