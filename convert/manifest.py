"""`manifest.json`: what a converted folder holds, where every tensor came from, and what it cost in accuracy.

Written beside the weights by the converter; verify, share and the model card read it and nothing else. The
dataclasses are its schema.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from mlx_gptoss.checkpoint.layouts import LAYOUTS
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.files import read_limited

MANIFEST_NAME = "manifest.json"
MAX_BYTES = 32 * 2**20  # of it; that of 120b has 1 MB
SOURCE_KINDS = (*(layout.kind for layout in LAYOUTS.values()), "gguf")

Action = Literal["copy", "relayout", "cast", "affine", "affine-search", "mxfp4", "mxfp4-search"]
"""What was done to a tensor.

"copy": the source's bytes, unchanged. "relayout": the same values in another order or dtype, exactly.
"cast": rounded to bfloat16. "affine": MLX's affine groups by its own quantiser. "affine-search": the same
format, scale and bias searched. "mxfp4", "mxfp4-search": OCP microscaling.
"""


def _known_kind(kind: str) -> str:
    if kind not in SOURCE_KINDS:
        raise ValueError(f"one of {', '.join(SOURCE_KINDS)}")
    return kind


def _inside(name: str) -> str:
    if not name or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise ValueError("a file inside the folder")
    return name


Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Annotated[str, AfterValidator(_known_kind)]
FileName = Annotated[str, AfterValidator(_inside)]
Figure = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and SHA-256 (hex), None where not computed yet (`verify` fills it in)."""

    size: Count
    sha256: Sha256 | None = None

    @classmethod
    def of(cls, content: bytes) -> FileEntry:
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class SourceEntry:
    """What was converted: its kind, a name a person knows it by, its pinned revision, its files."""

    kind: Kind
    id: str
    revision: str | None = None
    files: Mapping[FileName, FileEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the result.

    `sources` names the source's tensors it was made from; `part` the part of the model it belongs to
    (embedding, head, attention, router, experts, norms).  `relative_error` is sqrt(squared error / squared
    norm) of the dequantised weight against the source: 0 for exact actions; for a quantised weight it is
    stated once, with the packed weight, and None on its scales and biases.  So are its `bits` and
    `group_size`, the number of weights that share a scale.
    """

    action: Action
    part: str
    sources: tuple[str, ...]
    dtype: str
    shape: tuple[Count, ...]
    bytes: Count
    sha256: Sha256
    relative_error: Figure | None = None
    bits: int | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class Quality:
    """The source's predictions against the conversion's, over `tokens` positions of `text` (its name).

    kl: mean KL divergence in nats; kl_p99: its 99th percentile over positions; top1: share of positions
    whose likeliest token is the same; perplexities of the source and of the conversion.
    """

    text: str
    tokens: Count
    kl: Figure
    kl_p99: Figure
    top1: Figure
    perplexity_source: Figure
    perplexity: Figure


@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`.  `recipe` is the recipe's table row as resolved, overrides included.

    `quality` is what `verify --quality` measured against the source, None before that.
    """

    tool_version: str
    source: SourceEntry
    recipe: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    files: Mapping[FileName, FileEntry]
    quality: Quality | None = None
    tool: str = "mlx_gptoss"
    format: Literal[1] = 1

    def to_json(self) -> str:
        """Canonical text: sorted keys, so that equal manifests are equal bytes.  Raises ConversionError."""
        content = dataclasses.asdict(self)
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


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check a folder's manifest. Raises ConversionError naming the wrong field."""
    path = Path(folder) / MANIFEST_NAME
    try:
        return _MANIFEST.validate_json(read_limited(path, MAX_BYTES), strict=True)
    except FileNotFoundError:
        raise ConversionError(f"{folder}: no {MANIFEST_NAME}; it was not converted by this tool") from None
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        where = ".".join(map(str, found["loc"])) or "the whole"
        message = found["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        message = message.replace("a valid ", "a ").replace("greater than or equal to 0", "0 or more")
        if found["type"] == "missing":
            told = f"{where} is missing"
        elif found["type"] == "json_invalid":
            told = f"cannot be read as JSON ({message})"
        else:
            told = f"{where} is {found['input']!r:.80}, expected {message}"
        cure = "update mlx-gptoss" if where == "format" else "restore it, or convert again"
        raise ConversionError(f"{path}: {told}; {cure}") from None
