"""The CPU backend's ways through a large matrix give what the plain one gives."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.device import on_gpu
from mlx_gptoss.model import cpu
from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.experts import ExpertWeights, ResidentExperts
from mlx_gptoss.model.matrix import Matrix
from mlx_gptoss.model.sequence_cache import SequenceCache
from tests.support.checkpoints import hf_config
from tests.support.matrices import IN, OUT, RNG, E, affine, mxfp4, normal, thresholds
from tests.support.random_weights import Shape

pytestmark = pytest.mark.skipif(on_gpu(), reason="this is the CPU backend's own code")


@pytest.mark.parametrize("size", ["large", "small", "tiny"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("make", [lambda: Matrix(normal(OUT, IN)), lambda: affine(OUT, IN)])
def test_a_matrix_is_applied_as_mlx_applies_it(
    make: Callable[[], Matrix], rows: int, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds(monkeypatch, size)
    matrix, x = make(), normal(rows, IN)
    assert np.abs(np.array(cpu.HostProjection(matrix)(x) - matrix.apply(x))).max() < 1e-4


def test_halves_of_a_stack_of_experts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds(monkeypatch, "large")
    matrix, x = mxfp4(), normal(5, 1, IN)
    chosen, rows = mx.array([[2, 0], [1, 2], [0, 1]]), mx.array([[4, 0], [1, 2], [3, 3]])
    halves = cpu.HostStack(matrix).gather(x, chosen, rows)
    assert np.array_equal(np.array(halves), np.array(matrix.gather(x, chosen, rows)))


@pytest.mark.parametrize("size", ["large", "small"])
def test_rows_by_expert_are_what_mlx_gathers(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds(monkeypatch, size)
    monkeypatch.setattr(cpu, "UNPACK_ROWS", 70)
    matrix, x = mxfp4(), normal(11, IN)
    chosen = mx.array(RNG.integers(0, 2, (11, 1)).astype(np.uint32))  # the last expert has no row
    rows = mx.arange(11, dtype=mx.uint32)[:, None]
    gathered = matrix.gather(x[:, None], chosen, rows).squeeze(-2)
    found = cpu.HostStack(matrix).by_expert(x, chosen)
    assert np.abs(np.array(found - gathered)).max() < 1e-4


def test_experts_go_one_by_one_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def pays(stack: cpu.HostStack, rows: int, chosen: int) -> bool:
        return stack.pays_by_expert(normal(rows, IN), mx.zeros(chosen, mx.uint32))

    thresholds(monkeypatch, "small")
    unpacked = cpu.HostStack(mxfp4())
    assert unpacked.knows_by_expert and not pays(unpacked, 1, 4) and pays(unpacked, 2, 8)
    assert not unpacked.pays_by_expert(normal(2, IN).astype(mx.bfloat16), mx.zeros(8, mx.uint32))
    thresholds(monkeypatch, "large")
    packed, least = cpu.HostStack(mxfp4()), cpu.UNPACK_FROM * E
    assert packed.knows_by_expert and pays(packed, 9, least) and not pays(packed, 9, least - 1)
    assert not pays(packed, 1, 1) and not pays(packed, 1, E)
    thresholds(monkeypatch, "tiny")
    assert not cpu.HostStack(mxfp4()).knows_by_expert


@pytest.mark.parametrize("size", ["large", "small", "tiny"])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("down", ["mxfp4", "affine", "dense"])
@pytest.mark.parametrize("gate_up", ["mxfp4", "affine", "dense"])
def test_experts_in_any_two_formats_are_applied_as_on_a_gpu(
    gate_up: str, down: str, tokens: int, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds(monkeypatch, size)
    hidden, inner, k = IN, 128, 2
    make: dict[str, Callable[[int, int], Matrix]] = {
        "mxfp4": mxfp4,
        "affine": lambda outputs, inputs: affine(E, outputs, inputs),
        "dense": lambda outputs, inputs: Matrix(normal(E, outputs, inputs)),
    }
    weights = ExpertWeights(
        make[gate_up](2 * inner, hidden),
        make[down](hidden, inner),
        normal(E, 2 * inner + hidden),
        interleaved=True,
        limit=7.0,
        alpha=1.702,
    )
    config = ModelConfig.from_hf(hf_config(Shape()))
    batch = Batch([Segment(tokens, SequenceCache(config, mx.float32))], k)
    x, chosen = normal(tokens, hidden), mx.array(RNG.integers(0, E, (tokens, k)).astype(np.uint32))
    expected = np.array(ResidentExperts(weights)(x, chosen, batch))
    found = np.array(cpu.HostExperts(weights)(x, chosen, batch))
    assert found.shape == (tokens, k, hidden)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
