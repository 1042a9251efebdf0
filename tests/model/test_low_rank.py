"""Adapters beside the weights: alone, several in a batch, and none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.low_rank import EXPERTS, PARTS, Pair, adaptable, part_sizes, put_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import MlxRecipe, Shape

SHAPE = Shape(vocab=64)
LENGTHS, WHICH = (40, 70, 1, 33, 90, 1), (1, 2, 0, 3, 1, 4)
RANKS = {1: 4, 2: 8, 3: 8, 4: 2}


def pairs(model: Model, rank: int, seed: int, names: tuple[str, ...] = PARTS) -> list[dict[str, Pair]]:
    """Random parts for every layer."""
    rng, sizes = np.random.default_rng(seed), part_sizes(model.config)

    def made(name: str) -> Pair:
        outputs, inputs = sizes[name]
        lead = (model.config.num_experts,) if name in EXPERTS else ()
        a = rng.standard_normal((*lead, rank, inputs)) / inputs**0.5
        b = 0.1 * rng.standard_normal((*lead, outputs, rank))
        return Pair(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)))

    return [{name: made(name) for name in names} for _ in model.layers]


def with_adapters(
    model: Model, adapters: Mapping[int, list[dict[str, Pair]]], interleaved: bool = True
) -> Model:
    layers = [adaptable(layer) for layer in model.layers]
    for number, parts in adapters.items():
        for layer, own in zip(layers, parts, strict=True):
            put_adapter(layer, number, own, 1.5, interleaved=interleaved)
    return Model(model.config, embedding=model.embedding, layers=layers, norm=model.norm, head=model.head)


def logits(model: Model, tokens: np.ndarray, lengths: tuple[int, ...], which: tuple[int, ...]) -> np.ndarray:
    segments = [Segment(n, model.make_cache(), adapter=w) for n, w in zip(lengths, which, strict=True)]
    found = model(mx.array(tokens.astype(np.int32)), segments)
    assert found is not None
    return np.array(found)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(Checkpoint(write_checkpoint(tmp_path_factory.mktemp("low_rank"), SHAPE), "float32"))


TOKENS = np.random.default_rng(1).integers(0, 64, sum(LENGTHS))


@pytest.mark.parametrize("names", [PARTS[:4], PARTS[4:5], PARTS[5:], ("q_proj", "v_proj", "down_proj")])
def test_an_adapter_is_what_its_product_adds_to_the_weights(base: Model, names: tuple[str, ...]) -> None:
    """In float32: the adapted projections against products with the summed matrices."""
    parts = pairs(base, 4, 0, names)
    adapted = with_adapters(base, {1: parts})
    moved = logits(adapted, TOKENS, LENGTHS, (1,) * 6) - logits(base, TOKENS, LENGTHS, (0,) * 6)
    assert np.abs(moved).max() > 0.1
    x = mx.array(np.random.default_rng(2).standard_normal((5, SHAPE.hidden)).astype(np.float32))
    sizes = part_sizes(base.config)
    at = 0
    for name in ("q_proj", "k_proj", "v_proj"):
        width = sizes[name][0]
        if name in names:
            from mlx_gptoss.model.batch import Batch
            from mlx_gptoss.model.whole import whole_segments

            batch = Batch(whole_segments(base.config, [5], 1), base.config.experts_per_token)
            delta = 1.5 * parts[0][name].b @ parts[0][name].a
            found = adapted.layers[0].attention.qkv(x, batch) - base.layers[0].attention.qkv(x)
            assert np.abs(np.array(found[:, at : at + width] - x @ delta.T)).max() < 1e-4
        at += width


def test_sequences_of_several_adapters_run_in_one_batch_as_alone(base: Model) -> None:
    adapters = {number: pairs(base, rank, number) for number, rank in RANKS.items()}
    model = with_adapters(base, adapters)
    together = np.split(logits(model, TOKENS, LENGTHS, WHICH), np.cumsum(LENGTHS)[:-1])
    for found, tokens, length, which in zip(
        together, np.split(TOKENS, np.cumsum(LENGTHS)[:-1]), LENGTHS, WHICH, strict=True
    ):
        one = with_adapters(base, {which: adapters[which]}) if which else base
        alone = logits(one, tokens, (length,), (which,))
        assert np.abs(found - alone).max() < 1e-4


def test_without_adapters_in_the_batch_nothing_is_added(base: Model) -> None:
    model = with_adapters(base, {1: pairs(base, 4, 0)})
    none = (0,) * len(LENGTHS)
    assert np.array_equal(logits(model, TOKENS, LENGTHS, none), logits(base, TOKENS, LENGTHS, none))


def test_an_adapter_that_is_removed_is_gone(base: Model) -> None:
    model = with_adapters(base, {1: pairs(base, 4, 0), 2: pairs(base, 4, 1)})
    for layer in model.layers:
        put_adapter(layer, 2, {}, 1.0, interleaved=True)
    assert np.array_equal(logits(model, TOKENS, LENGTHS, (2,) * 6), logits(base, TOKENS, LENGTHS, (0,) * 6))


def test_gate_and_up_apart_take_the_same_adapter(tmp_path: Path) -> None:
    """An mlx-lm conversion has all gates, then all ups; an adapter's rows alternate, as published."""
    hf = read_model(Checkpoint(write_checkpoint(tmp_path / "hf", SHAPE), "float32"))
    recipe = MlxRecipe(dense_bits=None)
    apart = read_model(
        Checkpoint(write_checkpoint(tmp_path / "mlx", SHAPE, layout="mlx", recipe=recipe), "float32")
    )
    parts = pairs(hf, 4, 0)
    one = (1,) * len(LENGTHS)
    expected = logits(with_adapters(hf, {1: parts}), TOKENS, LENGTHS, one)
    found = logits(with_adapters(apart, {1: parts}, interleaved=False), TOKENS, LENGTHS, one)
    assert np.abs(found - expected).max() < 1e-4
