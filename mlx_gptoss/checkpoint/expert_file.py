"""Experts read one at a time: where the record of each lies in the files, and the arena that takes it.

A record is everything that one expert has in its layer, beside the biases, which are small and stay in
memory. In a published checkpoint it lies in four places, the blocks and scales of two matrices; a checkpoint
made for streaming has it in one. Bytes are read straight into the arrays of the arena where these hold what
is stored; floats of another dtype are converted on the way, as the reader does it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeAlias
from weakref import finalize

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.layouts import FLOATS, Form, record_parts
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.checkpoint.safetensors import TensorInfo, bfloat16_to_float32, read_header
from mlx_gptoss.device import on_gpu
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.files import open_uncached
from mlx_gptoss.model.cpu import HostExperts
from mlx_gptoss.model.experts import ExpertsInMemory, ResidentExperts
from mlx_gptoss.model.matrix import Embedding, Matrix
from mlx_gptoss.model.quantization import Quantization
from mlx_gptoss.model.slots import Slots
from mlx_gptoss.model.streamed import Read, Records, StreamedExperts

# Reads at a time: a disk is at its best from four to eight.
READERS = 8

Preadv: TypeAlias = Callable[[int, Sequence[memoryview], int], int]

_RAW = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
_STORED = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}


@dataclass(frozen=True)
class Piece:
    """A part of an expert: bytes [start, start + size) of the expert's row of a tensor in a file, and
    bytes [first, last) of its row of an array in memory.
    """

    tensor: TensorInfo
    start: int
    size: int
    field: int
    first: int
    last: int
    dtype: mx.Dtype

    @property
    def as_stored(self) -> bool:
        return self.tensor.dtype not in FLOATS or _STORED[self.tensor.dtype] == self.dtype


def _row(tensor: TensorInfo) -> int:
    """Bytes in the file from one expert to the next."""
    return tensor.nbytes // tensor.shape[0]


class StackPieces:
    """One stack of matrices, of one key or of several whose rows lie one above the other.

    field: how many arrays of the arena come before the stack's.
    """

    def __init__(self, checkpoint: Checkpoint, keys: Sequence[str], layer: int, field: int) -> None:
        self.form, self.first = checkpoint.layout.experts, field
        paths = [checkpoint.layout.path(key, layer) for key in keys]
        packings = {checkpoint.layout.stack_packing(path, checkpoint.quantization_of) for path in paths}
        if len(packings) > 1:
            raise CheckpointError(f"{' and '.join(paths)} are packed differently: expected one way")
        (self.packing,) = packings
        self.pieces: list[Piece] = []
        self.shapes: list[tuple[tuple[int, ...], mx.Dtype]] = []  # of the fields, for one expert
        if self.form is Form.RECORDS:
            self._add_records(checkpoint, keys, layer)
            return
        for names in zip(*(self._names(checkpoint, path) for path in paths), strict=True):
            self._add([checkpoint.tensors[name] for name in names], checkpoint.dtype)

    def _names(self, checkpoint: Checkpoint, path: str) -> list[str]:
        layout = checkpoint.layout
        names = [path + layout.expert_weight]
        if self.packing is not None:
            names.append(path + layout.expert_scales)
            if self.packing.mode == "affine":
                names.append(path + ".biases")
        return names

    def _add_records(self, checkpoint: Checkpoint, keys: Sequence[str], layer: int) -> None:
        tensor = checkpoint.tensors[checkpoint.layout.path("experts.records", layer)]
        for part in record_parts(checkpoint.config):
            if part.key in keys:
                size, field = part.end - part.start, self.first + len(self.shapes)
                rows, groups, *_ = part.shape
                words = part.ending == "_blocks"
                shape, dtype = ((rows, groups * 4), mx.uint32) if words else ((rows, groups), mx.uint8)
                self.pieces.append(Piece(tensor, part.start, size, field, 0, size, dtype))
                self.shapes.append((shape, dtype))

    def _add(self, tensors: list[TensorInfo], dtype: mx.Dtype) -> None:
        """A field of the arena out of one tensor, or several above each other."""
        of_floats = tensors[0].dtype in FLOATS
        kept = dtype if of_floats else _STORED[tensors[0].dtype]
        shapes = [t.shape[1:] for t in tensors]
        if self.form is Form.BLOCKS and len(shapes[0]) == 3:  # blocks are words
            kept, shapes = mx.uint32, [(rows, groups * each // 4) for rows, groups, each in shapes]
        field, at = self.first + len(self.shapes), 0
        for tensor, shape in zip(tensors, shapes, strict=True):
            size = prod(shape) * kept.size
            self.pieces.append(Piece(tensor, 0, _row(tensor), field, at, at + size, kept))
            at += size
        self.shapes.append(((sum(s[0] for s in shapes), *shapes[0][1:]), kept))

    def matrix(self, arrays: list[mx.array]) -> Matrix:
        """The stack, of the arena's arrays."""
        mine = arrays[self.first : self.first + len(self.shapes)]
        if self.form is Form.TRANSPOSED:
            return Matrix(mine[0].swapaxes(-1, -2))
        weight, scales, biases = [*mine, None, None][:3]
        assert weight is not None
        return Matrix(weight, scales, biases, self.packing)


