"""gpt-oss in plain float64 numpy: no cache, no fusion, one formula after another. The everyday reference.

Written from the model's description. `weights` are those of `tests.support.random_weights.truth`: Hugging
Face's names, experts dequantised as `...gate_up_proj` [E, 2F, D] (rows gate, up, gate, up, ...) and
`...down_proj` [E, D, F].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tests.support.random_weights import Shape

SWISH_SLOPE = 1.702
EPSILON = 1e-5
BETA_FAST, BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Forward:
    """logits [T, vocab]; router_margin [layers, T]: the lead of the last expert chosen over the next."""

    logits: np.ndarray
    router_margin: np.ndarray


def forward(
    shape: Shape, weights: Mapping[str, np.ndarray], tokens: np.ndarray, swish_slope: float = SWISH_SLOPE
) -> Forward:
    """All logits of a whole sequence of T token ids."""
    x = weights["model.embed_tokens.weight"][tokens].astype(np.float64)
    cos, sin = rotary_table(shape, len(tokens))
    margins = []
    for i, kind in enumerate(shape.layer_types):
        layer = {n.split(".", 3)[3]: w for n, w in weights.items() if n.startswith(f"model.layers.{i}.")}
        window = shape.window if kind == "sliding_attention" else None
        x = x + attention(shape, layer, rms_norm(x, layer["input_layernorm.weight"]), cos, sin, window)
        rows = rms_norm(x, layer["post_attention_layernorm.weight"])
        y, margin = experts(shape, layer, rows, swish_slope)
        x = x + y
        margins.append(margin)
    logits = linear(rms_norm(x, weights["model.norm.weight"]), weights["lm_head.weight"])
    return Forward(logits, np.stack(margins))


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    y: np.ndarray = x @ weight.astype(np.float64).T
    shifted: np.ndarray = y if bias is None else y + bias
    return shifted


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    y: np.ndarray = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPSILON) * weight
    return y


def rotary_table(shape: Shape, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [T, head_dim / 2] of YaRN-stretched RoPE, with YaRN's factor on both."""
    half = shape.head_dim // 2
    plain = shape.rope_theta ** -(np.arange(half) / half)

    def turns_at(rotations: float) -> float:
        """The (fractional) pair index whose angle makes that many rotations over the original context."""
        return half * math.log(shape.initial_context / (2 * math.pi * rotations)) / math.log(shape.rope_theta)

    low, high = turns_at(BETA_FAST), turns_at(BETA_SLOW)
    if shape.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.head_dim - 1)
    stretched = np.clip(
        (np.arange(half) - low) / (high - low), 0, 1
    )  # 0: as trained, 1: slowed by the factor
    speed = plain * (1 - stretched) + plain / shape.rope_factor * stretched
    angle = np.arange(length)[:, None] * speed
    factor = 0.1 * math.log(shape.rope_factor) + 1
    return np.cos(angle) * factor, np.sin(angle) * factor


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [T, heads, head_dim]; channel i pairs with channel i + head_dim / 2."""
    a, b = np.split(x, 2, -1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def attention(
    shape: Shape,
    layer: Mapping[str, np.ndarray],
    x: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    window: int | None,
) -> np.ndarray:
    """x [T, hidden] normed -> [T, hidden]; one head at a time, so that long sequences stay in memory."""
    q, k, v = (
        linear(x, layer[f"self_attn.{n}_proj.weight"], layer[f"self_attn.{n}_proj.bias"]).reshape(
            len(x), -1, shape.head_dim
        )
        for n in "qkv"
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    distance = np.arange(len(x))[:, None] - np.arange(len(x))[None, :]
    hidden_from_view = distance < 0
    if window is not None:
        hidden_from_view |= distance >= window
    heads = []
    for head in range(shape.heads):
        shared = head // (shape.heads // shape.kv_heads)
        scores = q[:, head] @ k[:, shared].T / math.sqrt(shape.head_dim)
        scores[hidden_from_view] = -np.inf
        sink = float(layer["self_attn.sinks"][head])
        peak = np.maximum(scores.max(-1, keepdims=True), sink)
        power = np.exp(scores - peak)
        heads.append(power @ v[:, shared] / (power.sum(-1, keepdims=True) + np.exp(sink - peak)))
    return linear(np.concatenate(heads, -1), layer["self_attn.o_proj.weight"], layer["self_attn.o_proj.bias"])


def experts(
    shape: Shape, layer: Mapping[str, np.ndarray], x: np.ndarray, swish_slope: float
) -> tuple[np.ndarray, np.ndarray]:
    """x [T, hidden] normed -> weighted sum of its experts [T, hidden], router margin [T]."""
    scores = linear(x, layer["mlp.router.weight"], layer["mlp.router.bias"])
    ranked = np.argsort(-scores, -1, kind="stable")
    chosen = ranked[:, : shape.top_k]
    ordered = np.take_along_axis(scores, ranked, -1)
    margin = ordered[:, shape.top_k - 1] - ordered[:, shape.top_k]
    share = np.exp(ordered[:, : shape.top_k] - ordered[:, :1])
    share /= share.sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for e in np.unique(chosen):
        token, rank = np.nonzero(chosen == e)
        both = linear(
            x[token], layer["mlp.experts.gate_up_proj"][e], layer["mlp.experts.gate_up_proj_bias"][e]
        )
        gate = np.minimum(both[:, 0::2], shape.swiglu_limit)
        up = np.clip(both[:, 1::2], -shape.swiglu_limit, shape.swiglu_limit)
        inner = gate / (1 + np.exp(-swish_slope * gate)) * (up + 1)
        y = linear(inner, layer["mlp.experts.down_proj"][e], layer["mlp.experts.down_proj_bias"][e])
        out[token] += y * share[token, rank][:, None]
    return out, margin
