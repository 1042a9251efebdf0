"""The graph takes whatever stands for a projection or for a layer's experts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.experts import Experts
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.projection import Projection
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(vocab=64)
QKV = ("attention.q", "attention.k", "attention.v")
SEQUENCES = ([1, 2, 3, 4, 5], [6, 7, 8], [9])


class Added:
    """A projection with something added to its outputs: to every row, or to those of one sequence."""

    def __init__(self, inner: Projection, amount: float, sequence: int | None) -> None:
        self.inner, self.amount, self.sequence = inner, amount, sequence
        self.calls = 0

    def __call__(self, x: mx.array, batch: Batch | None = None) -> mx.array:
        self.calls += 1
        y = self.inner(x, batch)
        if self.sequence is None:
            return y + self.amount * mx.arange(y.shape[-1])
        assert batch is not None and batch.tokens == len(x)
        of = mx.array([i for i, s in enumerate(batch.segments) for _ in range(s.length)])
        return y + self.amount * (of == self.sequence)[:, None] * mx.arange(y.shape[-1])

    def arrays(self) -> list[mx.array]:
        return self.inner.arrays()


class Wrapped(Checkpoint):
    """A checkpoint whose projections of these keys are wrapped."""

    def __init__(
        self, folder: Path, wanted: tuple[str, ...], amount: float = 0.1, sequence: int | None = None
    ) -> None:
        super().__init__(folder, "float32")
        self.wanted, self.amount, self.sequence = wanted, amount, sequence
        self.made: list[tuple[tuple[str, ...], Added]] = []

    def projection(self, *keys: str, layer: int = 0, bias: mx.array | None = None) -> Projection:
        inner = super().projection(*keys, layer=layer, bias=bias)
        if not set(keys) & set(self.wanted):
            return inner
        self.made.append((keys, Added(inner, self.amount, self.sequence)))
        return self.made[-1][1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("seams"), SHAPE)


def logits(model: Model) -> list[np.ndarray]:
    """Of each sequence, all in one forward."""
    tokens = mx.array([t for sequence in SEQUENCES for t in sequence], mx.int32)
    found = model(tokens, [Segment(len(s), model.make_cache()) for s in SEQUENCES])
    assert found is not None
    return np.split(np.array(found), np.cumsum([len(s) for s in SEQUENCES])[:-1])


def plain(folder: Path) -> list[np.ndarray]:
    return logits(read_model(Checkpoint(folder, "float32")))


def test_every_projection_of_the_graph_may_be_wrapped(folder: Path) -> None:
    checkpoint = Wrapped(folder, (*QKV, "attention.out", "router", "head"), amount=0.0)
    found = logits(read_model(checkpoint))
    assert all(np.array_equal(a, b) for a, b in zip(found, plain(folder), strict=True))
    made = Counter(keys for keys, _ in checkpoint.made)
    layers = SHAPE.layers
    assert made == {QKV: layers, ("attention.out",): layers, ("router",): layers, ("head",): 1}
    assert all(wrapper.calls == 1 for _, wrapper in checkpoint.made)


@pytest.mark.parametrize("key", ["attention.q", "attention.out", "router", "head"])
def test_what_a_wrapper_adds_is_in_the_logits(folder: Path, key: str) -> None:
    found = logits(read_model(Wrapped(folder, (key,))))
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(found, plain(folder), strict=True))


@pytest.mark.parametrize("key", ["attention.q", "attention.out", "router"])
def test_a_wrapper_may_treat_the_sequences_of_one_batch_differently(folder: Path, key: str) -> None:
    found = logits(read_model(Wrapped(folder, (key,), sequence=1)))
    moved = [float(np.abs(a - b).max()) for a, b in zip(found, plain(folder), strict=True)]
    assert moved[1] > 0.1 and max(moved[0], moved[2]) < 1e-4


class Silent:
    """Experts that say nothing, and note what they were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

    def __call__(self, x: mx.array, chosen: mx.array, batch: Batch) -> mx.array:
        self.asked.append((x.shape, chosen.shape, batch.tokens))
        return mx.zeros((*chosen.shape, x.shape[-1]))

    def arrays(self) -> list[mx.array]:
        return []


def test_the_experts_of_a_layer_are_whatever_the_reader_makes(folder: Path) -> None:
    silent = Silent()

    class Muted(Checkpoint):
        def experts(self, layer: int) -> Experts:
            return silent if layer == 1 else super().experts(layer)

    found = logits(read_model(Muted(folder, "float32")))
    tokens = sum(map(len, SEQUENCES))
    assert silent.asked == [((tokens, SHAPE.hidden), (tokens, SHAPE.top_k), tokens)]
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(found, plain(folder), strict=True))
