"""A source's tensors, each read row by row, and the ways from one form into another.

Nothing is read before it is asked for, and no more than the rows asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_gptoss.checkpoint.safetensors import TensorInfo, bfloat16_to_float32, read_rows
from mlx_gptoss.convert import affine, mxfp4
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.model.quantization import MXFP4, Quantization

ReadRows = Callable[[int, int], np.ndarray]
"""Rows [first, last) of the first axis: uint16 bits for BF16, uint8 for U8, uint32 for U32, else floats."""


class Extent(NamedTuple):
    """A run of bytes of a file."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the model, under its source's name or under Hugging Face's.

    sources: the names of the tensors it comes from. extent: its bytes, where a file holds them as they are.
    part: the part of the model it belongs to. path: that of a matrix or stack of experts. One that the source
    holds quantised has its `quantization`, and the `pieces` that hold it if a result can take them as they
    are; its own `read` gives the values they stand for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    read: ReadRows
    extent: Extent | None = None
    part: str = ""
    path: str | None = None
    quantization: Quantization | None = None
    pieces: tuple[SourceTensor, ...] = ()

    @property
    def rows(self) -> int:
        return self.shape[0]

    def called(self, name: str) -> SourceTensor:
        return replace(self, name=name)

    def mapped(self, change: Callable[[np.ndarray], np.ndarray], **fields: Any) -> SourceTensor:
        """A tensor whose rows are `change` of this one's, with these fields changed as well."""
        read = self.read
        return replace(self, read=lambda first, last: change(read(first, last)), **{"extent": None} | fields)


def stored(info: TensorInfo) -> SourceTensor:
    """A tensor of a safetensors file."""
    extent = Extent(info.path, info.start, info.nbytes)
    return SourceTensor(info.name, info.dtype, info.shape, (info.name,), partial(read_rows, info), extent)


def to_float32(rows: np.ndarray) -> np.ndarray:
    """Rows as `SourceTensor.read` gives them (BF16 bits or floats) -> contiguous float32."""
    if rows.dtype == np.uint16:
        return bfloat16_to_float32(np.ascontiguousarray(rows))
    return np.ascontiguousarray(rows, np.float32)


def floats(tensor: SourceTensor) -> SourceTensor:
    """bfloat16 as it is, any other float as float32."""
    return tensor if tensor.dtype == "BF16" else tensor.mapped(to_float32, dtype="F32")


def rows_of(tensor: SourceTensor, start: int, end: int) -> SourceTensor:
    """Rows [start, end), as a tensor of their own."""
    extent = tensor.extent
    if extent is not None:
        size = extent.length // tensor.rows
        extent = Extent(extent.path, extent.start + start * size, (end - start) * size)
    read, shape = tensor.read, (end - start, *tensor.shape[1:])
    return replace(
        tensor, shape=shape, read=lambda first, last: read(start + first, start + last), extent=extent
    )


def transposed(tensor: SourceTensor) -> SourceTensor:
    """[E, inputs, outputs] -> [E, outputs, inputs]."""
    experts, inputs, outputs = tensor.shape
    return tensor.mapped(lambda rows: rows.swapaxes(1, 2), shape=(experts, outputs, inputs))


def interleaved(tensors: list[SourceTensor]) -> SourceTensor:
    """One tensor as it is; of two [E, F, ..] the rows alternate, [E, 2F, ..]."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    for other in tensors[1:]:
        if (first.dtype, first.shape) != (other.dtype, other.shape):
            raise CheckpointError(
                f"{first.name} and {other.name} differ in dtype or shape, expected the same"
            )
    shape = (first.shape[0], len(tensors) * first.shape[1], *first.shape[2:])

    def read(start: int, stop: int) -> np.ndarray:
        return np.stack([t.read(start, stop) for t in tensors], axis=2).reshape(stop - start, *shape[1:])

    sources = tuple(name for t in tensors for name in t.sources)
    return replace(first, shape=shape, sources=sources, read=read, extent=None)


def as_blocks(tensor: SourceTensor) -> SourceTensor:
    """MXFP4 words uint32 [E, rows, columns / 8] -> blocks uint8 [E, rows, columns / 32, 16]; blocks stay."""
    if tensor.dtype == "U8":
        return tensor
    experts, rows, words = tensor.shape
    shape = (rows, words // 4, 16)

    def change(values: np.ndarray) -> np.ndarray:
        return values.view(np.uint8).reshape(-1, *shape)

    return tensor.mapped(change, dtype="U8", shape=(experts, *shape), extent=tensor.extent)


def from_mxfp4(name: str, blocks: SourceTensor, scales: SourceTensor) -> SourceTensor:
    """A stack of experts [E, rows, columns] out of blocks and scales."""

    def read(first: int, last: int) -> np.ndarray:
        return mxfp4.dequantize(blocks.read(first, last), scales.read(first, last))

    shape = (*blocks.shape[:-2], blocks.shape[-2] * MXFP4.group_size)
    pieces = (replace(blocks, quantization=MXFP4), scales)
    return SourceTensor(name, "F32", shape, blocks.sources, read, None, quantization=MXFP4, pieces=pieces)


def from_affine(name: str, pieces: tuple[SourceTensor, ...], packing: Quantization) -> SourceTensor:
    """A matrix [rows, columns] out of its packed words, scales and biases, all [rows, ..]."""
    words, scales, biases = pieces

    def read(first: int, last: int) -> np.ndarray:
        scale, bias = (floats(t).read(first, last) for t in (scales, biases))
        return affine.dequantize(words.read(first, last), scale, bias, packing.bits, packing.group_size)

    shape = (words.rows, words.shape[1] * 32 // packing.bits)
    sources = tuple(t.name for t in pieces)
    keep = scales.dtype == biases.dtype == "BF16"
    kept = (replace(words, quantization=packing), scales, biases) if keep else ()
    return SourceTensor(name, "F32", shape, sources, read, None, quantization=packing, pieces=kept)
