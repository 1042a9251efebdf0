"""The graph is differentiable on every way through it, and what is trained is what is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.device import on_gpu
from mlx_gptoss.model import cpu
from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.cache import Mask
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.experts import Experts, ExpertWeights, ResidentExperts
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.matrix import Matrix
from mlx_gptoss.model.projection import Dense, Projection
from mlx_gptoss.model.whole import whole_segments
from tests.support.checkpoints import hf_config, write_checkpoint
from tests.support.matrices import IN, OUT, RNG, E, affine, mxfp4, normal, thresholds
from tests.support.random_weights import Shape

host = pytest.mark.skipif(on_gpu(), reason="this is the CPU backend's own code")


def gradient(function: Callable[[mx.array], mx.array], x: mx.array) -> np.ndarray:
    """Of the sum of what `function` gives, each output by a weight of its own."""

    def loss(x: mx.array) -> mx.array:
        y = function(x)
        return (y * mx.sin(mx.arange(y.size)).reshape(y.shape)).sum()

    return np.array(mx.grad(loss)(x))


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < 1e-5 * np.abs(expected).max())


def test_a_product_made_outside_of_mlx_has_a_gradient_of_zero_and_nobody_is_told() -> None:
    """Why the CPU backend's products are custom functions."""
    weight = RNG.standard_normal((OUT, IN)).astype(np.float32)
    assert not gradient(lambda x: mx.array(cpu.product(np.asarray(x), weight)), normal(5, IN)).any()


@host
@pytest.mark.parametrize("size", ["large", "small", "tiny"])
@pytest.mark.parametrize("rows", [1, 7, 60])
@pytest.mark.parametrize("make", [lambda: Matrix(normal(OUT, IN)), lambda: affine(OUT, IN)])
def test_a_projection_has_the_gradient_of_mlx(
    make: Callable[[], Matrix], rows: int, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds(monkeypatch, size)
    matrix, x = make(), normal(rows, IN)
    expected = gradient(matrix.apply, x)
    assert expected.any() and close(gradient(cpu.HostProjection(matrix), x), expected)


@host
@pytest.mark.parametrize("size", ["large", "small", "tiny"])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("form", ["mxfp4", "affine", "dense"])
def test_experts_have_the_gradient_of_a_gpus_way(
    form: str, tokens: int, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds(monkeypatch, size)
    monkeypatch.setattr(cpu, "UNPACK_ROWS", 70)
    inner, k = 128, 2
    make: dict[str, Callable[[int, int], Matrix]] = {
        "mxfp4": mxfp4,
        "affine": lambda outputs, inputs: affine(E, outputs, inputs),
        "dense": lambda outputs, inputs: Matrix(normal(E, outputs, inputs)),
    }
    gate_up, down = make[form](2 * inner, IN), make[form](IN, inner)
    weights = ExpertWeights(
        gate_up, down, normal(E, 2 * inner + IN), interleaved=True, limit=7.0, alpha=1.702
    )
    config = ModelConfig.from_hf(hf_config(Shape()))
    batch = Batch(whole_segments(config, [tokens]), k)
    x, chosen = normal(tokens, IN), mx.array(RNG.integers(0, E, (tokens, k)).astype(np.uint32))
    expected = gradient(lambda x: ResidentExperts(weights)(x, chosen, batch), x)
    assert expected.any() and close(
        gradient(lambda x: cpu.HostExperts(weights)(x, chosen, batch), x), expected
    )


@host
@pytest.mark.parametrize("rows", [1, 40])
def test_what_an_adapter_adds_has_the_gradients_of_mlx(rows: int) -> None:
    arrays = normal(rows, IN), normal(4, IN), normal(OUT, 4)
    weights = normal(rows, OUT)

    def loss(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return (weights * ((x @ a.T) @ b.T)).sum()

    def hosts(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return (weights * cpu.low_rank(x, a, b)).sum()

    value, expected = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    again, found = mx.value_and_grad(hosts, argnums=(0, 1, 2))(*arrays)
    assert np.array(again) == pytest.approx(np.array(value), rel=1e-5)
    assert all(close(np.array(f), np.array(e)) for f, e in zip(found, expected, strict=True))


@host
@pytest.mark.parametrize("length", [1, 9, 40])
def test_attention_has_the_gradients_of_mlx(length: int) -> None:
    """Over everything, and over a window where it is shorter than the sequence."""
    config = ModelConfig.from_hf(hf_config(Shape(window=16)))
    (segment,) = whole_segments(config, [length])
    q, g = normal(1, 4, length, 32), normal(1, 4, length, 32)
    k, v, sinks = normal(1, 2, length, 32), normal(1, 2, length, 32), normal(4)
    for mask in segment.cache.masks(length).values():

        def mlx(q: mx.array, k: mx.array, v: mx.array, mask: Mask = mask) -> mx.array:
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)

        def ours(q: mx.array, k: mx.array, v: mx.array, mask: Mask = mask) -> mx.array:
            return cpu.attention(q, k, v, scale=0.3, sinks=sinks, mask=mask)

        (value,), expected = mx.vjp(mlx, [q, k, v], [g])
        (again,), found = mx.vjp(ours, [q, k, v], [g])
        assert np.array_equal(np.array(again), np.array(value))
        for array, wanted in zip(found, map(np.array, expected), strict=True):
            assert np.abs(np.array(array) - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


class Plain(Checkpoint):
    """A checkpoint whose graph is MLX's operations alone, as on a GPU."""

    def projection(self, *keys: str, layer: int = 0, bias: mx.array | None = None) -> Projection:
        made = super().projection(*keys, layer=layer, bias=bias)
        return Dense(made.matrix) if isinstance(made, cpu.HostProjection) else made

    def experts(self, layer: int) -> Experts:
        made = super().experts(layer)
        return ResidentExperts(made.weights) if isinstance(made, cpu.HostExperts) else made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gradients"), Shape(vocab=64))


LENGTHS = (40, 1, 9)
TOKENS = mx.array(RNG.integers(0, 64, sum(LENGTHS)).astype(np.int32))


def through(model: Model, x: mx.array) -> mx.array:
    """All layers and the head, from the embeddings on."""
    batch = Batch(whole_segments(model.config, LENGTHS), model.config.experts_per_token)
    for layer in model.layers:
        x = layer(x, batch)
    logits = model.logits(x)
    assert logits is not None
    return logits


def test_the_gradient_through_the_whole_model_is_that_of_mlx_and_of_differences(folder: Path) -> None:
    plain, ours = read_model(Plain(folder, "float32")), read_model(Checkpoint(folder, "float32"))
    x = plain.embedding(TOKENS)
    expected = gradient(lambda x: through(plain, x), x)
    found = gradient(lambda x: through(ours, x), x)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()

    def loss(at: float) -> float:
        y = through(ours, x + mx.array(direction * at))
        return float(np.array((y * mx.sin(mx.arange(y.size)).reshape(y.shape)).sum()))

    direction = found / np.linalg.norm(found)
    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert abs(slope / np.linalg.norm(found) - 1) < 0.01


def test_what_is_trained_is_what_is_served_to_the_bit(folder: Path) -> None:
    model = read_model(Checkpoint(folder, "float32"))
    served = model(TOKENS, [Segment(length, model.make_cache()) for length in LENGTHS])
    trained = model(TOKENS, whole_segments(model.config, LENGTHS))
    assert served is not None and trained is not None
    assert np.array_equal(np.array(served), np.array(trained))
