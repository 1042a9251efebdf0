"""`manifest.json`: what a converted folder holds, where every tensor came from, and what it cost in accuracy.

Written beside the weights by the converter; verify, share and the model card read it and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_gptoss.checkpoint.layouts import LAYOUTS
from mlx_gptoss.errors import ConversionError

MANIFEST_NAME = "manifest.json"
FORMAT = 1

# What was done to a tensor.  "copy": the source's bytes, unchanged.  "relayout": the same values in another
# order or dtype, exactly.  "cast": rounded to bfloat16.  "affine": MLX's affine groups by its own quantiser.
# "affine-search": the same format, scale and bias searched.  "mxfp4", "mxfp4-search": OCP microscaling.
ACTIONS = ("copy", "relayout", "cast", "affine", "affine-search", "mxfp4", "mxfp4-search")
SOURCE_KINDS = (*(layout.kind for layout in LAYOUTS.values()), "gguf")

_FIGURES = ("kl", "kl_p99", "top1", "perplexity_source", "perplexity")  # of `quality`

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and SHA-256 (hex), None where not computed yet (`verify` fills it in)."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class SourceEntry:
    """What was converted: its kind, a name a person knows it by, its pinned revision, its files."""

    kind: str
    id: str
    revision: str | None = None
    files: Mapping[str, FileEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the result.

    `sources` names the source's tensors it was made from; `part` the part of the model it belongs to
    (embedding, head, attention, router, experts, norms).  `relative_error` is sqrt(squared error / squared
    norm) of the dequantised weight against the source: 0 for exact actions; for a quantised weight it is
    stated once, with the packed weight, and None on its scales and biases.  So are its `bits` and
    `group_size`, the number of weights that share a scale.
    """

    action: str
    part: str
    sources: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str
    relative_error: float | None = None
    bits: int | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`.  `recipe` is the recipe's table row as resolved, overrides included.

    `quality` is what `verify --quality` measured against the source, None before that.
    """

    tool_version: str
    source: SourceEntry
    recipe: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]
    quality: Mapping[str, Any] | None = None
    tool: str = "mlx_gptoss"

    def to_json(self) -> str:
        """Canonical text: sorted keys, so that equal manifests are equal bytes.  Raises ConversionError."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        try:
            return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        except ValueError as error:
            raise ConversionError(f"{MANIFEST_NAME}: an error or figure is not finite ({error})") from error

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `manifest.json` into the folder, whole or not at all.  Raises ConversionError."""
        path = Path(folder) / MANIFEST_NAME
        temporary = path.with_name(f".{MANIFEST_NAME}.tmp")
        text = self.to_json()
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise ConversionError(f"{path}: cannot be written: {error.strerror}") from error


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check a folder's manifest.  Raises ConversionError naming what is wrong in it."""
    path = Path(folder) / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{folder}: no {MANIFEST_NAME}; it was not converted by this tool") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read as JSON ({error})") from error
    return _Check(path).manifest(content)


class _Check:
    """Turns JSON values into the dataclasses above, naming the file and the key of whatever is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, key: str, value: Any, expected: str) -> ConversionError:
        return ConversionError(f"{self.path}: {key} is {value!r:.80}, expected {expected}")

    def value(self, holder: Any, where: str, key: str, kinds: type | tuple[type, ...], expected: str) -> Any:
        if not isinstance(holder, dict):
            raise self.fail(where, holder, "an object")
        value = holder.get(key)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in _as_tuple(kinds)):
            raise self.fail(f"{where}.{key}", value, expected)
        return value

    def naturals(self, holder: Any, where: str, key: str) -> tuple[int, ...]:
        values = self.value(holder, where, key, list, "a list of whole numbers")
        if not all(type(v) is int and v >= 0 for v in values):
            raise self.fail(f"{where}.{key}", values, "a list of whole numbers")
        return tuple(values)

    def size(self, holder: Any, where: str, key: str, expected: str = "a number of bytes") -> int:
        value = self.value(holder, where, key, int, expected)
        if value < 0:
            raise self.fail(f"{where}.{key}", value, expected)
        return value

    def digest(self, holder: Any, where: str) -> str:
        value = self.value(holder, where, "sha256", str, "64 hex digits")
        if not _SHA256.fullmatch(value):
            raise self.fail(f"{where}.sha256", value, "64 hex digits")
        return value

    def one_of(self, holder: Any, where: str, key: str, allowed: Iterable[str]) -> str:
        value = self.value(holder, where, key, str, "a string")
        if value not in allowed:
            raise self.fail(f"{where}.{key}", value, f"one of {', '.join(allowed)}")
        return value

    def file(self, entry: Any, where: str) -> FileEntry:
        size = self.size(entry, where, "size")
        return FileEntry(size, None if entry.get("sha256") is None else self.digest(entry, where))

    def files(self, holder: Any, where: str) -> dict[str, FileEntry]:
        entries = self.value(holder, where, "files", dict, "an object of files")
        for name in entries:
            if not name or name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise self.fail(f"{where}.files", name, "file names inside the folder")
        return {name: self.file(entry, f"{where}.files[{name!r}]") for name, entry in entries.items()}

    def source(self, entry: Any) -> SourceEntry:
        kind = self.one_of(entry, "source", "kind", SOURCE_KINDS)
        name = self.value(entry, "source", "id", str, "a string")
        revision = self.value(entry, "source", "revision", (str, type(None)), "a string or null")
        return SourceEntry(kind, name, revision, self.files(entry, "source"))

    def tensor(self, entry: Any, where: str) -> TensorEntry:
        action = self.one_of(entry, where, "action", ACTIONS)
        sources = self.value(entry, where, "sources", list, "a list of names")
        if not all(isinstance(s, str) for s in sources):
            raise self.fail(f"{where}.sources", sources, "a list of names")
        error = self.value(entry, where, "relative_error", (float, int, type(None)), "a number or null")
        return TensorEntry(
            action=action,
            part=self.value(entry, where, "part", str, "a string"),
            sources=tuple(sources),
            dtype=self.value(entry, where, "dtype", str, "a string"),
            shape=self.naturals(entry, where, "shape"),
            bytes=self.size(entry, where, "bytes"),
            sha256=self.digest(entry, where),
            relative_error=None if error is None else float(error),
            bits=self.value(entry, where, "bits", (int, type(None)), "a whole number or null"),
            group_size=self.value(entry, where, "group_size", (int, type(None)), "a whole number or null"),
        )

    def quality(self, entry: Any) -> dict[str, Any] | None:
        """What the model card prints of it is there and a number."""
        if entry is None:
            return None
        self.value(entry, "quality", "text", str, "a string")
        self.size(entry, "quality", "tokens", "a number of tokens")
        for key in _FIGURES:
            value = self.value(entry, "quality", key, (float, int), "a number")
            if not abs(value) <= sys.float_info.max:  # false for NaN, and for whole numbers beyond floats
                raise self.fail(f"quality.{key}", value, "a finite number; set quality to null, measure anew")
        return dict(entry)

    def manifest(self, content: Any) -> Manifest:
        version = self.value(content, "manifest", "format", int, str(FORMAT))
        if version != FORMAT:
            raise self.fail("format", version, f"{FORMAT}; update mlx-gptoss")
        tensors = self.value(content, "manifest", "tensors", dict, "an object of tensors")
        return Manifest(
            tool=self.value(content, "manifest", "tool", str, "a string"),
            tool_version=self.value(content, "manifest", "tool_version", str, "a string"),
            source=self.source(content.get("source")),
            recipe=self.value(content, "manifest", "recipe", dict, "an object"),
            tensors={name: self.tensor(entry, f"tensors[{name!r}]") for name, entry in tensors.items()},
            files=self.files(content, "manifest"),
            quality=self.quality(content.get("quality")),
        )


def _as_tuple(kinds: type | tuple[type, ...]) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)
