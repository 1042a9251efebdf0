"""The second half of the experts for few rows: down, bias, routing weights and residual in one kernel.

A simdgroup makes two outputs of a row from all of its experts, so nothing is added up between simdgroups and
the experts' outputs are never written.

Shapes: T rows, k experts a row, E experts, F inputs, D outputs.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from mlx_gptoss.model.batch import Pairs
from mlx_gptoss.model.kernels import mxfp4
from mlx_gptoss.model.kernels.kernel import FLOATS, Kernel, Launch, Program

OUTPUTS = 2  # of a simdgroup
SIMDGROUPS = 4  # of a threadgroup
MAX_ROWS = 4  # as in gate_up.py

BODY = """
  constexpr int BLOCKS = K / 32;
  uint lane = thread_index_in_simdgroup;
  uint first = thread_position_in_grid.y * OUTPUTS;
  uint token = thread_position_in_grid.z;
  const device uint4* blocks = reinterpret_cast<const device uint4*>(weight);
  float sums[OUTPUTS];
  for (uint r = 0; r < OUTPUTS; r++) {
    sums[r] = 0.0f;
  }
  for (uint pair = token * TOP; pair < (token + 1) * TOP; pair++) {
    size_t expert = chosen[pair];
    const device T* row = h + size_t(pair) * K;
    float own[OUTPUTS];
    for (uint r = 0; r < OUTPUTS; r++) {
      own[r] = lane == 0 && first + r < D ? float(bias[expert * WIDTH + WIDTH - D + first + r]) : 0.0f;
    }
    for (uint b = lane; b < BLOCKS; b += 32) {
      float inputs[32];
      for (int i = 0; i < 32; i++) {
        inputs[i] = float(row[32 * b + i]);
      }
      for (uint r = 0; r < OUTPUTS; r++) {
        if (first + r < D) {
          size_t at = (expert * D + first + r) * BLOCKS + b;
          own[r] = metal::fma(power(scales[at]), block_product(blocks[at], inputs), own[r]);
        }
      }
    }
    for (uint r = 0; r < OUTPUTS; r++) {
      sums[r] = metal::fma(float(weights[pair]), own[r], sums[r]);
    }
  }
  for (uint r = 0; r < OUTPUTS; r++) {
    float sum = simd_sum(sums[r]);
    size_t at = size_t(token) * D + first + r;
    if (lane == 0 && first + r < D) {
      out[at] = T(float(x[at]) + sum);
    }
  }
"""
PROGRAM = Program(
    "down", ("h", "weight", "scales", "bias", "chosen", "weights", "x"), ("out",), BODY, mxfp4.HEADER
)


@cache
def down() -> Kernel:
    """H [T, k, F], weight [E, D, F / 8], scales, bias [E, .. + D], chosen and weights [T, k], x [T, D]
    -> (x plus the experts' weighted sum [T, D],); the weights in MXFP4.
    """
    return Kernel("down", (PROGRAM,), _accepts, _launch, _reference)


def _launch(
    h: mx.array,
    weight: mx.array,
    scales: mx.array,
    bias: mx.array,
    chosen: mx.array,
    weights: mx.array,
    x: mx.array,
) -> tuple[mx.array, ...]:
    outputs = weight.shape[1]
    template = (
        ("T", x.dtype),
        ("K", h.shape[2]),
        ("D", outputs),
        ("WIDTH", bias.shape[1]),
        ("TOP", chosen.shape[1]),
        ("OUTPUTS", OUTPUTS),
    )
    how = Launch(
        grid=(32, -(-outputs // OUTPUTS), len(x)),
        threadgroup=(32, SIMDGROUPS, 1),
        outputs=((tuple(x.shape), x.dtype),),
        template=template,
    )
    return tuple(PROGRAM(h, weight, scales, bias, chosen, weights, x, launch=how))


def _reference(
    h: mx.array,
    weight: mx.array,
    scales: mx.array,
    bias: mx.array,
    chosen: mx.array,
    weights: mx.array,
    x: mx.array,
) -> tuple[mx.array, ...]:
    rows = h.reshape(chosen.size, 1, -1)
    y = mxfp4.stack(weight, scales).gather(rows, chosen, Pairs(len(chosen), chosen.shape[1]).pair).squeeze(-2)
    y = y + bias[chosen][..., -weight.shape[1] :]
    return (mx.addmm(x[:, None], weights[:, None], y).squeeze(1),)


def _accepts(
    h: mx.array,
    weight: mx.array,
    scales: mx.array,
    bias: mx.array,
    chosen: mx.array,
    weights: mx.array,
    x: mx.array,
) -> bool:
    return bool(
        h.ndim == 3
        and 0 < len(x) <= MAX_ROWS
        and tuple(h.shape[:2]) == tuple(chosen.shape) == tuple(weights.shape)
        and tuple(x.shape) == (len(chosen), weight.shape[1])
        and h.dtype in FLOATS
        and h.dtype == bias.dtype == weights.dtype == x.dtype
        and chosen.dtype == mx.uint32
        and bias.shape[1] >= weight.shape[1]
        and mxfp4.fits(h, weight, scales)
    )
