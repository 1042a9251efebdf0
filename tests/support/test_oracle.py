"""The oracle and the random checkpoints are themselves right: they agree with what transformers computed."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.golden_cases import NAMES, load_golden
from tests.support.oracle import forward
from tests.support.random_weights import MlxRecipe, Shape, Source, from_bf16, mxfp4_values, to_bf16, truth


def test_golden_cases_cover_what_they_should() -> None:
    shapes = [load_golden(n).shape for n in NAMES]
    assert {s.truncate for s in shapes} == {True, False}
    assert {s.top_k for s in shapes} == {2, 3, 4}
    assert {16, 128} <= {s.window for s in shapes}
    assert {2, 6} <= {s.layers for s in shapes}
    assert all(s.hidden != s.intermediate for s in shapes)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "long_context"])
def test_oracle_agrees_with_transformers(name: str) -> None:
    golden = load_golden(name)
    logits = forward(golden.shape, truth(golden.shape, golden.seed), golden.tokens).logits
    np.testing.assert_allclose(logits[-len(golden.logits) :], golden.logits, rtol=0, atol=3e-5)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, seed=5)
    write_checkpoint(tmp_path / "c", seed=6)
    content = [
        b"".join(f.read_bytes() for f in sorted((tmp_path / n).glob("*.safetensors")))
        for n in ("a", "b", "c")
    ]
    assert content[0] == content[1] != content[2]


def test_shards_are_numbered_as_openai_numbers_them(tmp_path: Path) -> None:
    index = json.loads((write_checkpoint(tmp_path) / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-{i:05d}-of-00002.safetensors" for i in range(3)}


def test_random_experts_keep_activations_of_order_one() -> None:
    shape = Shape(hidden=2880, intermediate=2880)
    source = Source(shape)
    x = np.random.default_rng(0).standard_normal(2880).astype(np.float32)
    for which, gain in (("gate_up_proj", 2.0), ("down_proj", 0.4)):
        y = mxfp4_values(*source.expert(0, which, 0)) @ x
        assert 0.5 * gain < y.std() < 2 * gain


@pytest.mark.parametrize("bits", [4, 8])
def test_affine_truth_is_near_the_values_it_quantises(bits: int) -> None:
    shape = Shape(layers=1)
    plain = truth(shape, 3)
    quantised = truth(shape, 3, "mlx", MlxRecipe(bits, bits))
    for name, values in plain.items():
        bound = 0.6 * np.ptp(values) / (2**bits - 1) + 0.01 * np.abs(values).max()
        assert np.abs(quantised[name] - values).max() <= bound, name


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5], np.float32)
    np.testing.assert_array_equal(
        from_bf16(to_bf16(values)), np.array([1.0, 1.0, 1.015625, -2.5], np.float32)
    )
