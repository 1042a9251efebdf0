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
# small then, which one multiplication a block makes good.
HEADER = """
inline float power(uint8_t s) {
  return as_type<float>(s == 0 ? 0x400000u : uint(s) << 23);
}

inline float value(uint code) {
  return float(as_type<half>(ushort(((code & 8u) << 12) | ((code & 7u) << 9))));
}

inline float block_product(uint4 words, const thread float* x) {
  float sum = 0.0f;
  for (int i = 0; i < 4; i++) {
    uint word = words[i];
    for (int j = 0; j < 8; j++) {
      sum = metal::fma(value(word & 15u), x[8 * i + j], sum);
      word >>= 4;
    }
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
