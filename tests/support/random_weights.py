"""Seeded random gpt-oss weights of any size, and the number formats checkpoints store them in.

Every tensor has its own random stream (seed, name, expert), so that it can be made alone, in chunks, in any
order. Dense weights are normal, scaled so that activations and logits stay of order one; expert blocks are
random nibbles with scale bytes in a narrow range. `truth` gives the float values a correct reader arrives at.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
CHUNK_VALUES = 1 << 22  # values drawn at a time


@dataclass(frozen=True)
class Shape:
    """The sizes of a checkpoint; the defaults are small and deliberately odd (hidden != intermediate)."""

    layers: int = 2
    hidden: int = 192
    intermediate: int = 128
    experts: int = 8
    top_k: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    window: int = 16
    vocab: int = 512
    initial_context: int = 4096
    rope_factor: float = 32.0
    rope_theta: float = 150000.0
    truncate: bool = False
    swiglu_limit: float = 7.0

    @property
    def layer_types(self) -> list[str]:
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(self.layers)]


_FULL = Shape(
    layers=24, hidden=2880, intermediate=2880, experts=32, heads=64, kv_heads=8, head_dim=64, window=128,
    vocab=201088,
)  # fmt: skip
SHAPES = {"tiny": Shape(), "20b": _FULL, "120b": replace(_FULL, layers=36, experts=128)}


@dataclass(frozen=True)
class MlxRecipe:
    """How an mlx-lm conversion stores dense parts and experts: bits of affine, or as they were."""

    dense_bits: int | None = 8  # None: bfloat16
    expert_bits: int | None = None  # None: MXFP4
    group: int = 64


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32, exact."""
    words: np.ndarray = bits.astype(np.uint32) << np.uint32(16)
    return words.view(np.float32)


