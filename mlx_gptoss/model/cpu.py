"""MLX's CPU backend, made usable: the host's BLAS for dense matrices, two streams for quantised ones.

The CPU backend is where this package is developed, tested and, on machines without a GPU, served. Measured
there (benchmarks/decode.py, benchmarks/engine.py): numpy's BLAS is several times faster than the one that
MLX's Linux wheel is linked with, so dense products go through it, and for many rows those of the experts as
well, expert by expert; and a stream is one core, so large quantised matrices are applied by halves on two
streams. Nothing here runs on a GPU.

The products that leave MLX have gradients of their own (`mx.custom_function`): of a model's weights in the
activations alone, which are constants there, of an adapter's in all. Without them the gradient would be zero,
and nothing would say so. Attention has one as well, since MLX's takes its products.

Large products are shared among threads of our own, and the BLAS keeps to one: its threads spin for some
20 ms after each product, on the cores that MLX's streams then need. That alone makes decoding a third slower.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import cast

import mlx.core as mx
import numpy as np
from threadpoolctl import ThreadpoolController

from mlx_gptoss.device import on_gpu
from mlx_gptoss.model.batch import Batch, Pairs
from mlx_gptoss.model.cache import Mask
from mlx_gptoss.model.experts import ExpertWeights, Way, by_pair
from mlx_gptoss.model.matrix import Matrix
from mlx_gptoss.model.quantization import FP4_VALUES, MXFP4

# Switching streams, or waiting for the array that the BLAS reads, costs about 25 us: for one row it pays from
# this many values on.
LARGE = 1 << 20
# Matrices (or stacks) of fewer values stay with MLX, which is as fast there for several rows; not for so many
# that rows times values reach LARGE.
SMALL = 1 << 16
# Rows from which an adapter's two thin products pay.
LOW_RANK_FROM = 16
# Rows an expert must have, on average, before unpacking its whole matrix beats reading it row by row.
UNPACK_FROM = 4
# Rows of a matrix that a core unpacks and multiplies at a time: they fit in its cache.
UNPACK_ROWS = 128

# numpy has no type of sixteen plain bytes that it copies as fast: four float32 values pose as one of these.
FOUR_FLOATS = np.complex128

OnHost = Callable[[np.ndarray], np.ndarray]

_own = threading.local()


@cache
def _side_stream() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="product")


def _cores() -> int:
    return min(8, os.cpu_count() or 1)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """X [N, I] @ weight [O, I].T, float32, by the host's BLAS; large ones on every core."""
    out = np.empty((len(x), len(weight)), np.float32)
    with _blas().limit(limits=1):
        if weight.size < LARGE:
            return np.matmul(x, weight.T, out=out)
        bounds = np.linspace(0, len(weight), _cores() + 1, dtype=int).tolist()

        def part(first: int, last: int) -> None:
            np.matmul(x, weight[first:last].T, out=out[:, first:last])

        list(_workers().map(part, bounds[:-1], bounds[1:]))
        return out


def _is_large(matrix: Matrix) -> bool:
    return matrix.outputs * matrix.inputs >= LARGE


def _halves(matrix: Matrix) -> tuple[Matrix, Matrix]:
    middle = matrix.outputs // 2
    return matrix.rows(0, middle), matrix.rows(middle, matrix.outputs)


def _with_gradient(forward: OnHost, backward: OnHost) -> Callable[[mx.array], mx.array]:
    """A linear map of rows made outside of MLX, and the map that takes a gradient back through it."""
    made = mx.custom_function(lambda x: mx.array(forward(np.asarray(x))))
    made.vjp(lambda x, cotangent, output: mx.array(backward(np.asarray(cotangent))))
    return cast(Callable[[mx.array], mx.array], made)


