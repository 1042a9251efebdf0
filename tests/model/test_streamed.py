"""Streamed experts give the same bits as resident ones, whatever is in memory and however rows come."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint import expert_file, reader
from mlx_gptoss.checkpoint.expert_file import ExpertFiles
from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.model import cpu
from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.streamed import StreamedExperts
from mlx_gptoss.model.sweep import sweep
from tests.model.test_parity import LAYOUTS, feed, pieces, step
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(layers=3, hidden=64, intermediate=64, experts=16, heads=4, window=16, vocab=160)
RNG = np.random.default_rng(2)
TOKENS = RNG.integers(0, SHAPE.vocab, 60)
SLOTS = [16, 8, 4]


def streamed(folder: Path, slots: int, dtype: str = "float32") -> Model:
    checkpoint = Checkpoint(folder, dtype)
    checkpoint.streaming = ExpertFiles(checkpoint, slots)
    return read_model(checkpoint)


def experts_of(model: Model) -> list[StreamedExperts]:
    return [e for layer in model.layers if isinstance(e := layer.moe.experts, StreamedExperts)]


def use(model: Model, tokens: np.ndarray = TOKENS) -> list[np.ndarray]:
    """Logits of a prompt and decodes alone, of eight ragged sequences, and of a rewound one."""
    found = [feed(model, tokens[:46], pieces(40, 46))]
    caches = [model.make_cache() for _ in range(8)]
    found.append(step(model, [(tokens[i : 2 * i + 1 + i % 3], c) for i, c in enumerate(caches)]))
    for n in range(4):
        found.append(step(model, [(tokens[8 * n + i : 8 * n + i + 1], c) for i, c in enumerate(caches)]))
    caches[5].rewind(3)
    found.append(step(model, [(tokens[:7], caches[5])]))
    return found


def same(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("streamed"), SHAPE)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "streaming"])
def test_logits_are_the_same_bits_in_every_layout(tmp_path: Path, layout: str, slots: int) -> None:
    name, recipe = LAYOUTS.get(layout, (layout, None))
    folder = write_checkpoint(tmp_path, SHAPE, layout=name, recipe=recipe)
    model = streamed(folder, slots)
    assert same(use(model), use(read_model(Checkpoint(folder, "float32"))))
    assert len(experts_of(model)) == SHAPE.layers
    assert all(e.counts.hits and e.counts.misses for e in experts_of(model))


def test_records_that_are_all_in_memory_are_what_was_published(tmp_path: Path) -> None:
    both = [write_checkpoint(tmp_path / name, SHAPE, layout=name) for name in ("hf", "streaming")]
    assert same(*(use(read_model(Checkpoint(folder, "float32"))) for folder in both))


@pytest.mark.parametrize("slots", [16, 5])
@pytest.mark.parametrize("sizes", [(1, 1), (1 << 30, 1), (1 << 30, 1 << 30)])
def test_every_way_of_the_cpu_backend_is_kept(
    folder: Path, sizes: tuple[int, int], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "LARGE", sizes[0])
    monkeypatch.setattr(cpu, "SMALL", sizes[1])
    assert same(use(streamed(folder, slots)), use(read_model(Checkpoint(folder, "float32"))))


AFFINE = "mlx 4-bit experts, dense parts in 4 bits"


@pytest.mark.parametrize(
    ("layout", "dtype", "slots"),
    [
        *(("hf", "float32", slots) for slots in (16, 8, 5, 4)),
        ("hf", "bfloat16", 5),
        ("bf16", "float32", 5),
        (AFFINE, "float32", 5),
        (AFFINE, "float16", 5),
        ("streaming", "float32", 5),
    ],
)
def test_a_graph_that_is_built_before_its_choices_are_known_gives_the_same_bits(
    tmp_path: Path, layout: str, dtype: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU: nothing is evaluated while the graph is built."""
    as_on_a_gpu(monkeypatch)
    name, recipe = LAYOUTS.get(layout, (layout, None))
    folder = write_checkpoint(tmp_path, SHAPE, layout=name, recipe=recipe)
    model = streamed(folder, slots, dtype)
    assert same(use(model), use(read_model(Checkpoint(folder, dtype))))
    assert all(e.counts.misses for e in experts_of(model))


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reader, expert_file):
        monkeypatch.setattr(module, "on_gpu", lambda: True)


@pytest.mark.parametrize("slots", [3, 2])
def test_the_demo_model_streams(slots: int) -> None:
    demo = resolve("demo")
    tokens = RNG.integers(0, Checkpoint(demo).config.vocab_size, 60)
    assert same(use(streamed(demo, slots), tokens), use(read_model(Checkpoint(demo, "float32")), tokens))


