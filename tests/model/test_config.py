"""config.json is read exactly, in each spelling; what is missing or contradictory is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_gptoss.errors import ConfigError
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig, read_config
from tests.support.checkpoints import hf_config, original_config
from tests.support.random_weights import SHAPES, Shape


def test_both_spellings_of_rope_read_the_same() -> None:
    shape = Shape(truncate=True)
    older, newer = hf_config(shape), hf_config(shape, rope_parameters=True)
    assert ModelConfig.from_hf(older) == ModelConfig.from_hf(newer)
    assert ModelConfig.from_hf(older).rope.truncate is True
    assert ModelConfig.from_hf(hf_config(Shape(truncate=False))).rope.truncate is False


def test_the_original_config_reads_as_the_hf_config_of_the_same_model() -> None:
    shape = SHAPES["20b"]
    assert ModelConfig.from_original(original_config(shape)) == ModelConfig.from_hf(hf_config(shape))


def test_a_config_survives_the_way_to_json_and_back() -> None:
    config = ModelConfig.from_hf(hf_config(Shape(swiglu_limit=5.0)) | {"swiglu_alpha": 1.25})
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("read", "raw"),
    [(ModelConfig.from_hf, hf_config(Shape())), (ModelConfig.from_original, original_config(Shape()))],
)
def test_the_slope_of_swiglu_is_read_and_the_published_one_where_none_is_given(
    read: Callable[[dict[str, Any]], ModelConfig], raw: dict[str, Any]
) -> None:
    assert read(raw).swiglu_alpha == 1.702
    assert read(raw | {"swiglu_alpha": 1.0}).swiglu_alpha == 1.0


def test_the_published_slope_adds_no_key_to_the_published_config() -> None:
    assert "swiglu_alpha" not in ModelConfig.from_hf(hf_config(Shape())).to_hf()


def test_an_original_context_that_overflows_is_refused() -> None:
    with pytest.raises(ConfigError, match="rope_scaling_factor is 1e[+]308"):
        ModelConfig.from_original(original_config(Shape()) | {"rope_scaling_factor": 1e308})


def test_even_layers_slide_when_the_config_does_not_say() -> None:
    raw = hf_config(Shape(layers=3))
    del raw["layer_types"]
    assert ModelConfig.from_hf(raw).layer_types == (SLIDING, FULL, SLIDING)


@pytest.mark.parametrize(
    "field",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_local_experts",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "sliding_window",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_scaling",
        "rope_theta",
    ],
)
def test_a_missing_field_is_named(field: str) -> None:
    raw = hf_config(Shape())
    del raw[field]
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_hf(raw)


YARN = hf_config(Shape(), rope_parameters=True)["rope_parameters"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "llama"}, "'llama'.*expected 'gpt_oss'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"experts_per_token": 3, "num_experts_per_tok": 2}, "num_experts_per_tok = 2.*contradict"),
        ({"num_experts_per_tok": 99, "experts_per_token": 99}, "num_experts_per_tok is 99"),
        ({"num_attention_heads": 7}, "num_attention_heads is 7"),
        ({"layer_types": [SLIDING]}, "layer_types has 1 entries"),
        ({"layer_types": [SLIDING] * 3}, "layer_types has 3 entries"),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types is"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0"),
        ({"swiglu_alpha": 0}, "swiglu_alpha is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_theta": [1], "rope_scaling": None, "rope_parameters": YARN}, r"rope_theta is \[1\]"),
        ({"rope_theta": "150000", "rope_scaling": None, "rope_parameters": YARN}, "rope_theta is '150000'"),
        ({"hidden_size": 10**400}, "hidden_size is 1000.*expected a whole number from 1 to"),
        ({"swiglu_limit": 10**400}, "swiglu_limit is 1000.*expected a number above 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 3.0, "rope_theta": 150000.0}}, "contradict"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(change: dict[str, Any], told: str) -> None:
    raw = hf_config(Shape(layers=2)) | change
    with pytest.raises(ConfigError, match=told):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("key", "value"), [("truncate", "no"), ("attention_factor", 1.2), ("beta_fast", 0.5)]
)
def test_yarn_is_never_half_read(key: str, value: object) -> None:
    raw = hf_config(Shape())
    raw["rope_scaling"] |= {key: value}
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no config.json"),
        ("{", "not readable as JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"hidden_size": ' + "9" * 9000 + "}", "not readable as JSON"),
    ],
)
def test_a_folder_without_a_usable_config_is_told_so(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=told):
        read_config(tmp_path)


def test_parameters_are_counted_as_published() -> None:
    published = {"num_hidden_layers": 24, "num_local_experts": 32}
    base = hf_config(Shape()) | {
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 201088,
        "num_experts_per_tok": 4,
        "layer_types": [SLIDING, FULL] * 12,
    }
    assert ModelConfig.from_hf(base | published).parameters == 20_914_757_184
