"""Small random matrices of every kind, and which way through them the CPU backend takes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.model import cpu
from mlx_gptoss.model.matrix import Matrix
from mlx_gptoss.model.quantization import MXFP4, Quantization

E, OUT, IN = 3, 300, 64
RNG = np.random.default_rng(4)


def normal(*shape: int) -> mx.array:
    return mx.array(RNG.standard_normal(shape).astype(np.float32))


def mxfp4(outputs: int = OUT, inputs: int = IN) -> Matrix:
    """A stack of E."""
    blocks = RNG.integers(0, 2**32, (E, outputs, inputs // 8), dtype=np.uint32)
    scales = RNG.integers(118, 124, (E, outputs, inputs // 32), dtype=np.uint8)
    return Matrix(mx.array(blocks), mx.array(scales), None, MXFP4)


def affine(*shape: int) -> Matrix:
    weight, scales, biases = mx.quantize(normal(*shape), group_size=64, bits=4)
    return Matrix(weight, scales, biases, Quantization("affine", 4, 64))


def thresholds(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """Let every matrix count as large, small or neither."""
    large, small = {"large": (1, 1), "small": (1 << 30, 1), "tiny": (1 << 20, 1 << 30)}[size]
    monkeypatch.setattr(cpu, "LARGE", large)
    monkeypatch.setattr(cpu, "SMALL", small)