def test_a_prompt_reads_each_expert_once(folder: Path) -> None:
    model = streamed(folder, 4)
    for _ in range(2):
        held = [set(e.slots.held) for e in experts_of(model)]
        before = [e.counts.misses for e in experts_of(model)]
        feed(model, TOKENS, [len(TOKENS)])
        read = [e.counts.misses - b for e, b in zip(experts_of(model), before, strict=True)]
        assert all(n <= SHAPE.experts - len(h) for n, h in zip(read, held, strict=True))


@pytest.mark.parametrize("prepared", [True, False])
def test_a_read_waits_for_whoever_still_uses_the_slot(
    folder: Path, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of different sequences depend on each other by nothing but the slots."""
    as_on_a_gpu(monkeypatch)
    experts = experts_of(streamed(folder, 4))[0]
    resident = read_model(Checkpoint(folder, "float32")).layers[0].moe.experts
    caches = [streamed(folder, 4).make_cache() for _ in range(2)]
    batches = [Batch([Segment(1, cache)], 4) for cache in caches]
    chosen = [mx.array([[0, 1, 2, 3]], mx.uint32), mx.array([[7, 6, 5, 4]], mx.uint32)]
    if prepared:
        experts.prepare([0, 1, 2, 3])
    x = mx.random.normal((1, SHAPE.hidden))
    expected = [np.array(resident(x, c, b)) for c, b in zip(chosen, batches, strict=True)]
    slow = mx.random.normal((700, 700))
    mx.eval(slow)
    for _ in range(3):
        slow = slow @ slow * 1e-3
    found = []
    for c, b in zip(chosen, batches, strict=True):
        late = x + 0 * slow[:1, : SHAPE.hidden]
        found.append(experts(late, c, b))
        b.settle()
        mx.async_eval(found[-1])
        slow = mx.zeros((1, SHAPE.hidden))
    assert all(np.array_equal(np.array(f), e) for f, e in zip(found, expected, strict=True))


def test_a_long_prompt_in_one_sweep_is_the_same_bits_as_its_blocks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a decode that rides along; each expert is read once."""
    # The head takes all rows at once in a sweep, and a BLAS adds in an order that depends on their number.
    monkeypatch.setattr(cpu, "LARGE", 1 << 40)
    tokens, models = mx.array(np.resize(TOKENS, 150)), [streamed(folder, 5) for _ in range(2)]
    found, told = [], list[float]()
    for model in models:
        caches = [model.make_cache() for _ in range(2)]
        step(model, [(TOKENS[:9], caches[0])])
        read = [e.counts.misses for e in experts_of(model)]
        held = [set(e.slots.held) for e in experts_of(model)]
        if model is models[0]:
            shares = [Segment(1, caches[0]), Segment(149, caches[1])]
            found.append(np.array(sweep(model, tokens, shares, None, 40, told.append)))
            for e, before, had in zip(experts_of(model), read, held, strict=True):
                assert e.counts.misses - before <= SHAPE.experts - len(had)
        else:
            ids = np.array(tokens)
            parts = [step(model, [(ids[:1], caches[0]), (ids[1:40], caches[1])])]
            parts += [step(model, [(ids[i : i + 40], caches[1])]) for i in range(40, 150, 40)]
            found.append(np.concatenate(parts))
        found.append(step(model, [(TOKENS[:1], c) for c in caches]))
    assert same(found[:2], found[2:])
    assert told == [pytest.approx((i + 1) / SHAPE.layers) for i in range(SHAPE.layers)]


def test_readers_that_are_late_change_nothing(folder: Path) -> None:
    """Reads end in another order than they began, long after they were asked for."""
    gate = threading.Semaphore(0)
    order: list[int] = []

    def late(descriptor: int, into: Sequence[memoryview], offset: int) -> int:
        gate.acquire(timeout=0.002)
        order.append(offset)
        return os.preadv(descriptor, into, offset)

    checkpoint = Checkpoint(folder, "float32")
    checkpoint.streaming = ExpertFiles(checkpoint, 5, preadv=late)
    tokens = TOKENS[:12]
    found = feed(read_model(checkpoint), tokens, pieces(9, 12))
    assert order
    assert np.array_equal(found, feed(read_model(Checkpoint(folder, "float32")), tokens, pieces(9, 12)))


def test_the_arena_is_written_in_place(folder: Path) -> None:
    """Nothing that is held for life is ever allocated again: what decodes takes stays the same."""
    model = streamed(folder, 5)
    feed(model, TOKENS, pieces(40, len(TOKENS)))
    places = [[np.asarray(a.view(mx.uint8)).ctypes.data for a in e.arrays()] for e in experts_of(model)]
    feed(model, TOKENS[::-1], pieces(20, len(TOKENS)))
    again = [[np.asarray(a.view(mx.uint8)).ctypes.data for a in e.arrays()] for e in experts_of(model)]
    assert places == again
