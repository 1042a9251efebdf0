"""The first half of the experts for few rows: gate_up, bias and clamped SwiGLU in one kernel.

MLX's gathering product writes gate and up, 2 F values a pair, which another kernel then reads; and its fast
form wants inputs that are a multiple of 512, which gpt-oss's 2880 is not. Here a simdgroup makes two outputs
from their four rows, and all that is asked of the inputs is to be whole blocks.

Shapes: T rows of x, k experts a row, E experts, D inputs, F outputs.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from mlx_gptoss.model.batch import Pairs
from mlx_gptoss.model.experts import swiglu
from mlx_gptoss.model.kernels import mxfp4
from mlx_gptoss.model.kernels.kernel import FLOATS, Kernel, Launch, Program

OUTPUTS = 2  # of a simdgroup
SIMDGROUPS = 4  # of a threadgroup
# More rows read experts more often than MLX's kernels for many rows do.
MAX_ROWS = 4

BODY = """
  constexpr int BLOCKS = K / 32;
  uint lane = thread_index_in_simdgroup;
  uint first = thread_position_in_grid.y * OUTPUTS;
  uint pair = thread_position_in_grid.z;
  size_t expert = chosen[pair];
  const device T* row = x + size_t(pair / TOP) * K;
  const device uint4* blocks = reinterpret_cast<const device uint4*>(weight);
  float gate[OUTPUTS];
  float up[OUTPUTS];
  for (uint r = 0; r < OUTPUTS; r++) {
    gate[r] = 0.0f;
    up[r] = 0.0f;
  }
  for (uint b = lane; b < BLOCKS; b += 32) {
    float inputs[32];
    for (int i = 0; i < 32; i++) {
      inputs[i] = float(row[32 * b + i]);
    }
    for (uint r = 0; r < OUTPUTS; r++) {
      uint f = first + r;
      if (f < F) {
        size_t g = (expert * 2 * F + GATE(f)) * BLOCKS + b;
        size_t u = (expert * 2 * F + UP(f)) * BLOCKS + b;
        gate[r] = metal::fma(power(scales[g]), block_product(blocks[g], inputs), gate[r]);
        up[r] = metal::fma(power(scales[u]), block_product(blocks[u], inputs), up[r]);
      }
    }
  }
  for (uint r = 0; r < OUTPUTS; r++) {
    float g = simd_sum(gate[r]);
    float u = simd_sum(up[r]);
    uint f = first + r;
    if (lane == 0 && f < F) {
      g += float(bias[expert * WIDTH + GATE(f)]);
      u += float(bias[expert * WIDTH + UP(f)]);
      // Not min and max, which in Metal drop a NaN.
      g = g > LIMIT ? LIMIT : g;
      u = u > LIMIT ? LIMIT : (u < -LIMIT ? -LIMIT : u);
      out[pair * F + f] = T(g / (1.0f + metal::exp(-ALPHA * g)) * (u + 1.0f));
    }
  }
"""


@cache
def gate_up(*, limit: float, alpha: float, interleaved: bool) -> Kernel:
    """X [T, D], weight [E, 2F, D / 8], scales, bias [E, 2F + ..], chosen [T, k] -> (h [T, k, F],).

    The numbers and the order of the rows as in experts.ExpertWeights; weights in MXFP4.
    """
    gate, up = ("2u * (f)", "2u * (f) + 1u") if interleaved else ("(f)", "F + (f)")
    header = (
        f"#define GATE(f) ({gate})\n#define UP(f) ({up})\n"
        f"constant float LIMIT = {limit!r}f;\nconstant float ALPHA = {alpha!r}f;\n" + mxfp4.HEADER
    )
    program = Program("gate_up", ("x", "weight", "scales", "bias", "chosen"), ("out",), BODY, header)

    def launch(
        x: mx.array, weight: mx.array, scales: mx.array, bias: mx.array, chosen: mx.array
    ) -> tuple[mx.array, ...]:
        outputs, k = weight.shape[1] // 2, chosen.shape[1]
        template = (
            ("T", x.dtype),
            ("K", x.shape[1]),
            ("F", outputs),
            ("WIDTH", bias.shape[1]),
            ("TOP", k),
            ("OUTPUTS", OUTPUTS),
        )
        how = Launch(
            grid=(32, -(-outputs // OUTPUTS), chosen.size),
            threadgroup=(32, SIMDGROUPS, 1),
            outputs=(((*chosen.shape, outputs), x.dtype),),
            template=template,
        )
        return tuple(program(x, weight, scales, bias, chosen, launch=how))

    def reference(
        x: mx.array, weight: mx.array, scales: mx.array, bias: mx.array, chosen: mx.array
    ) -> tuple[mx.array, ...]:
        pairs = Pairs(len(chosen), chosen.shape[1])
        h = mxfp4.stack(weight, scales).gather(x[:, None], chosen, pairs.token_of_pair).squeeze(-2)
        own = bias[chosen][..., : weight.shape[1]]
        return (swiglu(h, own, interleaved=interleaved, limit=limit, alpha=alpha),)

    return Kernel("gate_up", (program,), _accepts, launch, reference)


def _accepts(x: mx.array, weight: mx.array, scales: mx.array, bias: mx.array, chosen: mx.array) -> bool:
    return bool(
        x.ndim == 2
        and 0 < len(x) == len(chosen) <= MAX_ROWS
        and x.dtype in FLOATS
        and bias.dtype == x.dtype
        and chosen.dtype == mx.uint32
        and weight.shape[1] % 2 == 0
        and bias.shape[1] >= weight.shape[1]
        and mxfp4.fits(x, weight, scales)
    )