class ExpertFiles:
    """The open files of a checkpoint whose experts are streamed.

    slots: how many experts of a layer are in memory. preadv: what reads (os.preadv but in tests).
    Raises CheckpointError when a file is not the one whose header was checked.
    """

    def __init__(self, checkpoint: Checkpoint, slots: int, preadv: Preadv = os.preadv) -> None:
        self.slots, self.preadv = slots, preadv
        self.pool = ThreadPoolExecutor(READERS, thread_name_prefix="experts")
        self._descriptors: dict[Path, int] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        finalize(self, _close, self.pool, self._descriptors)
        for path in {t.path for t in checkpoint.tensors.values()}:
            self._open(path, {n: t for n, t in checkpoint.tensors.items() if t.path == path})

    def _open(self, path: Path, known: dict[str, TensorInfo]) -> None:
        try:
            self._descriptors[path] = descriptor = open_uncached(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        self._states[path] = _state(descriptor)
        header = read_header(path)
        if {name: header.get(name) for name in known} != known:
            raise CheckpointError(f"{path}: changed since its header was read: load the model again")

    def experts(self, checkpoint: Checkpoint, layer: int, bias: mx.array) -> StreamedExperts:
        """The experts of a layer, none of them in memory yet; bias [E, 2F + D] as in ExpertWeights."""
        gate_up = StackPieces(checkpoint, checkpoint.layout.gate_up, layer, 0)
        down = StackPieces(checkpoint, ["experts.down"], layer, len(gate_up.shapes))
        mx.eval(bias)
        count, weights_of = checkpoint.config.num_experts, checkpoint.expert_weights

        def make(slots: int) -> tuple[ExpertsInMemory, LayerRecords]:
            records = LayerRecords(self, [gate_up, down], bias, slots)
            weights = weights_of(gate_up.matrix(records.arena), down.matrix(records.arena), records.bias)
            return ResidentExperts(weights) if on_gpu() else HostExperts(weights, count), records

        return StreamedExperts(make, Slots(self.slots, count), lazy=on_gpu())

    def embedding(self, checkpoint: Checkpoint) -> Embedding:
        """The embedding, none of it in memory."""
        path = checkpoint.layout.path("embedding")
        packing = checkpoint.quantization_of(path)
        endings = [".weight"] if packing is None else [".weight", ".scales", ".biases"]
        tensors = [t for e in endings if (t := checkpoint.tensors.get(path + e)) is not None]
        return StreamedEmbedding(self, tensors, packing, checkpoint.dtype)

    def read(self, path: Path, into: list[memoryview], offset: int, what: str) -> int:
        """Fill these from a file; the bytes. Raises CheckpointError."""
        wanted = sum(len(part) for part in into)
        try:
            done = self.preadv(self._descriptors[path], into, offset)
            while done < wanted:
                got = self.preadv(self._descriptors[path], _after(into, done), offset + done)
                if got == 0:
                    raise CheckpointError(f"{path}: ended inside {what}; it was cut short while in use")
                done += got
            changed = _state(self._descriptors[path]) != self._states[path]
        except OSError as error:
            raise CheckpointError(f"{path}: {what} cannot be read: {error.strerror}") from error
        if changed:
            raise CheckpointError(f"{path}: changed while in use: load the model again")
        return wanted


def _after(parts: list[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers when the first bytes of them are filled."""
    left = []
    for part in parts:
        skipped = min(count, len(part))
        count -= skipped
        if skipped < len(part):
            left.append(part[skipped:])
    return left


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _close(pool: ThreadPoolExecutor, descriptors: dict[Path, int]) -> None:
    pool.shutdown(wait=False)  # a read that is under way keeps its files
    for descriptor in descriptors.values():
        os.close(descriptor)


class LayerRecords:
    """The records of a layer's experts, and its arena: arrays of a row for each slot; see Records."""

    def __init__(self, files: ExpertFiles, stacks: list[StackPieces], bias: mx.array, slots: int) -> None:
        self._files = files
        self._pieces = [piece for stack in stacks for piece in stack.pieces]
        shapes = [shape for stack in stacks for shape in stack.shapes]
        made = [_arena(slots, shape, dtype) for shape, dtype in shapes]
        self.arena = [array for array, _ in made]
        self._rows = [memory for _, memory in made]  # held for life: MLX then gives the memory to nobody else
        self.bias, self._bias_rows = _arena(slots, bias.shape[1:], bias.dtype)
        self._table, self._biases = bias, _bytes_of(bias)
        self._spans = _spans(self._pieces)
        self._checked: set[tuple[int, int]] = set()

    def read(self, expert: int, slot: int) -> Sequence[Future[Read]]:
        """As Records.read."""
        self._bias_rows[slot] = self._biases[expert]
        return [
            self._files.pool.submit(partial(self._read_span, i, expert, slot))
            for i in range(len(self._spans))
        ]

    def copy(self, other: Records, slots: Sequence[tuple[int, int]]) -> None:
        """As Records.copy."""
        assert isinstance(other, LayerRecords)
        for mine, theirs in zip(
            [*self._rows, self._bias_rows], [*other._rows, other._bias_rows], strict=True
        ):
            for there, here in slots:
                mine[here] = theirs[there]
        self._checked = other._checked

    def arrays(self) -> list[mx.array]:
        return [self._table]

    def _read_span(self, index: int, expert: int, slot: int) -> Read:
        start = time.perf_counter()
        span, first = self._spans[index], self._spans[index][0]
        rows = [self._rows[p.field][slot, p.first : p.last] for p in span]
        into = [
            row if piece.as_stored else np.empty(piece.size, np.uint8)
            for piece, row in zip(span, rows, strict=True)
        ]
        offset = first.tensor.start + expert * _row(first.tensor) + first.start
        what = f"expert {expert} of {first.tensor.name}"
        count = self._files.read(first.tensor.path, [part.data for part in into], offset, what)
        for piece, row, data in zip(span, rows, into, strict=True):
            if not piece.as_stored:
                row[:] = converted(data, piece.tensor.dtype, piece.dtype)
            if (index, expert) not in self._checked:
                _check_finite(row, piece.tensor, piece.dtype, what)
        self._checked.add((index, expert))
        return Read(count, time.perf_counter() - start)


class StreamedEmbedding(Embedding):
    """A table [vocab, hidden] on disk, of which the rows that are asked for are read."""

    def __init__(
        self,
        files: ExpertFiles,
        tensors: list[TensorInfo],
        packing: Quantization | None,
        dtype: mx.Dtype,
    ) -> None:
        self.dtype = dtype
        self._files, self._tensors, self._packing = files, tensors, packing

    def rows(self, tokens: mx.array) -> Matrix:
        ids, places = np.unique(np.asarray(tokens), return_inverse=True)
        arrays = [mx.take(self._read(t, ids), mx.array(places.reshape(-1)), axis=0) for t in self._tensors]
        weight, scales, biases = [*arrays, None, None][:3]
        assert weight is not None
        return Matrix(weight, scales, biases, self._packing)

    def _read(self, tensor: TensorInfo, ids: np.ndarray) -> mx.array:
        """Some rows of a tensor, in the dtype that the reader gives them."""
        size = tensor.nbytes // tensor.shape[0]
        stored = _STORED[tensor.dtype]
        data = np.empty((len(ids), size), np.uint8)

        def read(places: np.ndarray) -> None:
            for place in places.tolist():
                token = int(ids[place])
                offset, what = tensor.start + token * size, f"row {token} of {tensor.name}"
                self._files.read(tensor.path, [data[place].data], offset, what)
                _check_finite(data[place], tensor, stored, what)

        parts = np.array_split(np.arange(len(ids)), READERS) if len(ids) > READERS else [np.arange(len(ids))]
        list(self._files.pool.map(read, parts))
        kept = self.dtype if self._packing is not None and tensor.dtype in FLOATS else stored
        if kept != stored:
            data = converted(data.reshape(-1), tensor.dtype, kept)
        raw = {1: np.uint8, 2: np.uint16, 4: np.uint32}[kept.size]
        return mx.array(data.reshape(-1).view(raw).reshape(len(ids), *tensor.shape[1:])).view(kept)

    def arrays(self) -> list[mx.array]:
        return []


def _spans(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that lie side by side in a file are read together."""
    spans: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: (p.tensor.name, p.start)):
        before = spans[-1][-1] if spans else None
        if before and before.tensor == piece.tensor and before.start + before.size == piece.start:
            spans[-1].append(piece)
        else:
            spans.append([piece])
    return spans


def _arena(slots: int, shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """An array [slots, *shape], and its memory as bytes [slots, n]: writing there writes to the array."""
    raw = mx.zeros((slots, *shape), _RAW[dtype.size])
    mx.eval(raw)
    array = raw.view(dtype)
    mx.eval(array)
    return array, np.asarray(raw).reshape(slots, -1).view(np.uint8)


def _bytes_of(array: mx.array) -> np.ndarray:
    """The bytes of an evaluated matrix, [rows, n]."""
    return np.asarray(array.view(_RAW[array.dtype.size])).view(np.uint8)


def converted(data: np.ndarray, stored: str, dtype: mx.Dtype) -> np.ndarray:
    """Bytes of stored floats -> the bytes of the same in another dtype, rounded to nearest even."""
    if stored == "BF16":
        values = bfloat16_to_float32(data.view(np.uint16))
    else:
        values = data.view(np.float16 if stored == "F16" else np.float32).astype(np.float32)
    if dtype == mx.float32:
        result = values
    elif dtype == mx.float16:
        result = values.astype(np.float16)
    else:
        bits = values.view(np.uint32)
        result = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    return result.view(np.uint8)


def _check_finite(row: np.ndarray, tensor: TensorInfo, dtype: mx.Dtype, what: str) -> None:
    """Raise CheckpointError for NaN or infinity in what was just read."""
    if dtype == mx.uint32:
        return
    if dtype == mx.uint8:  # MXFP4 scales, of which 255 stands for NaN
        broken = bool(row.max() == 255)
    elif dtype == mx.float32:
        broken = not np.isfinite(row.view(np.float32)).all()
    else:
        mask = 0x7F80 if dtype == mx.bfloat16 else 0x7C00
        broken = bool(((row.view(np.uint16) & mask) == mask).any())
    if broken:
        raise CheckpointError(
            f"{tensor.path}: {what} holds NaN or infinity: the file is corrupt, download it again"
        )
