"""A checkpoint loads strictly: whatever does not fit is named before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.reader import Checkpoint, load_model
from mlx_gptoss.checkpoint.safetensors import read_header
from mlx_gptoss.errors import CheckpointError, ConfigError
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.matrix import Matrix, stack_rows
from mlx_gptoss.model.projection import Dense, Stacked
from mlx_gptoss.model.quantization import Quantization
from tests.support.checkpoints import write_checkpoint
from tests.support.oracle import forward
from tests.support.random_weights import MlxRecipe, Shape, truth

SHAPE = Shape(vocab=64)
Q = "model.layers.0.self_attn.q_proj.weight"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, SHAPE, shards=1)


def rewrite(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    """Load the one file of weights, change its tensors, and save it again."""
    path = folder / "model.safetensors"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(path), tensors, {"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.__delitem__(Q))
    with pytest.raises(CheckpointError, match=f"1 problem: {Q} is missing"):
        Checkpoint(folder)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.vision.weight": mx.zeros(3)}))
    with pytest.raises(CheckpointError, match="model.vision.weight is not part of the model"):
        Checkpoint(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({Q: mx.zeros((8, 8), mx.bfloat16)}))
    with pytest.raises(CheckpointError, match=rf"{Q} has shape \[8, 8\], expected \[\d+, \d+\]"):
        Checkpoint(folder)


def test_a_tensor_of_another_dtype_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({SCALES: t[SCALES].astype(mx.float32)}))
    with pytest.raises(CheckpointError, match=f"{SCALES} is F32, expected U8"):
        Checkpoint(folder)


def test_ten_problems_are_listed_and_all_are_counted(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=4, layer_types=None)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    text = str(caught.value)
    assert text.count("is missing") == 10
    per_layer = sum(name.startswith("model.layers.0.") for name in _names(folder))
    assert f"{2 * per_layer} problems" in text
    assert f"and {2 * per_layer - 10} more" in text
    assert "\n" not in text


def test_counts_beyond_all_models_are_refused_before_tables_are_made(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=10**9, layer_types=None)
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000000: expected .* to 1,000"):
        Checkpoint(folder)
    edit_config(folder, num_hidden_layers=SHAPE.layers, num_local_experts=10**9)
    with pytest.raises(CheckpointError, match=r"expected \[1000000000, "):
        Checkpoint(folder)


def _names(folder: Path) -> list[str]:
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    return list(tensors)


def test_a_config_that_contradicts_its_tensors_is_told_so(folder: Path) -> None:
    edit_config(folder, vocab_size=65)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[64, \d+\], expected \[65, \d+\]"):
        Checkpoint(folder)


def test_a_nan_scale_is_refused_by_name(folder: Path) -> None:
    def poison(tensors: dict[str, mx.array]) -> None:
        scales = np.array(tensors[SCALES])
        scales.flat[7] = 255
        tensors[SCALES] = mx.array(scales)

    rewrite(folder, poison)
    with pytest.raises(CheckpointError, match=rf"{SCALES}: holds the scale byte 255 \(NaN\)"):
        load_model(folder)


def test_an_unknown_quantisation_method_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="quant_method is 'gptq': expected 'mxfp4'"):
        Checkpoint(folder)


@pytest.mark.parametrize("value", ["mxfp4", ["mxfp4"], 4, True, "group_size"])
def test_a_quantisation_that_is_no_object_is_refused(folder: Path, value: object) -> None:
    edit_config(folder, quantization_config=value)
    with pytest.raises(ConfigError, match="quantization_config is .*expected an object"):
        Checkpoint(folder)


def test_another_models_tensors_are_no_known_layout(folder: Path) -> None:
    def replace(tensors: dict[str, mx.array]) -> None:
        tensors.clear()
        tensors["transformer.wte.weight"] = mx.zeros(2)

    rewrite(folder, replace)
    with pytest.raises(CheckpointError, match="no known gpt-oss layout.*transformer.wte.weight"):
        Checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep >= 0 else len(data) - 1])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_model(folder)


def test_an_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", SHAPE)
    outside = shutil.copy(folder / "model-00000-of-00002.safetensors", tmp_path)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    name = next(iter(raw["weight_map"]))
    for target in ("../" + Path(outside).name, str(outside)):
        raw["weight_map"][name] = target
        index.write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match="outside|inside|within|folder"):
            Checkpoint(folder)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"mode": "nvfp4", "bits": 4, "group_size": 16}, "mode 'nvfp4'"),
        ({"bits": 7, "group_size": 64}, "bits 7"),
        ({"bits": 4, "group_size": 48}, "group_size 48"),
        ({"bits": 4.0, "group_size": 64}, r"bits 4\.0"),
        ({"bits": [4], "group_size": 64}, r"bits \[4\]"),
        ("four", "quantization is 'four'"),
    ],
)
def test_a_packing_that_mlx_does_not_know_is_refused(tmp_path: Path, entry: object, told: str) -> None:
    folder = write_checkpoint(tmp_path, SHAPE, layout="mlx", recipe=MlxRecipe(8))
    edit_config(folder, quantization=entry)
    with pytest.raises(ConfigError, match=told):
        Checkpoint(folder)


def test_scales_that_the_config_does_not_explain_are_a_contradiction(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, SHAPE, layout="mlx", recipe=MlxRecipe(8))
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization"] = {k: v for k, v in raw["quantization"].items() if "experts" in k}
    raw.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="contradict"):
        Checkpoint(folder)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_size_of_group_is_read(tmp_path: Path, bits: int, group: int) -> None:
    shape = Shape(vocab=64, hidden=128, intermediate=128)
    folder = write_checkpoint(tmp_path, shape, layout="mlx", recipe=MlxRecipe(bits, bits, group=group))
    found = Checkpoint(folder).quantization_of(Q.removesuffix(".weight"))
    assert found == Quantization("affine", bits, group)


def test_packing_is_read_under_either_name_and_by_path(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, SHAPE, layout="mlx", recipe=MlxRecipe(8))
    raw = json.loads((folder / "config.json").read_text())
    whole = Checkpoint(folder)
    packed = sorted(name.removesuffix(".scales") for name in whole.tensors if name.endswith(".scales"))
    entry = raw["quantization"]
    default = {key: entry[key] for key in ("mode", "bits", "group_size") if key in entry}
    by_path = {path: default | entry.get(path, {}) for path in packed}
    for key, block in (("quantization_config", entry), ("quantization", entry), ("quantization", by_path)):
        others = {k: v for k, v in raw.items() if k not in ("quantization", "quantization_config")}
        (folder / "config.json").write_text(json.dumps({**others, key: block}))
        found = Checkpoint(folder)
        assert [found.quantization_of(path) for path in packed] == [whole.quantization_of(p) for p in packed]


def test_matrices_packed_differently_are_applied_side_by_side() -> None:
    weights = [mx.random.normal((64, 64), key=mx.random.key(i)) for i in range(2)]
    parts = []
    for weight, bits in zip(weights, (4, 8), strict=True):
        packed, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
        parts.append(Matrix(packed, scales, biases, Quantization("affine", bits, 64)))
    assert stack_rows(parts) is None
    x = mx.random.normal((3, 64), key=mx.random.key(9))
    together = Stacked([Dense(p) for p in parts])(x)
    expected = mx.concatenate([x @ p.dense(mx.float32).T for p in parts], axis=-1)
    assert np.abs(np.array(together - expected)).max() < 1e-4


@pytest.mark.parametrize(
    ("layout", "recipe"), [("hf", None), ("original", None), ("bf16", None), ("mlx", MlxRecipe(8))]
)
def test_the_experts_use_the_slope_that_the_config_gives(
    tmp_path: Path, layout: str, recipe: MlxRecipe | None
) -> None:
    folder = write_checkpoint(tmp_path, SHAPE, layout=layout, recipe=recipe)
    edit_config(folder, swiglu_alpha=0.8)
    model = load_model(folder, "float32")
    tokens = np.arange(12) % SHAPE.vocab
    logits = model(mx.array(tokens), [Segment(len(tokens), model.make_cache())])
    expected = forward(SHAPE, truth(SHAPE, 0, layout, recipe), tokens, swish_slope=0.8).logits
    np.testing.assert_allclose(np.array(logits), expected, rtol=0, atol=1e-3)


def test_loading_tells_its_progress(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    load_model(folder, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (SHAPE.layers + 2, SHAPE.layers + 2)
    assert [d for d, _ in told] == list(range(1, SHAPE.layers + 3))


def test_a_file_that_mlx_wrote_without_metadata_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((2, 3))})
    assert read_header(path)["a"].shape == (2, 3)