def mxfp4_values(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks u8 [..., K/32, 16] and scales u8 [..., K/32] -> float32 [..., K], exact."""
    values = np.stack([FP4_VALUES[blocks & 15], FP4_VALUES[blocks >> 4]], -1).reshape(*scales.shape, 32)
    scaled: np.ndarray = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return scaled.reshape(*scales.shape[:-1], -1)


def affine_parts(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [..., K] -> codes [..., K] u32, scales and biases [..., K/group] as bfloat16 bits."""
    grouped = weight.reshape(*weight.shape[:-1], -1, group)
    low, high = grouped.min(-1), grouped.max(-1)
    top = (1 << bits) - 1
    scales = to_bf16(np.maximum(high - low, 1e-6) / top)
    biases = to_bf16(low)
    codes = np.rint((grouped - from_bf16(biases)[..., None]) / from_bf16(scales)[..., None])
    return np.clip(codes, 0, top).astype(np.uint32).reshape(weight.shape), scales, biases


def affine_values(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, group: int) -> np.ndarray:
    """The float32 [..., K] that affine codes stand for: code x scale + bias within each group."""
    wide = codes.reshape(*scales.shape, group).astype(np.float32)
    values: np.ndarray = wide * from_bf16(scales)[..., None] + from_bf16(biases)[..., None]
    return values.reshape(codes.shape)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [..., K] -> uint32 words [..., K * bits / 32], first code lowest (bits 4 or 8)."""
    each = 32 // bits
    lanes = codes.reshape(*codes.shape[:-1], -1, each) << (np.arange(each, dtype=np.uint32) * np.uint32(bits))
    words: np.ndarray = np.bitwise_or.reduce(lanes, -1)
    return words


def random_stream(seed: int, name: str, part: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode()), part]))


class Source:
    """The values behind a checkpoint, by Hugging Face name: dense tensors by chunk, experts one by one."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape, self.seed = shape, seed
        s = shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.global_specs: dict[str, tuple[tuple[int, ...], float, float]] = {  # name: (shape, mean, std)
            "model.embed_tokens.weight": ((s.vocab, s.hidden), 0.0, 1.0),
            "model.norm.weight": ((s.hidden,), 1.0, 0.2),
            "lm_head.weight": ((s.vocab, s.hidden), 0.0, 2.0 / math.sqrt(s.hidden)),
        }
        self.layer_specs: dict[str, tuple[tuple[int, ...], float, float]] = {
            "input_layernorm.weight": ((s.hidden,), 1.0, 0.2),
            "self_attn.q_proj.weight": ((q, s.hidden), 0.0, s.hidden**-0.5),
            "self_attn.q_proj.bias": ((q,), 0.0, 0.25),
            "self_attn.k_proj.weight": ((kv, s.hidden), 0.0, s.hidden**-0.5),
            "self_attn.k_proj.bias": ((kv,), 0.0, 0.25),
            "self_attn.v_proj.weight": ((kv, s.hidden), 0.0, s.hidden**-0.5),
            "self_attn.v_proj.bias": ((kv,), 0.0, 0.25),
            "self_attn.o_proj.weight": ((s.hidden, q), 0.0, q**-0.5),
            "self_attn.o_proj.bias": ((s.hidden,), 0.0, 0.25),
            "self_attn.sinks": ((s.heads,), 1.0, 1.0),
            "post_attention_layernorm.weight": ((s.hidden,), 1.0, 0.2),
            "mlp.router.weight": ((s.experts, s.hidden), 0.0, 1.5 * s.hidden**-0.5),
            "mlp.router.bias": ((s.experts,), 0.0, 0.3),
            "mlp.experts.gate_up_proj_bias": ((s.experts, 2 * s.intermediate), 0.0, 0.5),
            "mlp.experts.down_proj_bias": ((s.experts, s.hidden), 0.0, 0.25),
        }
        # rows, columns, and the standard deviation an output has for inputs of variance one
        self.expert_specs = {
            "gate_up_proj": (2 * s.intermediate, s.hidden, 2.0),
            "down_proj": (s.hidden, s.intermediate, 0.4),
        }

    def spec(self, name: str) -> tuple[tuple[int, ...], float, float]:
        """Shape, mean and standard deviation of a dense tensor."""
        return self.global_specs.get(name) or self.layer_specs[name.split(".", 3)[3]]

    def dense(self, name: str) -> Iterator[np.ndarray]:
        """bfloat16 bits of a dense tensor, some whole rows at a time."""
        shape, mean, std = self.spec(name)
        random, columns = random_stream(self.seed, name), shape[-1]
        rows, step = math.prod(shape[:-1]), max(1, CHUNK_VALUES // columns)
        for first in range(0, rows, step):
            values = random.standard_normal((min(step, rows - first), columns), np.float32)
            yield to_bf16(values * np.float32(std) + np.float32(mean))

    def expert(self, layer: int, which: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks u8 [rows, K/32, 16] and scales u8 [rows, K/32] of one expert's matrix."""
        rows, columns, gain = self.expert_specs[which]
        random = random_stream(self.seed, f"{layer}.{which}", index)
        words = random.integers(0, 1 << 63, rows * columns // 16, np.uint64, endpoint=False)
        words ^= words << np.uint64(1)  # the top bit of a nibble is its sign: let it be random everywhere
        # A random nibble has standard deviation 2.93, five even exponents around the middle add 2.06.
        middle = 127 + round(math.log2(gain / (2.93 * 2.06 * math.sqrt(columns))))
        scales = random.integers(middle - 2, middle + 3, (rows, columns // 32), np.uint8)
        return words.view(np.uint8).reshape(rows, columns // 32, 16), scales

    def array(self, name: str) -> np.ndarray:
        """A whole dense tensor as float32."""
        return from_bf16(np.concatenate(list(self.dense(name)))).reshape(self.spec(name)[0])


def truth(
    shape: Shape, seed: int = 0, layout: str = "hf", recipe: MlxRecipe | None = None
) -> dict[str, np.ndarray]:
    """float32 values of all tensors under Hugging Face's names, for small shapes.

    Experts come as `...gate_up_proj` [E, 2F, D] (rows interleaved) and `...down_proj` [E, D, F]. For the mlx
    layout the values are those its quantised parts stand for.
    """
    source = Source(shape, seed)
    recipe = (recipe or MlxRecipe()) if layout == "mlx" else MlxRecipe(dense_bits=None)

    def through(values: np.ndarray, bits: int | None) -> np.ndarray:
        return (
            values if bits is None else affine_values(*affine_parts(values, bits, recipe.group), recipe.group)
        )

    names = list(source.global_specs)
    names += [f"model.layers.{i}.{n}" for i in range(shape.layers) for n in source.layer_specs]
    weights = {n: through(source.array(n), dense_bits_of(n, recipe)) for n in names}
    for i in range(shape.layers):
        for which in source.expert_specs:
            experts = [mxfp4_values(*source.expert(i, which, e)) for e in range(shape.experts)]
            weights[f"model.layers.{i}.mlp.experts.{which}"] = through(np.stack(experts), recipe.expert_bits)
    return weights


def dense_bits_of(name: str, recipe: MlxRecipe) -> int | None:
    """Bits of a dense tensor's affine quantisation: matrices alone; routers always 8, as mlx-lm does."""
    if recipe.dense_bits is None or not name.endswith(".weight") or "norm" in name or ".experts." in name:
        return None
    return 8 if "router" in name else recipe.dense_bits
