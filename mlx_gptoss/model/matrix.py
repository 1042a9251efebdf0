"""Matrices as checkpoints hold them: dense or quantised, applied to rows of activations.

Every matrix is [outputs, inputs] (an expert stack is [experts, outputs, inputs]) and is never repacked:
MXFP4 blocks are the checkpoint's own bytes, viewed as uint32 [.., outputs, inputs / 8] with scales
uint8 [.., outputs, inputs / 32]; affine weights are MLX's packing with scales and biases
[.., outputs, inputs / group_size].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_gptoss.model.quantization import Quantization

Stream = mx.Stream | mx.ThreadLocalStream | None


@dataclass(frozen=True)
class Matrix:
    """A weight: [.., outputs, inputs], dense when `quantization` is None."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    quantization: Quantization | None = None

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[-2])

    @property
    def inputs(self) -> int:
        columns = int(self.weight.shape[-1])
        return columns if self.quantization is None else columns * 32 // self.quantization.bits

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.weight, self.scales, self.biases) if a is not None]

    def mapped(self, change: Callable[[mx.array], mx.array]) -> Matrix:
        """The matrix with each of its arrays changed alike."""
        scales, biases = (None if a is None else change(a) for a in (self.scales, self.biases))
        return Matrix(change(self.weight), scales, biases, self.quantization)

    def rows(self, start: int, end: int) -> Matrix:
        """Outputs [start, end): a view, for one or for a stack of matrices."""
        return self.mapped(lambda a: a[..., start:end, :])

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """The values, [.., outputs, inputs]."""
        if self.quantization is None:
            return self.weight.astype(dtype)
        assert self.scales is not None
        return mx.dequantize(self.weight, self.scales, self.biases, dtype=dtype, **vars(self.quantization))

    def apply(self, x: mx.array, *, stream: Stream = None) -> mx.array:
        """X [T, inputs] -> x @ W.T, [T, outputs]."""
        if self.quantization is None:
            return mx.matmul(x, self.weight.T, stream=stream)
        assert self.scales is not None
        return mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, stream=stream, **vars(self.quantization)
        )

    def gather(
        self,
        x: mx.array,
        experts: mx.array,
        rows: mx.array | None,
        *,
        in_order: bool = False,
        stream: Stream = None,
    ) -> mx.array:
        """One expert of a stack for each row: x [N, 1, inputs], experts [*S] -> [*S, 1, outputs].

        `rows` [*S] says which row of x each entry takes (None: its own); `in_order`: experts never decrease.
        """
        indices: dict[str, Any] = {
            "lhs_indices": rows,
            "rhs_indices": experts,
            "sorted_indices": in_order,
            "stream": stream,
        }
        if self.quantization is None:
            return mx.gather_mm(x, self.weight.swapaxes(-1, -2), **indices)
        assert self.scales is not None
        return mx.gather_qmm(
            x, self.weight, self.scales, self.biases, transpose=True, **indices, **vars(self.quantization)
        )


def stack_rows(parts: list[Matrix]) -> Matrix | None:
    """The matrices one above the other, as one; None when they are packed differently."""
    first = parts[0]
    if any(p.quantization != first.quantization for p in parts):
        return None
    if len(parts) == 1:
        return first
    columns = zip(*((p.weight, p.scales, p.biases) for p in parts), strict=True)
    joined = [None if c[0] is None else mx.concatenate(list(c), axis=-2) for c in columns]
    assert joined[0] is not None
    return Matrix(joined[0], joined[1], joined[2], first.quantization)


class Embedding:
    """Rows of a table [vocab, hidden], cast to the compute dtype after the lookup."""

    def __init__(self, table: Matrix, dtype: mx.Dtype) -> None:
        self.table = table
        self.dtype = dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        """Tokens int [T] -> [T, hidden]."""
        return self.rows(tokens).dense(self.dtype)

    def rows(self, tokens: mx.array) -> Matrix:
        """The table's rows of these tokens."""
        return self.table.mapped(lambda a: mx.take(a, tokens, axis=0))

    def arrays(self) -> list[mx.array]:
        return self.table.arrays()
