"""The shape of a gpt-oss model, read once from its configuration and never guessed.

Two forms are known: Hugging Face's `config.json` (with `rope_scaling` + `rope_theta`, or transformers 5's
`rope_parameters`) and OpenAI's own `original/config.json`. A missing or contradictory field is a
ConfigError that names it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gptoss.errors import ConfigError
from mlx_gptoss.files import read_limited

SLIDING = "sliding_attention"
FULL = "full_attention"

MAX_BYTES = 8 * 2**20  # of a file of JSON; a published config has 2 kB
MAX_SIZE = 2**31 - 1  # what MLX takes as a size
MAX_LAYERS = 1000  # bounds the tables that have an entry a layer; gpt-oss-120b has 36
SWIGLU_ALPHA = 1.702  # fixed in the published reference, and absent from its config

# Sizes by their names in the configs, Hugging Face's first.
_SIZES = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_experts": ("num_local_experts", "num_experts"),
    "experts_per_token": ("num_experts_per_tok", "experts_per_token"),
    "head_dim": ("head_dim",),
    "num_attention_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "vocab_size": ("vocab_size",),
    "sliding_window": ("sliding_window",),
}


@dataclass(frozen=True)
class YarnConfig:
    """YaRN's stretch of RoPE (Peng et al. 2023). `truncate` rounds the ramp's ends; gpt-oss does not."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position: int
    truncate: bool