class HostProjection:
    """One matrix: float32 through the host's BLAS where that pays, a large one by halves on two streams."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self._parts = _halves(matrix) if _is_large(matrix) else None
        values = matrix.outputs * matrix.inputs
        # Rows for which the BLAS pays.
        self._blas_from = 1 if self._parts else 2 if values >= SMALL else LARGE // max(1, values)
        weight = matrix.weight
        self._by_blas = _with_gradient(
            lambda x: product(x, np.asarray(weight)), lambda g: product(g, np.asarray(weight).T)
        )

    def __call__(self, x: mx.array, batch: Batch | None = None) -> mx.array:
        m = self.matrix
        if m.weight.dtype == x.dtype == mx.float32 and len(x) >= self._blas_from:
            return self._by_blas(x)
        if self._parts is None:
            return m.apply(x)
        upper = self._parts[0].apply(x)
        lower = self._parts[1].apply(x, stream=_side_stream())
        return mx.concatenate([upper, lower], axis=-1)

    def arrays(self) -> list[mx.array]:
        return self.matrix.arrays()


def leaves_mlx(dtype: mx.Dtype) -> bool:
    """Whether products of this dtype may be made by the host's BLAS."""
    return dtype == mx.float32 and not on_gpu()


def low_rank(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """What an adapter adds to a projection: x [N, I], a [r, I], b [O, r] -> x @ a.T @ b.T [N, O]."""
    if len(x) < LOW_RANK_FROM or not leaves_mlx(x.dtype):
        return (x @ a.T) @ b.T
    return cast(mx.array, _low_rank(x, a, b))


@mx.custom_function
def _low_rank(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    rows, inner, outer = (np.asarray(array) for array in (x, a, b))
    return mx.array(product(product(rows, inner), outer))


@_low_rank.vjp
def _low_rank_gradient(
    primals: Sequence[mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, ...]:
    x, a, b, g = (np.asarray(array) for array in (*primals, cotangent))
    inner, outer = product(x, a), product(g, b.T)  # [N, r]
    found = product(outer, a.T), product(outer.T, x.T), product(g.T, inner.T)
    return tuple(map(mx.array, found))


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, sinks: mx.array, mask: Mask
) -> mx.array:
    """MLX's attention over one sequence, q [1, Hq, t, C], k and v [1, H, t, C]; on the CPU with a gradient of
    its own, none for the sinks, which are weights.
    """

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

    if not leaves_mlx(q.dtype):
        return forward(q, k, v)
    made = mx.custom_function(forward)

    def back(primals: Sequence[mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        qs, ks, vs, g = (np.asarray(array)[0] for array in (*primals, cotangent))
        found = _attention_gradient(qs, ks, vs, g, np.asarray(sinks), scale, mask)
        return tuple(mx.array(array[None]) for array in found)

    made.vjp(back)
    return cast(mx.array, made(q, k, v))


def _attention_gradient(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, sinks: np.ndarray, scale: float, mask: Mask
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of attention in q [Hq, t, C], k and v [H, t, C], given that in its output g [Hq, t, C].

    The scores are made again, those of one key-value head at a time on each core.
    """
    heads, t, channels = k.shape
    shared = len(q) // heads
    shown = np.tri(t, dtype=bool) if isinstance(mask, str) else None if mask is None else np.asarray(mask)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)

    def head(h: int) -> None:
        own = slice(h * shared, (h + 1) * shared)
        rows, back = (array[own].reshape(-1, channels) for array in (q, g))
        p = (rows @ k[h].T).reshape(shared, t, t)
        p *= scale
        if shown is not None:
            np.putmask(p, np.broadcast_to(~shown, p.shape), -np.inf)
        sink = sinks[own, None, None]
        top = np.maximum(p.max(axis=-1, keepdims=True), sink)
        np.exp(np.subtract(p, top, out=p), out=p)
        p /= p.sum(axis=-1, keepdims=True) + np.exp(sink - top)
        p = p.reshape(-1, t)
        dv[h] = p.T @ back
        scores = back @ v[h].T
        scores -= np.einsum("ij,ij->i", scores, p)[:, None]
        scores *= p
        scores *= scale
        dq[own] = (scores @ k[h]).reshape(shared, t, channels)
        dk[h] = scores.T @ rows

    with _blas().limit(limits=1):
        list(_workers().map(head, range(heads)))
    return dq, dk, dv


class HostExperts:
    """Experts in memory: by MLX pair by pair, or for many rows by the host's BLAS expert by expert.

    of: how many experts the model has, when the weights are those of some, and change.
    """

    def __init__(self, weights: ExpertWeights, of: int | None = None) -> None:
        self.weights = weights
        self.gate_up, self.down = HostStack(weights.gate_up, of), HostStack(weights.down, of)

    def __call__(self, x: mx.array, chosen: mx.array, batch: Batch) -> mx.array:
        """As Experts."""
        return self.way(x, chosen)(x, chosen, batch)

    def way(self, x: mx.array, chosen: mx.array) -> Way:
        by_expert = self.gate_up.pays_by_expert(x, chosen) and self.down.knows_by_expert
        return self._by_expert if by_expert else self._by_pair

    def _by_pair(self, x: mx.array, chosen: mx.array, batch: Pairs) -> mx.array:
        return by_pair(self.weights, self.gate_up, self.down, x, chosen, batch)

    def _by_expert(self, x: mx.array, chosen: mx.array, batch: Pairs) -> mx.array:
        bias = self.weights.bias[chosen]
        h = self.gate_up.by_expert(x, chosen)
        if batch.low_rank is not None:
            h = h + batch.low_rank.gate_up(x, batch)
        h = self.weights.activate(h, bias)
        y = self.down.by_expert(h.reshape(chosen.size, -1), chosen)
        if batch.low_rank is not None:
            y = y + batch.low_rank.down(h, batch)
        return self.weights.add_bias(y, bias)

    def arrays(self) -> list[mx.array]:
        return self.weights.arrays()


class HostStack:
    """The matrices of all experts.

    Large ones are gathered by halves on two streams, and unpacked for products where that pays; a stack of
    few values, 4 MB at most when unpacked, is used so for more than one row at a time, and kept so unless it
    changes. of: see HostExperts.
    """

    def __init__(self, matrix: Matrix, of: int | None = None) -> None:
        self.matrix = matrix
        self._experts = of or int(matrix.weight.shape[0])
        self._parts = _halves(matrix) if _is_large(matrix) else None
        self._small = SMALL <= matrix.outputs * matrix.inputs * self._experts < LARGE
        keep = self._small and of is None
        self._dense = np.asarray(matrix.dense(mx.float32)) if keep else None

    def gather(
        self, x: mx.array, experts: mx.array, rows: mx.array | None, *, in_order: bool = False
    ) -> mx.array:
        """As Matrix.gather."""
        if self._parts is None:
            return self.matrix.gather(x, experts, rows, in_order=in_order)
        upper = self._parts[0].gather(x, experts, rows, in_order=in_order)
        lower = self._parts[1].gather(x, experts, rows, in_order=in_order, stream=_side_stream())
        return mx.concatenate([upper, lower], axis=-1)

    @property
    def knows_by_expert(self) -> bool:
        """Whether `by_expert` can be used."""
        return self._small or (self._parts is not None and self.matrix.quantization == MXFP4)

    def pays_by_expert(self, x: mx.array, chosen: mx.array) -> bool:
        """Whether `by_expert` is the faster way for these rows."""
        if x.dtype != mx.float32 or not self.knows_by_expert:
            return False
        if self._small:
            return len(x) > 1
        return bool(chosen.size >= UNPACK_FROM * min(self._experts, chosen.size))

    def by_expert(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Each pair of a row and an expert: x float32 [N, inputs], chosen [T, k] -> [T, k, outputs].

        N is T, where the k pairs of a token share their row, or T x k.
        """
        experts, rows = np.asarray(chosen), len(x)

        def backward(cotangent: np.ndarray) -> np.ndarray:
            pairs = self._products(cotangent.reshape(experts.size, -1), experts, transposed=True)
            summed: np.ndarray = pairs.reshape(rows, -1, self.matrix.inputs).sum(axis=1)
            return summed

        return _with_gradient(lambda x: self._products(x, experts, transposed=False), backward)(x)

    def _products(self, x: np.ndarray, chosen: np.ndarray, *, transposed: bool) -> np.ndarray:
        """The pairs' products with their experts' matrices W [O, I]: by W.T, or when `transposed` by W."""
        width = self.matrix.inputs if transposed else self.matrix.outputs
        out = np.empty((chosen.size, width), np.float32)
        shared = chosen.size // len(x)  # pairs that a row of x is for
        groups = [(e, pairs, x[pairs // shared]) for e, pairs in _rows_of_experts(chosen.reshape(-1))]
        with _blas().limit(limits=1):
            if self._small:
                for expert, pairs, rows in groups:
                    weight = self._unpacked_whole(expert)
                    out[pairs] = rows @ (weight if transposed else weight.T)
            else:
                self._by_parts(groups, out, transposed)
        return out.reshape(*chosen.shape, width)

    def _unpacked_whole(self, expert: int) -> np.ndarray:
        if self._dense is not None:
            dense: np.ndarray = self._dense[expert]
        else:
            dense = np.asarray(self.matrix.mapped(lambda a: a[expert : expert + 1]).dense(mx.float32))[0]
        return dense

    def _by_parts(
        self, groups: list[tuple[int, np.ndarray, np.ndarray]], out: np.ndarray, transposed: bool
    ) -> None:
        """`_products` for MXFP4: some rows of a matrix at a time are unpacked, on every core."""
        starts = range(0, self.matrix.outputs, UNPACK_ROWS)
        blocks, scales = np.asarray(self.matrix.weight).view(np.uint8), np.asarray(self.matrix.scales)

        def unpacked(expert: int, first: int) -> tuple[slice, np.ndarray]:
            some = slice(first, min(first + UNPACK_ROWS, self.matrix.outputs))
            return some, _unpack(blocks[expert, some], scales[expert, some])

        def part(expert: int, pairs: np.ndarray, rows: np.ndarray, first: int) -> None:
            some, values = unpacked(expert, first)
            out[pairs, some] = rows @ values.T

        def whole(expert: int, pairs: np.ndarray, rows: np.ndarray) -> None:
            total = np.zeros((len(pairs), self.matrix.inputs), np.float32)
            for first in starts:
                some, values = unpacked(expert, first)
                total += rows[:, some] @ values
            out[pairs] = total

        if transposed:  # the parts of a matrix add up
            jobs = [_workers().submit(whole, *group) for group in groups]
        else:
            jobs = [_workers().submit(part, *group, first) for group in groups for first in starts]
        for job in jobs:
            job.result()


def _rows_of_experts(expert_of_row: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each expert that has rows, and which."""
    order = np.argsort(expert_of_row, kind="stable")
    starts = np.flatnonzero(np.diff(expert_of_row[order], prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        yield int(expert_of_row[order[start]]), order[start:end]


def _unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 blocks uint8 [O, I / 2] and scales uint8 [O, I / 32] -> float32 [O, I], O <= UNPACK_ROWS.

    The result is this thread's own and holds until its next call.
    """
    powers, quads = _mxfp4_tables()
    codes = blocks.view(np.uint16)
    shape = (UNPACK_ROWS, codes.shape[1] * 4)
    values = getattr(_own, "values", None)
    if values is None or values.shape != shape:
        _own.values = values = np.empty(shape, np.float32)
    values = values[: len(codes)]
    np.take(quads, codes, out=values.view(FOUR_FLOATS), mode="clip")
    groups = values.reshape(len(codes), -1, 32)
    groups *= powers[scales][..., None]
    return values


@cache
def _mxfp4_tables() -> tuple[np.ndarray, np.ndarray]:
    """2^(s - 127) for each scale byte, and for each two bytes of blocks their four values as FOUR_FLOATS."""
    powers = np.exp2(np.arange(256, dtype=np.float64) - 127)
    powers[255] = np.nan  # E8M0 has no infinity; a checkpoint that holds it was refused at loading
    table = np.array(FP4_VALUES, np.float32)
    codes = np.arange(1 << 16)
    quads = np.stack([table[codes >> shift & 15] for shift in (0, 4, 8, 12)], axis=-1)
    return powers.astype(np.float32), quads.view(FOUR_FLOATS)[:, 0].copy()
