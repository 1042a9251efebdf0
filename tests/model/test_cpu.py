"""The CPU backend's ways through a large matrix give what the plain one gives."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.device import on_gpu
from mlx_gptoss.model import cpu
from mlx_gptoss.model.matrix import Matrix
from mlx_gptoss.model.quantization import MXFP4, Quantization

pytestmark = pytest.mark.skipif(on_gpu(), reason="this is the CPU backend's own code")

E, OUT, IN = 3, 300, 64
RNG = np.random.default_rng(4)


def stack() -> Matrix:
    blocks = RNG.integers(0, 2**32, (E, OUT, IN // 8), dtype=np.uint32)
    scales = RNG.integers(118, 124, (E, OUT, IN // 32), dtype=np.uint8)
    return Matrix(mx.array(blocks), mx.array(scales), None, MXFP4)


def dense() -> mx.array:
    return mx.array(RNG.standard_normal((OUT, IN)).astype(np.float32))


def affine() -> Matrix:
    weight, scales, biases = mx.quantize(dense(), group_size=64, bits=4)
    return Matrix(weight, scales, biases, Quantization("affine", 4, 64))


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("make", [lambda: Matrix(dense()), affine])
def test_a_matrix_is_applied_as_mlx_applies_it(make, rows, large, monkeypatch):
    monkeypatch.setattr(cpu, "LARGE", 1 if large else 1 << 30)
    monkeypatch.setattr(cpu, "SMALL", 1)
    matrix = make()
    x = mx.array(RNG.standard_normal((rows, IN)).astype(np.float32))
    assert np.abs(np.array(cpu.HostProjection(matrix)(x) - matrix.apply(x))).max() < 1e-4


def test_halves_of_a_stack_of_experts_are_the_whole():
    matrix = stack()
    x = mx.array(RNG.standard_normal((5, 1, IN)).astype(np.float32))
    chosen, rows = mx.array([[2, 0], [1, 2], [0, 1]]), mx.array([[4, 0], [1, 2], [3, 3]])
    halves = cpu.HalvedStack(matrix).gather(x, chosen, rows)
    assert np.array_equal(np.array(halves), np.array(matrix.gather(x, chosen, rows)))


@pytest.mark.parametrize("kind", [cpu.HalvedStack, cpu.SmallStack])
def test_rows_by_expert_are_what_mlx_gathers(kind, monkeypatch):
    monkeypatch.setattr(cpu, "UNPACK_ROWS", 70)
    matrix = stack()
    x = RNG.standard_normal((11, IN)).astype(np.float32)
    experts = RNG.integers(0, 2, 11)  # the last expert has no row
    rows = mx.arange(11, dtype=mx.uint32)
    gathered = matrix.gather(mx.array(x)[:, None], mx.array(experts.astype(np.uint32)), rows)
    assert np.abs(kind(matrix).by_expert(x, experts) - np.array(gathered)[:, 0]).max() < 1e-4