@dataclass(frozen=True)
class ModelConfig:
    """Everything the graph needs to know. Sizes are counts of channels, heads, tokens or experts."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    experts_per_token: int
    head_dim: int
    num_attention_heads: int
    num_kv_heads: int
    vocab_size: int
    sliding_window: int
    layer_types: tuple[str, ...]
    rms_norm_eps: float
    rope_theta: float
    rope: YarnConfig
    swiglu_limit: float
    max_position: int
    swiglu_alpha: float = SWIGLU_ALPHA  # the slope in gate * sigmoid(alpha * gate)

    def __post_init__(self) -> None:
        _check_shape(self)

    @property
    def parameters(self) -> int:
        """The number of weights, all experts counted."""
        d, f, heads = self.hidden_size, self.intermediate_size, self.num_attention_heads
        q, kv = heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = d * (q + 2 * kv) + (q + 2 * kv) + q * d + d + heads  # biases and sinks included
        expert = d * 2 * f + 2 * f + f * d + d
        layer = 2 * d + attention + self.num_experts * (d + 1 + expert)
        return self.num_layers * layer + d + 2 * self.vocab_size * d

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's keys. Raises ConfigError naming the field at fault."""
        model_type = raw.get("model_type")
        if model_type != "gpt_oss":
            raise ConfigError(
                f"config.json: model_type is {model_type!r}: expected 'gpt_oss'. "
                "This package runs gpt-oss models and their fine-tunes only"
            )
        for flag, expected in (("tie_word_embeddings", False), ("attention_bias", True)):
            if raw.get(flag, expected) is not expected:
                raise ConfigError(f"config.json: {flag} is {raw[flag]!r}: gpt-oss models have {expected}")
        get = _Reader(raw, "config.json")
        rope, theta = _read_hf_rope(raw, get)
        return cls._read(
            get,
            rms_norm_eps=get.number("rms_norm_eps"),
            rope_theta=theta,
            rope=rope,
            max_position=get.whole("max_position_embeddings"),
        )

    @classmethod
    def from_original(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read OpenAI's keys (`original/config.json`). Raises ConfigError naming the field at fault."""
        get = _Reader(raw, "original/config.json")
        factor = get.number("rope_scaling_factor")
        initial = get.whole("initial_context_length")
        if initial * factor > MAX_SIZE:
            raise ConfigError(
                f"original/config.json: rope_scaling_factor is {factor!r}: expected a context of at most "
                f"{MAX_SIZE:,} tokens with initial_context_length, {initial}"
            )
        return cls._read(
            get,
            rms_norm_eps=1e-5,  # fixed in the published reference, and absent from its config
            rope_theta=get.number("rope_theta"),
            # The reference names YaRN's betas after the NTK paper's: alpha is the slow end, beta the
            # fast one, and it never rounds the ramp.
            rope=YarnConfig(
                factor=factor,
                beta_fast=get.number("rope_ntk_beta"),
                beta_slow=get.number("rope_ntk_alpha"),
                original_max_position=initial,
                truncate=False,
            ),
            max_position=round(initial * factor),
        )

    @classmethod
    def _read(
        cls, get: _Reader, *, rms_norm_eps: float, rope_theta: float, rope: YarnConfig, max_position: int
    ) -> ModelConfig:
        """What both forms name alike, and what they do not."""
        found = {field: get.whole(*names) for field, names in _SIZES.items()}
        layers = get.whole("num_hidden_layers", maximum=MAX_LAYERS)
        return cls(
            **found,
            num_layers=layers,
            layer_types=_layer_types(get.raw.get("layer_types"), layers),
            rms_norm_eps=rms_norm_eps,
            rope_theta=rope_theta,
            rope=rope,
            swiglu_limit=get.number("swiglu_limit", default=7.0),
            swiglu_alpha=get.number("swiglu_alpha", default=SWIGLU_ALPHA),
            max_position=max_position,
        )

    def to_hf(self) -> dict[str, Any]:
        """The same shape in Hugging Face's keys, as openai/gpt-oss-20b writes them."""
        # The published configs have no such key, and conversions of them stay as they are.
        other_alpha = {} if self.swiglu_alpha == SWIGLU_ALPHA else {"swiglu_alpha": self.swiglu_alpha}
        return {
            **{names[0]: getattr(self, field) for field, names in _SIZES.items()},
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "experts_per_token": self.experts_per_token,
            "hidden_act": "silu",
            "initial_context_length": self.rope.original_max_position,
            "layer_types": list(self.layer_types),
            "max_position_embeddings": self.max_position,
            "model_type": "gpt_oss",
            "num_hidden_layers": self.num_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": {
                "beta_fast": self.rope.beta_fast,
                "beta_slow": self.rope.beta_slow,
                "factor": self.rope.factor,
                "original_max_position_embeddings": self.rope.original_max_position,
                "rope_type": "yarn",
                "truncate": self.rope.truncate,
            },
            "rope_theta": self.rope_theta,
            **other_alpha,
            "swiglu_limit": self.swiglu_limit,
            "tie_word_embeddings": False,
        }


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of the checkpoint in `folder`, and its raw JSON. Raises ConfigError."""
    raw = read_object(folder / "config.json")
    if "model_type" not in raw and "num_experts" in raw and "rope_ntk_alpha" in raw:
        return ModelConfig.from_original(raw), raw
    return ModelConfig.from_hf(raw), raw


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in one of a checkpoint's files. Raises ConfigError."""
    try:
        raw = json.loads(read_limited(path, MAX_BYTES))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent}: no {path.name}: expected the folder of a gpt-oss checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}): download the file again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}: expected a JSON object")
    return raw


