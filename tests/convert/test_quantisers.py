"""The quantisers: MLX's formats bit for bit, less error than MLX's own, exact where the format can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.safetensors import bfloat16_to_float32
from mlx_gptoss.convert import affine, mxfp4
from mlx_gptoss.model.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES

Draw: TypeAlias = Callable[[np.random.Generator], np.ndarray]

SHAPE = (64, 768)
DISTRIBUTIONS: dict[str, Draw] = {
    "gaussian": lambda random: random.standard_normal(SHAPE),
    "student t, 4 degrees": lambda random: random.standard_t(4, SHAPE),
    "laplace": lambda random: random.laplace(size=SHAPE),
    "outliers": lambda random: random.standard_normal(SHAPE) * np.where(random.random(SHAPE) < 0.003, 10, 1),
}


def weights(distribution: str = "gaussian", scale: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 bits and the float32 values they stand for."""
    values = DISTRIBUTIONS[distribution](np.random.default_rng(7)) * scale
    bits = affine.to_bfloat16(values.astype(np.float32))
    return bits, bfloat16_to_float32(bits)


def stated(result: affine.Quantized) -> float:
    """The error that a quantiser says its result has."""
    assert result.squared_error is not None
    return result.squared_error


def squared_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(np.square(a.astype(np.float64) - b)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_four_bits_have_18_percent_less_squared_error_than_mlx(distribution: str) -> None:
    bits, values = weights(distribution)
    found, theirs = affine.search(values, 4, 64), affine.quantize(bits, 4, 64, measure=True)
    assert stated(found) < 0.82 * stated(theirs)


@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("width", AFFINE_BITS)
def test_every_width_is_better_than_mlx_and_says_its_true_error(width: int, group_size: int) -> None:
    bits, values = weights()
    found = affine.search(values, width, group_size)
    theirs = affine.quantize(bits, width, group_size, measure=True)
    assert stated(found) < 0.9 * stated(theirs)
    again = affine.dequantize(*found[:3], width, group_size)
    assert found.squared_error == pytest.approx(squared_error(again, values), rel=1e-4)


def small(draw: Draw) -> Draw:
    return lambda random: 0.02 * draw(random)


KINDS: dict[str, Draw] = {
    **{name: small(draw) for name, draw in DISTRIBUTIONS.items()},
    "of one sign": lambda random: np.abs(random.standard_normal(SHAPE)) * random.choice([-1, 1], (64, 1)),
    "of every magnitude": lambda random: (
        random.standard_normal(SHAPE) * 10.0 ** random.integers(-40, 38, SHAPE)
    ),
    "equal in a row": lambda random: np.repeat(random.choice([0.0, -0.0, 3, -1e-8], (64, 1)), SHAPE[1], 1),
    "near to nothing": lambda random: 1e-8 * random.standard_normal(SHAPE),
}


@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("width", AFFINE_BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_gives_the_bits_that_mlx_does(
    kind: str, width: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affine, "QUANTIZED_AT_ONCE", 5 * 128)
    bits = affine.to_bfloat16(KINDS[kind](np.random.default_rng(3)).astype(np.float32))
    found = affine.quantize(bits, width, group_size, measure=False)
    values = mx.array(bits).view(mx.bfloat16)
    weight, scales, biases = mx.quantize(values, group_size, width, stream=mx.cpu)
    assert np.array_equal(found.weight, np.array(weight))
    assert np.array_equal(found.scales, np.array(scales.view(mx.uint16)))
    assert np.array_equal(found.biases, np.array(biases.view(mx.uint16)))


@pytest.mark.parametrize("broken", [0x7FC0, 0xFFC1, 0x7F80, 0xFF80])
def test_a_value_that_is_no_number_makes_the_scale_of_its_group_none(broken: int) -> None:
    bits, _ = weights()
    bits[3, 70] = broken
    scales = bfloat16_to_float32(affine.quantize(bits, 4, 64, measure=False).scales)
    assert np.isnan(scales[3, 1]) and np.isnan(scales).sum() == 1


@pytest.mark.parametrize("width", AFFINE_BITS)
def test_the_packed_format_is_mlxs(width: int) -> None:
    _, values = weights()
    found = affine.search(values, width, 64)
    scales, biases = (mx.array(v).view(mx.bfloat16).astype(mx.float32) for v in (found.scales, found.biases))
    theirs = np.array(mx.dequantize(mx.array(found.weight), scales, biases, 64, width))
    assert np.abs(theirs - affine.dequantize(*found[:3], width, 64)).max() < 1e-6


def test_rows_do_not_influence_each_other() -> None:
    _, values = weights()
    whole, half = affine.search(values, 4, 64), affine.search(values[17:31], 4, 64)
    assert all((a[17:31] == b).all() for a, b in zip(whole[:3], half[:3], strict=True))


def test_constant_and_representable_groups_are_exact() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (8, 128)).astype(np.float32)
    codes[:, 0::64], codes[:, 1::64] = 0, 15
    for values in (np.zeros((4, 64), np.float32), np.full((4, 64), -1.5, np.float32), codes * 0.25 - 2):
        found = affine.search(values, 4, 64)
        assert (affine.dequantize(*found[:3], 4, 64) == values).all() and found.squared_error == 0


def test_huge_and_tiny_weights_stay_finite() -> None:
    for scale in (1e-30, 1e15):
        _, values = weights(scale=scale)
        found = affine.search(values, 4, 64)
        error = squared_error(affine.dequantize(*found[:3], 4, 64) / scale, values / scale)
        assert error < 0.01 * np.sum(np.square(values.astype(np.float64) / scale))


def test_float16_scales_are_used_unrounded() -> None:
    rows = np.arange(16, dtype=np.uint32).reshape(2, 8)
    scale, bias = np.full((2, 1), 0.1, np.float32), np.full((2, 1), -0.7, np.float32)
    assert affine.dequantize(rows, scale, bias, 4, 64)[0, 8] == np.float32(0.1) * np.float32(1) + np.float32(
        -0.7
    )


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array(
        [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, np.inf, np.nan, 3.4e38], np.float32
    )
    expected = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
    found = affine.to_bfloat16(values)
    assert (found[:5] == expected[:5]).all() and found[6] == expected[6]
    assert np.isnan(bfloat16_to_float32(found)[5])


# --- MXFP4


def nearest_even(value: float) -> float:
    """The standard's rounding by definition: the nearest of the table, on a tie the even code."""
    table = mxfp4.TABLE[:8]
    distance = np.abs(table - abs(value))
    ties = [code for code in range(8) if distance[code] == distance.min()]
    return float(np.copysign(table[min(ties, key=lambda code: code % 2)], value))


def test_rounding_follows_the_standard_on_every_eighth() -> None:
    values = np.zeros(32 * 32, np.float32)
    values[: 2 * 64 - 1] = np.arange(-63, 64) / 8  # ties and all, up to 7.875
    blocks = values.reshape(-1, 32).copy()
    blocks[:, 31] = 4.0  # fixes the scale at 1
    found = mxfp4.quantize(blocks)
    assert (found.scales == 127).all()
    expected = np.array([[nearest_even(v) for v in row] for row in blocks])
    assert (mxfp4.dequantize(found.blocks, found.scales) == expected).all()


@pytest.mark.parametrize("search", [False, True])
def test_values_the_format_can_hold_come_back_exactly(search: bool) -> None:
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (64, 12, 16), np.uint8)
    scales = random.integers(0, 253, (64, 12), np.uint8)
    values = mxfp4.dequantize(blocks, scales)
    found = mxfp4.quantize(values, search=search)
    assert (mxfp4.dequantize(found.blocks, found.scales) == values).all() and found.squared_error == 0


