"""MLX's CPU backend, made usable: the host's BLAS for dense matrices, two streams for quantised ones.

The CPU backend is where this package is developed, tested and, on machines without a GPU, served. Measured
there (benchmarks/decode.py): numpy's BLAS reads a float32 matrix several times faster than the one that
MLX's Linux wheel is linked with, so large dense products go through it, and for many rows those of the
experts as well, expert by expert; and a stream is one core, so large quantised matrices are applied by
halves on two streams. Nothing here runs on a GPU.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_gptoss.linear import FP4_VALUES, MXFP4, Dense, Matrix, Projection

# A switch between streams costs about 25 us: only matrices of so many values are worth halving.
HALVE_FROM = 1 << 20
# Rows an expert must have, on average, before unpacking its whole matrix beats reading it row by row.
UNPACK_FROM = 8
# Rows of a matrix unpacked at a time: they fit in a core's cache.
UNPACK_ROWS = 128


@cache
def _side_stream() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="unpack")


def projection(matrix: Matrix) -> Projection:
    """How to apply this matrix on the CPU backend."""
    return Halved(matrix) if matrix.outputs * matrix.inputs >= HALVE_FROM else Dense(matrix)


def expert_stack(matrix: Matrix) -> Matrix | HalvedStack:
    """How to apply this stack of experts on the CPU backend."""
    return HalvedStack(matrix) if matrix.outputs * matrix.inputs >= HALVE_FROM else matrix


def _halves(matrix: Matrix) -> tuple[Matrix, Matrix]:
    middle = matrix.outputs // 2
    return matrix.rows(0, middle), matrix.rows(middle, matrix.outputs)


class Halved:
    """One large matrix: float32 through the host's BLAS, else its outputs by halves on two streams."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self._parts = _halves(matrix)

    def __call__(self, x: mx.array) -> mx.array:
        m = self.matrix
        if m.weight.dtype == x.dtype == mx.float32:
            return mx.array(np.asarray(x) @ np.asarray(m.weight).T)
        upper = self._parts[0].apply(x)
        lower = self._parts[1].apply(x, stream=_side_stream())
        return mx.concatenate([upper, lower], axis=-1)

    def arrays(self) -> list[mx.array]:
        return self.matrix.arrays()


class HalvedStack:
    """A stack of experts whose outputs are computed by halves on two streams. Stands in for a Matrix."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self._parts = _halves(matrix)

    @property
    def outputs(self) -> int:
        return self.matrix.outputs

    def gather(
        self, x: mx.array, experts: mx.array, rows: mx.array | None, *, in_order: bool = False
    ) -> mx.array:
        """As Matrix.gather."""
        upper = self._parts[0].gather(x, experts, rows, in_order=in_order)
        lower = self._parts[1].gather(x, experts, rows, in_order=in_order, stream=_side_stream())
        return mx.concatenate([upper, lower], axis=-1)

    def arrays(self) -> list[mx.array]:
        return self.matrix.arrays()


def unpacks(stack: Matrix | HalvedStack, x: mx.array, chosen: mx.array) -> bool:
    """True when `apply_unpacked` is the faster way to run these rows through a stack of MXFP4 experts."""
    if not isinstance(stack, HalvedStack) or stack.matrix.quantization != MXFP4 or x.dtype != mx.float32:
        return False
    return bool(chosen.size >= UNPACK_FROM * min(stack.matrix.weight.shape[0], chosen.size))


def apply_unpacked(
    stack: Matrix | HalvedStack, x: np.ndarray, expert_of_row: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """Each row through its expert, expert by expert: x float32 [N, inputs] -> [N, outputs].

    expert_of_row int [N]; order int [N] sorts the rows by expert.
    """
    assert isinstance(stack, HalvedStack)
    matrix = stack.matrix
    blocks = np.asarray(matrix.weight).view(np.uint8)
    scales = np.asarray(matrix.scales)
    out = np.empty((len(x), matrix.outputs), np.float32)
    starts = np.flatnonzero(np.diff(expert_of_row[order], prepend=-1))
    dense = np.empty((matrix.outputs, matrix.inputs), np.float32)
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        rows = order[start:end]
        expert = int(expert_of_row[rows[0]])
        _unpack(blocks[expert], scales[expert], dense)
        out[rows] = x[rows] @ dense.T
    return out


def _unpack(blocks: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """MXFP4 blocks uint8 [O, I / 2] and scales uint8 [O, I / 32] -> float32 [O, I], on every core."""
    powers, pairs = _mxfp4_tables()

    def part(first: int) -> None:
        last = min(first + UNPACK_ROWS, len(out))
        values = out[first:last]
        np.take(pairs, blocks[first:last], out=values.view(np.uint64), mode="clip")
        groups = values.reshape(last - first, -1, 32)
        groups *= powers[scales[first:last]][..., None]

    list(_workers().map(part, range(0, len(out), UNPACK_ROWS)))


@cache
def _mxfp4_tables() -> tuple[np.ndarray, np.ndarray]:
    """2^(s - 127) for each scale byte, and for each byte of blocks its two values side by side."""
    powers = np.exp2(np.arange(256, dtype=np.float64) - 127)
    powers[255] = np.nan  # E8M0 has no infinity; a checkpoint that holds it was refused at loading
    table = np.array(FP4_VALUES, np.float32)
    byte = np.arange(256)
    pairs = np.stack([table[byte & 15], table[byte >> 4]], axis=-1)
    return powers.astype(np.float32), pairs.view(np.uint64)[:, 0].copy()
