"""Small steps on a GPU replay a traced graph: the same bits, few traces, and nothing kept or missed."""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss import device
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.engine.runner import LocalRunner
from mlx_gptoss.model import graph
from mlx_gptoss.model.batch import REPLAYED_ROWS, Batch, Segment
from mlx_gptoss.model.graph import Attention, Model
from mlx_gptoss.model.trace import tell_choices
from mlx_gptoss.model.whole import whole_segments
from tests.model.test_streamed import as_on_a_gpu, same, streamed, use
from tests.support.adapters import random_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(layers=3, hidden=64, intermediate=64, experts=16, heads=4, window=16, vocab=160)
pytestmark = pytest.mark.skipif(
    not device.on_gpu() and not shutil.which("g++"), reason="MLX's CPU backend compiles with a C++ compiler"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("compiled"), SHAPE)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, whatever there is."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    replay(monkeypatch, True)


def replay(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setattr(graph, "on_gpu", lambda: on)


def loaded(folder: Path, dtype: str = "float32") -> Model:
    return read_model(Checkpoint(folder, dtype))


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often Python builds the first part of a layer, by the number of rows."""
    calls: Counter[int] = Counter()
    project = Attention.project

    def counting(self: Attention, x: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        calls[len(x)] += 1
        return project(self, x, batch)

    monkeypatch.setattr(Attention, "project", counting)
    return calls


def decode(model: Model, rows: int, adapter: int = 0) -> np.ndarray:
    """Logits of the first token of some sequences."""
    segments = [Segment(1, model.make_cache(), adapter=adapter) for _ in range(rows)]
    return np.array(model(mx.arange(rows, dtype=mx.int32), segments))


@pytest.mark.parametrize(("dtype", "slots"), [("float32", None), ("float32", 8), ("bfloat16", None)])
def test_the_bits_are_those_of_the_graph(
    folder: Path, dtype: str, slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folder, dtype) if slots is None else streamed(folder, slots, dtype)
    replayed = use(model)
    replay(monkeypatch, False)
    assert same(replayed, use(model))


def test_a_number_of_rows_is_traced_once_and_large_ones_never(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever sizes come, however often."""
    calls, model = counted(monkeypatch), loaded(folder)
    sizes = [*np.random.default_rng(1).integers(1, 3 * REPLAYED_ROWS, 60).tolist(), 1, 1, REPLAYED_ROWS]
    for rows in sizes:
        assert model(mx.zeros(rows, mx.int32), [Segment(rows, model.make_cache())], []) is None
    small = {rows for rows in sizes if rows <= REPLAYED_ROWS}
    assert {rows: n for rows, n in calls.items() if rows <= REPLAYED_ROWS} == dict.fromkeys(
        small, SHAPE.layers
    )
    large = Counter(rows for rows in sizes if rows > REPLAYED_ROWS)
    assert {rows: n for rows, n in calls.items() if rows > REPLAYED_ROWS} == {
        rows: n * SHAPE.layers for rows, n in large.items()
    }


def test_rows_with_adapters_are_not_replayed_and_the_others_still_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folder)
    runner, plain = LocalRunner(model), decode(model, 4)
    for seed in (1, 2):  # the second takes the first one's place
        runner.put_adapter(1, random_adapter(model.config, seed=seed))
        calls = counted(monkeypatch)
        adapted = decode(model, 4, adapter=1)
        assert np.abs(adapted - plain).max() > 0.01
        assert np.array_equal(decode(model, 4), plain) and np.array_equal(decode(model, 4), plain)
        assert calls[4] == SHAPE.layers * (2 if seed == 1 else 1)
        replay(monkeypatch, False)
        assert np.array_equal(decode(model, 4, adapter=1), adapted)
        replay(monkeypatch, True)
    runner.put_adapter(1, None)
    assert np.array_equal(decode(model, 4, adapter=1), plain)


def test_choices_are_told_of_every_step(folder: Path) -> None:
    model, told = loaded(folder), list[tuple[int, tuple[int, ...]]]()
    plain = decode(model, 2)
    tell_choices(model, lambda layer, ids: told.append((layer, ids.shape)))
    for _ in range(3):
        assert np.array_equal(decode(model, 2), plain)
    assert told == [(layer, (2, SHAPE.top_k)) for layer in range(SHAPE.layers)] * 3
    tell_choices(model, None)
    assert np.array_equal(decode(model, 2), plain) and len(told) == 3 * SHAPE.layers


def test_a_model_that_is_dropped_frees_its_weights_at_once(folder: Path) -> None:
    decode(loaded(folder), 1)
    gc.collect()
    before = mx.get_active_memory()
    gc.disable()
    try:
        model = loaded(folder)
        decode(model, 1)
        held = mx.get_active_memory() - before
        del model
        assert held > 100_000
        assert mx.get_active_memory() - before < held // 100
    finally:
        gc.enable()


def test_a_gradient_goes_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folder)

    def loss(x: mx.array) -> mx.array:
        batch = Batch(whole_segments(model.config, (3, 1)), model.config.experts_per_token)
        for layer in model.layers:
            x = layer(x, batch)
        return (x * mx.sin(mx.arange(x.size)).reshape(x.shape)).sum()

    x = model.embedding(mx.array([1, 2, 3, 4]))
    replayed = np.array(mx.grad(loss)(x))
    replay(monkeypatch, False)
    plain = np.array(mx.grad(loss)(x))
    assert np.abs(plain).max() > 0.1 and np.abs(replayed - plain).max() < 1e-5 * np.abs(plain).max()
