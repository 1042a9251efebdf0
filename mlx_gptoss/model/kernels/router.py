"""From the residual stream to a row's experts: RMSNorm, scores, the best k and their softmax in one kernel.

MLX takes five for it, for a product of 32 or 128 outputs and a sort of as many numbers. Here a threadgroup
serves a row: the matrix, 184 kB for 20b and 737 kB for 120b in bfloat16, is read by one core of the GPU.

Shapes: T rows, D hidden, E experts, k experts a row.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from mlx_gptoss.model.kernels.kernel import DEVICE_SIZE, FLOATS, Kernel, Launch, Program

SIMDGROUPS = 16
MAX_ROWS = 4
MAX_EXPERTS = 256
MAX_HIDDEN = 4096

BODY = """
  threadgroup T normed[D];
  threadgroup float partial[SIMDGROUPS];
  threadgroup float scores[E];
  uint lane = thread_index_in_simdgroup;
  uint group = simdgroup_index_in_threadgroup;
  uint index = thread_index_in_threadgroup;
  uint token = threadgroup_position_in_grid.y;
  const device T* row = x + size_t(token) * D;

  float squares = 0.0f;
  for (uint i = index; i < D; i += 32 * SIMDGROUPS) {
    float v = float(row[i]);
    squares = metal::fma(v, v, squares);
  }
  squares = simd_sum(squares);
  if (lane == 0) {
    partial[group] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = simd_sum(lane < SIMDGROUPS ? partial[lane] : 0.0f);
  float factor = metal::precise::rsqrt(total / float(D) + EPS);
  for (uint i = index; i < D; i += 32 * SIMDGROUPS) {
    T v = T(float(row[i]) * factor * float(norm[i]));
    normed[i] = v;
    rows[size_t(token) * D + i] = v;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // A simdgroup takes all of its experts at once: that many loads are under way together.
  constexpr uint OWN = (E + SIMDGROUPS - 1) / SIMDGROUPS;
  float sums[OWN];
  for (uint own = 0; own < OWN; own++) {
    sums[own] = 0.0f;
  }
  for (uint i = 4 * lane; i < D; i += 128) {
    float values[4];
    for (uint j = 0; j < 4; j++) {
      values[j] = float(normed[i + j]);
    }
    for (uint own = 0; own < OWN; own++) {
      uint e = SIMDGROUPS * own + group;
      for (uint j = 0; j < 4 && e < E; j++) {
        sums[own] = metal::fma(float(weight[e * D + i + j]), values[j], sums[own]);
      }
    }
  }
  for (uint own = 0; own < OWN; own++) {
    uint e = SIMDGROUPS * own + group;
    float score = simd_sum(sums[own]);
    if (lane == 0 && e < E) {
      scores[e] = score + float(bias[e]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // The first simdgroup takes the best expert k times; of equals the first. NaN is the best, as in a sort.
  if (group == 0) {
    constexpr uint NONE = 0xffffffffu;
    uint taken = 0;
    float best[TOP];
    uint experts[TOP];
    for (uint t = 0; t < TOP; t++) {
      float most = -INFINITY;
      uint at = NONE;
      for (uint j = 0; 32 * j + lane < E; j++) {
        float s = scores[32 * j + lane];
        float key = metal::isnan(s) ? INFINITY : s;
        if ((taken >> j & 1u) == 0 && (at == NONE || key > most)) {
          most = key;
          at = 32 * j + lane;
        }
      }
      float winner = simd_max(most);
      uint expert = simd_min(at != NONE && most == winner ? at : NONE);
      if (expert % 32 == lane) {
        taken |= 1u << (expert / 32);
      }
      experts[t] = expert;
      best[t] = scores[expert];
    }
    float sum = 0.0f;
    for (uint t = 0; t < TOP; t++) {
      sum += metal::exp(best[t] - best[0]);
    }
    for (uint t = 0; t < TOP; t++) {
      if (lane == t) {
        chosen[token * TOP + t] = experts[t];
        weights[token * TOP + t] = T(metal::exp(best[t] - best[0]) / sum);
      }
    }
  }
"""


@cache
def router(*, eps: float, k: int) -> Kernel:
    """X [T, D], norm [D], weight [E, D], bias [E] -> (rows [T, D], chosen uint32 [T, k], weights [T, k]).

    rows: x after RMSNorm, the experts' input. The chosen experts come in any order.
    """
    inputs, outputs = ("x", "norm", "weight", "bias"), ("rows", "chosen", "weights")
    program = Program("router", inputs, outputs, BODY, f"constant float EPS = {eps!r}f;\n")

    def launch(x: mx.array, norm: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, ...]:
        experts, hidden = weight.shape
        template = (("T", x.dtype), ("D", hidden), ("E", experts), ("TOP", k), ("SIMDGROUPS", SIMDGROUPS))
        how = Launch(
            grid=(32 * SIMDGROUPS, len(x), 1),
            threadgroup=(32 * SIMDGROUPS, 1, 1),
            outputs=((tuple(x.shape), x.dtype), ((len(x), k), mx.uint32), ((len(x), k), x.dtype)),
            template=template,
        )
        return tuple(program(x, norm, weight, bias, launch=how))

    def reference(x: mx.array, norm: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, ...]:
        rows = mx.fast.rms_norm(x, norm, eps)
        scores = mx.addmm(bias, rows, weight.T)
        chosen = mx.argpartition(scores, kth=-k, axis=-1)[:, -k:]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1, precise=True)
        return rows, chosen, weights

    def accepts(x: mx.array, norm: mx.array, weight: mx.array, bias: mx.array) -> bool:
        return bool(
            x.ndim == weight.ndim == 2
            and 0 < len(x) <= MAX_ROWS
            and x.dtype in FLOATS
            and x.dtype == norm.dtype == weight.dtype == bias.dtype
            and x.shape[1] == weight.shape[1] == norm.size <= MAX_HIDDEN
            and x.shape[1] % 4 == 0
            and x.shape[1] >= DEVICE_SIZE
            and k <= len(weight) == bias.size <= MAX_EXPERTS
            and k <= 32
        )

    return Kernel("router", (program,), accepts, launch, reference)
