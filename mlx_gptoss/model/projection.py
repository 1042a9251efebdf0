"""Linear maps of rows. Projection is the seam: whatever satisfies it may stand in the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from mlx_gptoss.model.matrix import Matrix

if TYPE_CHECKING:
    from mlx_gptoss.model.batch import Batch


class Projection(Protocol):
    """A linear map of rows: x [R, inputs] -> [R, outputs].

    Within the layers `batch` is the forward's, whose rows x has: what differs by row or by sequence, such as
    an adapter, is found there. The head, applied to the rows whose logits are wanted, gets none.
    """

    def __call__(self, x: mx.array, batch: Batch | None = None) -> mx.array: ...

    def arrays(self) -> list[mx.array]:
        """Every weight."""
        ...


def replayable(part: object) -> bool:
    """Whether a projection, or a layer's experts, may be traced once for each number of rows.

    It says so by `replayable`: where no row has an adapter, its outputs are a function of the arguments'
    arrays and of arrays that never change, and nobody has to see them.
    """
    return getattr(part, "replayable", False)


def dense_of(part: object) -> Dense | None:
    """The matrix that a projection is where no row has an adapter; None where it is no single one."""
    inner = getattr(part, "base", part)
    return inner if isinstance(inner, Dense) else None


class Dense:
    """One matrix on the default device, with or without a bias [outputs]."""

    replayable = True

    def __init__(self, matrix: Matrix, bias: mx.array | None = None) -> None:
        self.matrix, self.bias = matrix, bias

    def __call__(self, x: mx.array, batch: Batch | None = None) -> mx.array:
        if self.bias is None:
            return self.matrix.apply(x)
        if self.matrix.quantization is None:
            return mx.addmm(self.bias, x, self.matrix.weight.T)
        return self.matrix.apply(x) + self.bias

    def arrays(self) -> list[mx.array]:
        return self.matrix.arrays() + ([] if self.bias is None else [self.bias])


class Stacked:
    """Matrices that are packed differently, applied to the same rows; outputs side by side."""

    def __init__(self, parts: list[Projection]) -> None:
        self.parts = parts
        self.replayable = all(map(replayable, parts))

    def __call__(self, x: mx.array, batch: Batch | None = None) -> mx.array:
        return mx.concatenate([p(x, batch) for p in self.parts], axis=-1)

    def arrays(self) -> list[mx.array]:
        return [a for p in self.parts for a in p.arrays()]
