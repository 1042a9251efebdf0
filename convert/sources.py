"""What can be converted, seen in one way: named tensors under Hugging Face's names, each read row by row.

A Source lists the model's tensors as the output will name them. Dense ones give float rows; MXFP4 experts
give their bytes, as ranges of the source's files where they are in order already, else row by row. Nothing is
read before it is asked for, and no more than the rows asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_gptoss.checkpoint import safetensors as st
from mlx_gptoss.checkpoint.reader import NAMES, Checkpoint
from mlx_gptoss.checkpoint.safetensors import TensorInfo
from mlx_gptoss.convert import affine
from mlx_gptoss.convert.manifest import FileEntry, SourceEntry
from mlx_gptoss.errors import CheckpointError, ConversionError
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.quantization import Quantization

ReadRows = Callable[[int, int], np.ndarray]
"""Rows [first, last) of the first axis: uint16 bits for BF16, uint8 for U8, float32 for F32."""

_KINDS = {"hf": "hf-mxfp4", "original": "original", "bf16": "hf-bf16", "mlx": "mlx"}


class Extent(NamedTuple):
    """A run of bytes of a file."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the model. `dtype` ("BF16", "F32", "U8", "U32") is what `read` yields.

    `extents` are the same bytes in the source's files, in order, where they exist there as they are. A matrix
    that the source holds in MLX's affine format has `quantization` and its three `packed` tensors as well
    (suffix -> tensor), and `read` gives its dequantised values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    read: ReadRows
    extents: tuple[Extent, ...] | None = None
    quantization: Quantization | None = None
    packed: dict[str, SourceTensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert. `raw_config` has Hugging Face's keys, without what it says of quantisation."""

    kind: str
    id: str
    revision: str | None
    folder: Path
    files: tuple[Path, ...]
    config: ModelConfig
    raw_config: dict[str, Any]
    tensors: dict[str, SourceTensor]

    def fingerprint(self) -> dict[str, list[Any]]:
        """Per file: size, time of last change, SHA-256 of its first megabyte (its header). Cheap."""
        return {self._label(path): [*self._stat(path), _head_digest(path)] for path in self.files}

    def check_unchanged(self, fingerprint: dict[str, list[Any]]) -> None:
        """Raise ConversionError if a file is no longer what it was when the fingerprint was taken."""
        for path in self.files:
            if self._stat(path) != fingerprint[self._label(path)][:2]:
                raise ConversionError(
                    f"{path}: changed while it was being converted, nothing was finished; "
                    "convert it again from the start (--restart)"
                )

    def entry(self) -> SourceEntry:
        """The manifest's description. A Hub cache names files by their SHA-256, which is taken over."""
        files = {}
        for path in self.files:
            blob = path.resolve().name
            known = blob if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else None
            files[self._label(path)] = FileEntry(self._stat(path)[0], known)
        return SourceEntry(self.kind, self.id, self.revision, files)

    def _label(self, path: Path) -> str:
        """A file's path inside the source's folder."""
        return path.relative_to(self.folder).as_posix()

    @staticmethod
    def _stat(path: Path) -> list[int]:
        try:
            status = os.stat(path)
        except OSError as error:
            raise ConversionError(
                f"{path}: {error.strerror}; it was there when the conversion began"
            ) from None
        return [status.st_size, status.st_mtime_ns]


def open_source(folder: Path, *, id: str | None = None) -> Source:
    """Recognise and check the checkpoint in a folder, or the GGUF file at a path; only headers are read.

    Raises ConfigError, CheckpointError or ConversionError naming what does not fit.
    """
    if is_gguf(folder):
        from mlx_gptoss.convert.gguf_source import open_gguf

        return open_gguf(folder, id=id)
    checkpoint = Checkpoint(folder)
    tensors = {tensor.name: tensor for tensor in _tensors(checkpoint)}
    raw = dict(checkpoint.config.to_hf() if checkpoint.layout == "original" else checkpoint.raw_config)
    raw.pop("quantization", None)
    raw.pop("quantization_config", None)
    return Source(
        kind=_KINDS[checkpoint.layout],
        id=id or folder.resolve().name,
        revision=folder.name if folder.parent.name == "snapshots" else None,
        folder=folder,
        files=tuple(sorted({info.path for info in checkpoint.tensors.values()})),
        config=checkpoint.config,
        raw_config=raw,
        tensors=tensors,
    )


def is_gguf(path: Path) -> bool:
    """Whether this is a .gguf file, or a folder whose only weights are such files."""
    if not path.is_dir():
        return path.suffix == ".gguf"
    others = any(path.glob("[!.]*.safetensors")) or (path / st.INDEX_NAME).exists()
    return not others and any(path.glob("[!.]*.gguf"))


def to_float32(rows: np.ndarray) -> np.ndarray:
    """Rows as `SourceTensor.read` gives them (BF16 bits or float32) -> contiguous float32."""
    if rows.dtype == np.uint16:
        return st.bfloat16_to_float32(np.ascontiguousarray(rows))
    return np.ascontiguousarray(rows, np.float32)


def _head_digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.sha256(stream.read(1 << 20)).hexdigest()


# --- one tensor after the other, by layout


def _tensors(checkpoint: Checkpoint) -> Iterator[SourceTensor]:
    hf, names = NAMES["hf"], checkpoint.names
    yield _matrix(checkpoint, names["embedding"], hf["embedding"])
    for layer in range(checkpoint.config.num_layers):
        target = {part: name.format(i=layer) for part, name in hf.items()}
        source = {part: name.format(i=layer) for part, name in names.items()}
        yield _float(checkpoint, source["attention.norm"], target["attention.norm"])
        yield from _attention(checkpoint, source, target)
        yield _float(checkpoint, source["moe.norm"], target["moe.norm"])
        yield _matrix(checkpoint, source["moe.router"], target["moe.router"])
        yield _float(checkpoint, source["moe.router"] + ".bias", target["moe.router"] + ".bias")
        yield from _experts(checkpoint, source, target)
    yield _float(checkpoint, names["norm"], hf["norm"])
    yield _matrix(checkpoint, names["head"], hf["head"])


def _attention(
    checkpoint: Checkpoint, source: dict[str, str], target: dict[str, str]
) -> Iterator[SourceTensor]:
    c = checkpoint.config
    if "attention.qkv" in source:
        first = 0
        for part, heads in (("q", c.num_attention_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            last = first + heads * c.head_dim
            for suffix in (".weight", ".bias"):
                info = checkpoint.tensors[source["attention.qkv"] + suffix]
                yield _rows_of(info, target[f"attention.{part}"] + suffix, first, last)
            first = last
    else:
        for part in ("attention.q", "attention.k", "attention.v"):
            yield _matrix(checkpoint, source[part], target[part])
            yield _float(checkpoint, source[part] + ".bias", target[part] + ".bias")
    yield _matrix(checkpoint, source["attention.out"], target["attention.out"])
    yield _float(checkpoint, source["attention.out"] + ".bias", target["attention.out"] + ".bias")
    yield _float(checkpoint, source["attention.sinks"], target["attention.sinks"])


def _experts(
    checkpoint: Checkpoint, source: dict[str, str], target: dict[str, str]
) -> Iterator[SourceTensor]:
    tensors = checkpoint.tensors
    if checkpoint.layout == "mlx":
        yield from _mlx_experts(checkpoint, source, target)
        return
    for part in ("moe.gate_up", "moe.down"):
        yield _float(checkpoint, source[part + "_bias"], target[part + "_bias"])
        if checkpoint.layout == "bf16":
            yield _transposed(tensors[source[part]], target[part].removesuffix("_blocks"))
        else:
            yield _verbatim(tensors[source[part]], target[part])
            yield _verbatim(tensors[source[part + "_scales"]], target[part + "_scales"])


def _mlx_experts(
    checkpoint: Checkpoint, source: dict[str, str], target: dict[str, str]
) -> Iterator[SourceTensor]:
    """gate and up apart, MXFP4 as uint32 words -> Hugging Face's interleaved blocks and scales.

    Dense experts (`mlx_lm.convert --dequantize`) stay floats, under the name without `_blocks`.
    """
    tensors = checkpoint.tensors
    gate, up, down = (source[p] for p in ("moe.gate", "moe.up", "moe.down"))
    formats = {path: checkpoint.quantization_of(path) for path in (gate, up, down)}
    for path, quantization in formats.items():
        if quantization is not None and quantization.mode != "mxfp4":
            raise ConversionError(
                f"{checkpoint.folder}: {path} was requantised to {quantization.bits}-bit "
                f"{quantization.mode}, and the MXFP4 weights cannot be restored from it; "
                "convert the checkpoint it was made from instead"
            )
    weights = [tensors[n + ".weight"] for n in (gate, up)]
    yield _interleaved([tensors[n + ".bias"] for n in (gate, up)], target["moe.gate_up_bias"])
    if formats[gate] is None:
        yield _interleaved(weights, target["moe.gate_up"].removesuffix("_blocks"))
    else:
        yield _interleaved(weights, target["moe.gate_up"], block=True)
        yield _interleaved([tensors[n + ".scales"] for n in (gate, up)], target["moe.gate_up_scales"])
    yield _float(checkpoint, down + ".bias", target["moe.down_bias"])
    if formats[down] is None:
        yield _float(checkpoint, down + ".weight", target["moe.down"].removesuffix("_blocks"))
        return
    words = tensors[down + ".weight"]
    blocks = _verbatim(words, target["moe.down"])
    yield SourceTensor(
        blocks.name, "U8", _block_shape(words.shape), (words.name,), _as_blocks(blocks.read), blocks.extents
    )
    yield _verbatim(tensors[down + ".scales"], target["moe.down_scales"])


# --- the ways a tensor lies in a file


def _verbatim(info: TensorInfo, name: str) -> SourceTensor:
    """Bytes as they are."""
    extent = Extent(info.path, info.start, info.nbytes)
    return SourceTensor(name, info.dtype, info.shape, (info.name,), partial(st.read_rows, info), (extent,))


def _rows_of(info: TensorInfo, name: str, first: int, last: int) -> SourceTensor:
    """Some rows of a tensor, as a tensor of its own."""

    def read(start: int, stop: int) -> np.ndarray:
        return _floats(st.read_rows(info, first + start, first + stop), info.dtype)

    extents = None
    if info.dtype == "BF16":
        extents = (Extent(info.path, info.start + first * info.row_bytes, (last - first) * info.row_bytes),)
    shape = (last - first, *info.shape[1:])
    return SourceTensor(name, _float_dtype(info), shape, (info.name,), read, extents)


def _float(checkpoint: Checkpoint, source: str, target: str) -> SourceTensor:
    """A dense tensor: bfloat16 bytes as they are, float16 and float32 as float32 rows."""
    info = checkpoint.tensors[source]
    return _rows_of(info, target, 0, info.shape[0])


def _matrix(checkpoint: Checkpoint, source: str, target: str) -> SourceTensor:
    """`source`.weight, dense or in MLX's affine format."""
    quantization = checkpoint.quantization_of(source)
    if quantization is None:
        return _float(checkpoint, source + ".weight", target + ".weight")
    if quantization.mode != "affine":
        raise ConversionError(
            f"{checkpoint.folder}: {source} is stored in {quantization.mode}, expected bf16 or affine; "
            "convert the checkpoint it was made from instead"
        )
    weight, scales, biases = (checkpoint.tensors[f"{source}.{s}"] for s in ("weight", "scales", "biases"))
    bits, group = quantization.bits, quantization.group_size

    def read(first: int, last: int) -> np.ndarray:
        parts = [st.read_rows(info, first, last) for info in (weight, scales, biases)]
        scale, bias = _floats(parts[1], scales.dtype), _floats(parts[2], biases.dtype)
        return affine.dequantize(parts[0], scale, bias, bits, group)

    packed = {}
    if scales.dtype == biases.dtype == "BF16":
        for suffix, info in (("weight", weight), ("scales", scales), ("biases", biases)):
            packed[suffix] = _verbatim(info, f"{target}.{suffix}")
    shape = (weight.shape[0], weight.shape[1] * 32 // bits)
    names = (weight.name, scales.name, biases.name)
    return SourceTensor(target + ".weight", "F32", shape, names, read, None, quantization, packed)


def _transposed(info: TensorInfo, name: str) -> SourceTensor:
    """Experts as transformers saves them, [E, inputs, outputs] -> [E, outputs, inputs], a view per expert."""

    def read(first: int, last: int) -> np.ndarray:
        return _floats(st.read_rows(info, first, last), info.dtype).swapaxes(1, 2)

    shape = (info.shape[0], info.shape[2], info.shape[1])
    return SourceTensor(name, _float_dtype(info), shape, (info.name,), read)


def _interleaved(infos: Sequence[TensorInfo], name: str, *, block: bool = False) -> SourceTensor:
    """Two tensors [E, F, ..] -> one [E, 2F, ..], rows alternating; `block`: words as MXFP4 blocks."""
    first, second = infos
    if first.dtype != second.dtype or first.shape != second.shape:
        raise CheckpointError(f"{first.name} and {second.name} differ in dtype or shape, expected the same")
    one = _block_shape(first.shape) if block else first.shape
    shape = (one[0], 2 * one[1], *one[2:])
    floats = first.dtype in ("F16", "F32")

    def read(start: int, stop: int) -> np.ndarray:
        halves = [st.read_rows(info, start, stop) for info in infos]
        if floats:
            halves = [_floats(half, first.dtype) for half in halves]
        merged = np.stack(halves, axis=2)
        return (merged.view(np.uint8) if block else merged).reshape(stop - start, *shape[1:])

    dtype = "U8" if block else ("F32" if floats else first.dtype)
    return SourceTensor(name, dtype, shape, (first.name, second.name), read)


def _block_shape(words: tuple[int, ...]) -> tuple[int, ...]:
    """uint32 words [E, rows, columns / 8] -> MXFP4 blocks uint8 [E, rows, columns / 32, 16]."""
    return (*words[:-1], words[-1] // 4, 16)


def _as_blocks(read: ReadRows) -> ReadRows:
    def blocks(first: int, last: int) -> np.ndarray:
        words = read(first, last)
        return words.view(np.uint8).reshape(_block_shape(words.shape))

    return blocks


def _float_dtype(info: TensorInfo) -> str:
    return "BF16" if info.dtype == "BF16" else "F32"


def _floats(values: np.ndarray, dtype: str) -> np.ndarray:
    """BF16 stays bits; float16 and float32 become float32."""
    return values if dtype == "BF16" else values.astype(np.float32)


def read_json(path: Path) -> Any:
    """A small JSON file of the source. Raises ConversionError when it is not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not readable as JSON ({error}); download it again") from None