class _Reader:
    """Takes typed values out of a raw config; two names for one field must agree."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def _take(self, names: tuple[str, ...], default: Any = None) -> Any:
        present = {n: self.raw[n] for n in names if self.raw.get(n) is not None}
        if len(set(map(repr, present.values()))) > 1:
            told = " and ".join(f"{n} = {v!r}" for n, v in present.items())
            raise ConfigError(f"{self.where}: {told} contradict each other")
        value = next(iter(present.values()), default)
        if value is None:
            raise ConfigError(f"{self.where}: {' or '.join(names)} is missing")
        return value

    def whole(self, *names: str, maximum: int = MAX_SIZE) -> int:
        value = self._take(names)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
            raise ConfigError(
                f"{self.where}: {names[0]} is {value!r}: expected a whole number from 1 to {maximum:,}"
            )
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        value = self._take(names, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{self.where}: {names[0]} is {value!r}: expected a number above 0")
        return float(value)


def _read_hf_rope(raw: Mapping[str, Any], get: _Reader) -> tuple[YarnConfig, float]:
    """YaRN's numbers and theta: `rope_scaling` + `rope_theta`, `rope_parameters`, or both if they agree."""
    found: list[tuple[YarnConfig, float]] = []
    for key in ("rope_parameters", "rope_scaling"):
        block = raw.get(key)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            raise ConfigError(f"config.json: {key} is {block!r}: expected an object")
        kind = block.get("rope_type", block.get("type"))
        if kind != "yarn":
            raise ConfigError(f"config.json: {key}.rope_type is {kind!r}: gpt-oss models have 'yarn'")
        initial = raw.get("initial_context_length")
        inner = _Reader({"original_max_position_embeddings": initial, **block}, f"config.json: {key}")
        theta = inner.number("rope_theta", default=raw.get("rope_theta"))
        if "truncate" in block and not isinstance(block["truncate"], bool):
            raise ConfigError(f"config.json: {key}.truncate is {block['truncate']!r}: expected true or false")
        for ignored in ("attention_factor", "mscale", "mscale_all_dim"):
            if block.get(ignored) is not None:
                raise ConfigError(
                    f"config.json: {key}.{ignored} is {block[ignored]!r}: gpt-oss models do not set it, "
                    "and ignoring it would change every logit"
                )
        yarn = YarnConfig(
            factor=inner.number("factor"),
            beta_fast=inner.number("beta_fast", default=32.0),
            beta_slow=inner.number("beta_slow", default=1.0),
            original_max_position=inner.whole("original_max_position_embeddings"),
            # transformers takes an absent `truncate` as true; gpt-oss's own configs always hold it.
            truncate=block.get("truncate", True),
        )
        found.append((yarn, theta))
    if not found:
        raise ConfigError("config.json: rope_scaling (or rope_parameters) is missing")
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError("config.json: rope_parameters and rope_scaling contradict each other")
    theta = found[0][1]
    if (outer := raw.get("rope_theta")) is not None and get.number("rope_theta") != theta:
        raise ConfigError(
            f"config.json: rope_theta is {outer!r} and rope_parameters.rope_theta is {theta!r}: "
            "they contradict each other"
        )
    return found[0]


def _layer_types(raw: Any, layers: int) -> tuple[str, ...]:
    """Which attention each layer has; absent, the published alternation: even layers slide."""
    if raw is None:
        return tuple(SLIDING if i % 2 == 0 else FULL for i in range(layers))
    if not isinstance(raw, (list, tuple)) or any(t not in (SLIDING, FULL) for t in raw):
        raise ConfigError(f"config.json: layer_types is {raw!r}: expected a list of {SLIDING!r} and {FULL!r}")
    if len(raw) != layers:
        raise ConfigError(
            f"config.json: layer_types has {len(raw)} entries and num_hidden_layers is {layers}: "
            "they contradict each other"
        )
    return tuple(raw)


def _check_shape(c: ModelConfig) -> None:
    """Relations between sizes that the graph depends on."""
    if c.num_attention_heads % max(1, c.num_kv_heads):  # a part of a layer may have none of them
        raise ConfigError(
            f"config.json: num_attention_heads is {c.num_attention_heads}: expected a multiple of "
            f"num_key_value_heads, {c.num_kv_heads}"
        )
    if c.experts_per_token > c.num_experts:
        raise ConfigError(
            f"config.json: num_experts_per_tok is {c.experts_per_token}: expected at most "
            f"num_local_experts, {c.num_experts}"
        )
    if c.head_dim % 2:
        raise ConfigError(f"config.json: head_dim is {c.head_dim}: RoPE needs an even number")
    if c.rope.beta_fast <= c.rope.beta_slow:
        raise ConfigError(
            f"config.json: rope beta_fast is {c.rope.beta_fast}: expected more than "
            f"beta_slow, {c.rope.beta_slow}"
        )
