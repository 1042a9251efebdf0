"""MXFP4 in Metal's language: how kernels read the blocks of an expert's rows, each byte once.

A block is 32 codes of 4 bits (16 bytes, four words of eight, the lowest bits first) and a scale byte, a power
of two (OCP Microscaling Formats 1.0). One lane takes one block at a time.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_gptoss.model.kernels.kernel import DEVICE_SIZE
from mlx_gptoss.model.matrix import Matrix
from mlx_gptoss.model.quantization import MXFP4

BLOCK = 32

# The three low bits of a code are a half's last exponent bits and first mantissa bit; its exponent is 14 too
# small then, which one multiplication a block makes good. Codes j and j + 4 of a word are 16 bits apart, so
# both become halves at once: unpacking should not take longer than reading.
HEADER = """
constant uint MAGNITUDES = 0x0e000e00u;
constant uint SIGNS = 0x80008000u;

inline float power(uint8_t s) {
  return as_type<float>(s == 0 ? 0x400000u : uint(s) << 23);
}

inline float pair_product(uint halves, float x, float y, float sum) {
  half2 values = as_type<half2>(halves);
  return metal::fma(float(values.y), y, metal::fma(float(values.x), x, sum));
}

inline float block_product(uint4 words, const thread float* x) {
  float sum = 0.0f;
  for (int i = 0; i < 4; i++) {
    uint word = words[i];
    const thread float* v = x + 8 * i;
    sum = pair_product(((word << 9) & MAGNITUDES) | ((word << 12) & SIGNS), v[0], v[4], sum);
    sum = pair_product(((word << 5) & MAGNITUDES) | ((word << 8) & SIGNS), v[1], v[5], sum);
    sum = pair_product(((word << 1) & MAGNITUDES) | ((word << 4) & SIGNS), v[2], v[6], sum);
    sum = pair_product(((word >> 3) & MAGNITUDES) | (word & SIGNS), v[3], v[7], sum);
  }
  return sum * 16384.0f;
}
"""


def fits(rows: mx.array, weight: mx.array, scales: mx.array) -> bool:
    """Whether rows [.., inputs] and an expert stack [E, outputs, inputs] in MXFP4 go together."""
    return bool(
        weight.size >= DEVICE_SIZE
        and weight.dtype == mx.uint32
        and scales.dtype == mx.uint8
        and rows.shape[-1] % BLOCK == 0
        and tuple(weight.shape) == (*scales.shape[:2], rows.shape[-1] // 8)
        and scales.shape[2] == rows.shape[-1] // BLOCK
    )


def stack(weight: mx.array, scales: mx.array) -> Matrix:
    """The same arrays to MLX's operations."""
    return Matrix(weight, scales, None, MXFP4)
