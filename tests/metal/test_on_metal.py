"""The kernels on Metal itself, on the cases that the emulator runs elsewhere: what no emulator can tell."""

from __future__ import annotations

from itertools import chain

import mlx.core as mx
import pytest

from mlx_gptoss.device import on_metal
from tests.metal import cases

pytestmark = pytest.mark.skipif(not on_metal(), reason="needs a Mac's GPU")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_kernel_is_right_on_this_gpu(dtype: mx.Dtype) -> None:
    chosen = chain(
        cases.true_shapes(dtype, 32), cases.edges(dtype), cases.equals(dtype), cases.not_finite(dtype)
    )
    assert not [problem for case in chosen if (problem := case.run())]


def test_every_kernel_is_right_on_random_shapes() -> None:
    assert not [problem for seed in range(100) if (problem := cases.drawn(seed).run())]