def test_the_layout_is_mlxs_mxfp4() -> None:
    random = np.random.default_rng(2)
    blocks = random.integers(0, 256, (8, 4, 16), np.uint8)
    scales = random.integers(110, 140, (8, 4), np.uint8)
    theirs = mx.dequantize(
        mx.array(blocks.reshape(8, 64).view(np.uint32)), mx.array(scales), group_size=32, bits=4, mode="mxfp4"
    )
    assert (np.array(theirs.astype(mx.float32)) == mxfp4.dequantize(blocks, scales)).all()


def test_the_exponent_search_is_never_worse_and_better_on_the_whole() -> None:
    _, values = weights()
    plain, searched = mxfp4.quantize(values), mxfp4.quantize(values, search=True)
    errors = [
        np.square(mxfp4.dequantize(q.blocks, q.scales) - values).reshape(-1, 32).sum(1)
        for q in (plain, searched)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert searched.squared_error < 0.96 * plain.squared_error
    assert searched.squared_error == pytest.approx(float(errors[1].sum()), rel=1e-4)


def test_zero_blocks_and_the_ends_of_the_exponent_are_representable() -> None:
    values = np.zeros((3, 32), np.float32)
    values[1, 5], values[2, 5] = 2.0**-126, 3.3e38
    found = mxfp4.quantize(values)
    again = mxfp4.dequantize(found.blocks, found.scales)
    assert (again[:2] == values[:2]).all() and np.isfinite(again).all()
