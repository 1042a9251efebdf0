"""Adapters of mlx-lm and PEFT, read and written."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.adapter import Adapter, read_adapter, write_adapter
from mlx_gptoss.errors import AdapterError
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.low_rank import PARTS, Pair
from tests.support.adapters import random_adapter
from tests.support.checkpoints import hf_config
from tests.support.random_weights import Shape

SHAPE = Shape(layers=3, vocab=64)
CONFIG = ModelConfig.from_hf(hf_config(SHAPE))
# The demo's hidden and intermediate sizes are equal.
SQUARE = ModelConfig.from_hf(hf_config(Shape(layers=3, vocab=64, intermediate=192)))


def same(one: Adapter, other: Adapter) -> bool:
    """What they add to the weights is the same, to the bit."""
    pairs = list(zip(one.pairs(), other.pairs(), strict=True))
    return all(
        (i, n) == (j, m)
        and np.array_equal(np.array(p.a), np.array(q.a))
        and np.array_equal(np.array(p.b), np.array(q.b))
        for (i, n, p), (j, m, q) in pairs
    )


@pytest.mark.parametrize("config", [CONFIG, SQUARE], ids=["odd", "square"])
@pytest.mark.parametrize("form", ["mlx-lm", "peft"])
def test_what_is_written_is_what_is_read(form: str, config: ModelConfig, tmp_path: Path) -> None:
    adapter = random_adapter(config)
    write_adapter(tmp_path, adapter, config, format=form)
    found = read_adapter(tmp_path, config)
    assert same(adapter, found) and found.scale == pytest.approx(1.5)
    assert found.about == {"base": "openai/x", "step": 7}
    assert (found.rank, found.names, found.parameters) == (4, PARTS, adapter.parameters)


def test_writing_the_same_adapter_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / name, random_adapter(CONFIG), CONFIG)
    one, two = ((tmp_path / n / "adapters.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    assert not list((tmp_path / "one").glob("*.partial*"))


def test_gate_and_up_trained_apart_become_one_part_of_both_ranks(tmp_path: Path) -> None:
    """mlx-lm's own adapters have another a for each."""
    write_adapter(tmp_path, random_adapter(CONFIG), CONFIG)
    tensors = mx.load(str(tmp_path / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    key = "model.layers.1.mlp.experts.up_proj.lora_a"
    tensors[key] = tensors[key] + 1.0
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    pair = read_adapter(tmp_path, CONFIG).parts[1]["gate_up_proj"]
    assert pair.rank == 8
    for start, half in enumerate(("gate", "up")):
        a, b = (tensors[f"model.layers.1.mlp.experts.{half}_proj.lora_{side}"] for side in "ab")
        assert np.abs(np.array((pair.b @ pair.a)[:, start::2] - b @ a)).max() < 1e-4


def test_peft_files_with_a_module_for_each_expert_are_read(tmp_path: Path) -> None:
    """As Unsloth's 4-bit loader has them."""
    adapter = random_adapter(CONFIG)
    write_adapter(tmp_path, adapter, CONFIG, format="peft")
    file = tmp_path / "adapter_model.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    for layer in (1, 2):
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts."
        for wrapper, name in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
            for side in "AB":
                del tensors[f"{prefix}{wrapper}lora_{side}.weight"]
            for e in range(CONFIG.num_experts):
                pair = adapter.parts[layer][name]
                tensors[f"{prefix}{name}s.{e}.lora_A.weight"] = mx.contiguous(pair.a[e])
                tensors[f"{prefix}{name}s.{e}.lora_B.default.weight"] = mx.contiguous(pair.b[e])
    mx.save_safetensors(str(file), tensors)
    assert same(adapter, read_adapter(tmp_path, CONFIG))


def test_the_experts_order_in_peft_is_outermost_in_a_and_innermost_in_b(tmp_path: Path) -> None:
    """Found with PEFT 0.21.2 on transformers: wrapped parameters of [E, in, out]."""
    adapter = random_adapter(CONFIG)
    write_adapter(tmp_path, adapter, CONFIG, format="peft")
    tensors = mx.load(str(tmp_path / "adapter_model.safetensors"))
    assert isinstance(tensors, dict)
    prefix, pair, count = "base_model.model.model.layers.1.mlp.experts.", adapter.parts[1]["down_proj"], 8
    a, b = (np.array(tensors[f"{prefix}lora_{side}.weight"]) for side in "AB")
    for e in range(count):
        assert np.array_equal(a[4 * e : 4 * e + 4], np.array(pair.a[e]))
        assert np.array_equal(b[:, e::count], np.array(pair.b[e]))


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("adapter_config.json", {"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
        ("adapter_config.json", {"lora_parameters": {"scale": 0}}, "scale is 0: expected a number above 0"),
        ("adapter_config.json", None, "expected an object"),
    ],
)
def test_a_kind_of_adapter_that_is_not_known_is_refused(
    file: str, change: dict[str, object] | None, told: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, random_adapter(CONFIG), CONFIG)
    about = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps([] if change is None else about | change))
    with pytest.raises(AdapterError, match=told):
        read_adapter(tmp_path, CONFIG)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"r": "x"}])
def test_a_peft_adapter_of_another_kind_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    write_adapter(tmp_path, random_adapter(CONFIG), CONFIG, format="peft")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=next(iter(change))):
        read_adapter(tmp_path, CONFIG)


@pytest.mark.parametrize("form", ["mlx-lm", "peft"])
@pytest.mark.parametrize(
    "other",
    [Shape(layers=2, vocab=64), Shape(layers=3, hidden=256, vocab=64), Shape(layers=3, experts=16, vocab=64)],
)
def test_an_adapter_of_another_model_is_refused(form: str, other: Shape, tmp_path: Path) -> None:
    write_adapter(tmp_path, random_adapter(CONFIG), CONFIG, format=form)
    with pytest.raises(AdapterError, match="for another model"):
        read_adapter(tmp_path, ModelConfig.from_hf(hf_config(other)))


def test_a_broken_file_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter there"):
        read_adapter(tmp_path, CONFIG)
    write_adapter(tmp_path, random_adapter(CONFIG), CONFIG)
    file = tmp_path / "adapters.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="not readable"):
        read_adapter(tmp_path, CONFIG)
    mx.save_safetensors(str(file), {"lm_head.lora_a": mx.zeros((2, 2))})
    with pytest.raises(AdapterError, match="not a low-rank part"):
        read_adapter(tmp_path, CONFIG)
    adapter = random_adapter(CONFIG)
    broken = {
        **adapter.parts[1],
        "q_proj": Pair(adapter.parts[1]["q_proj"].a * mx.inf, adapter.parts[1]["q_proj"].b),
    }
    write_adapter(tmp_path, Adapter({1: broken}, 1.0), CONFIG)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        read_adapter(tmp_path, CONFIG)
