"""Attention of one to four queries, with sinks, over everything or over a window.

MLX's form that reads the keys and values of a KV head once for all of its query heads takes no sinks; the one
that does reads them once for each. Here a threadgroup serves a KV head and a stretch of the keys, a simdgroup
in it one query head: 32 keys at a time are brought into threadgroup memory, where each lane scores one of
them. Where there are several stretches, a second kernel joins what they found (Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax").

Shapes: t queries, Hq query heads, H KV heads, C channels, n keys. Arrays may be views: strides are read.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from mlx_gptoss.model.kernels.kernel import FLOATS, Kernel, Launch, Program

MAX_QUERIES = 4
MAX_GROUP = 16  # query heads a KV head, of which each is a simdgroup
MAX_SHARED = 32768  # bytes of threadgroup memory that every chip has
# Keys of a stretch, and the most stretches: enough threadgroups for the largest chips.
STRETCH_KEYS, MAX_STRETCHES = 256, 64

SCAN = """
  constexpr int PER = C / 32;
  constexpr int PAD = 4 / sizeof(T);
  threadgroup float asked[GROUP * QUERIES * C];
  threadgroup T key_tile[32 * (C + PAD)];
  threadgroup T value_tile[32 * C];
  int lane = int(thread_index_in_simdgroup);
  int member = int(simdgroup_index_in_threadgroup);
  int index = int(thread_index_in_threadgroup);
  int kv_head = int(threadgroup_position_in_grid.y);
  int head = kv_head * GROUP + member;
  int stretch = int(threadgroup_position_in_grid.x);
  int stretches = int(threadgroups_per_grid.x);
  int n = k_shape[2];
  int start = WINDOW > 0 ? metal::max(0, n - QUERIES + 1 - WINDOW) : 0;
  int tiles = (n - start + 31) / 32;
  int each = (tiles + stretches - 1) / stretches;
  int begin = start + 32 * each * stretch;
  int end = metal::min(n, begin + 32 * each);
  const device T* keys = k + size_t(kv_head) * size_t(k_strides[1]);
  const device T* values = v + size_t(kv_head) * size_t(v_strides[1]);
  int key_step = int(k_strides[2]), key_channel = int(k_strides[3]);
  int value_step = int(v_strides[2]), value_channel = int(v_strides[3]);

  for (int i = index; i < GROUP * QUERIES * C; i += 32 * GROUP) {
    int c = i % C, t = i / C % QUERIES, of = kv_head * GROUP + i / (C * QUERIES);
    asked[i] = SCALE * float(q[of * q_strides[1] + t * q_strides[2] + c * q_strides[3]]);
  }
  float most[QUERIES], sum[QUERIES], found[QUERIES][PER];
  for (int t = 0; t < QUERIES; t++) {
    // The sink is a key of its own without a value: the first stretch has it.
    most[t] = stretch == 0 ? float(sinks[head]) : metal::numeric_limits<float>::lowest();
    sum[t] = stretch == 0 ? 1.0f : 0.0f;
    for (int c = 0; c < PER; c++) {
      found[t][c] = 0.0f;
    }
  }
  for (int first = begin; first < end; first += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = index; i < 32 * C; i += 32 * GROUP) {
      int row = i / C, c = i % C, at = first + row;
      key_tile[row * (C + PAD) + c] = at < end ? keys[at * key_step + c * key_channel] : T(0.0f);
      value_tile[i] = at < end ? values[at * value_step + c * value_channel] : T(0.0f);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float score[QUERIES];
    for (int t = 0; t < QUERIES; t++) {
      score[t] = 0.0f;
    }
    for (int c = 0; c < C; c++) {
      float key = float(key_tile[lane * (C + PAD) + c]);
      for (int t = 0; t < QUERIES; t++) {
        score[t] = metal::fma(asked[(member * QUERIES + t) * C + c], key, score[t]);
      }
    }
    float weight[QUERIES];
    for (int t = 0; t < QUERIES; t++) {
      int at = first + lane, own = n - QUERIES + t;
      bool seen = at < end && at <= own && (WINDOW == 0 || at > own - WINDOW);
      float s = seen ? score[t] : -INFINITY;
      float now = metal::max(most[t], simd_max(s));
      float kept = metal::exp(most[t] - now);
      weight[t] = metal::exp(s - now);
      sum[t] = metal::fma(sum[t], kept, simd_sum(weight[t]));
      most[t] = now;
      for (int c = 0; c < PER; c++) {
        found[t][c] *= kept;
      }
    }
    for (int row = 0; row < 32; row++) {
      float value[PER];
      for (int c = 0; c < PER; c++) {
        value[c] = float(value_tile[row * C + 32 * c + lane]);
      }
      for (int t = 0; t < QUERIES; t++) {
        float w = simd_shuffle(weight[t], ushort(row));
        for (int c = 0; c < PER; c++) {
          found[t][c] = metal::fma(w, value[c], found[t][c]);
        }
      }
    }
  }
"""
WHOLE = """
  for (int t = 0; t < QUERIES; t++) {
    for (int c = 0; c < PER; c++) {
      out[(head * QUERIES + t) * C + 32 * c + lane] = T(found[t][c] / sum[t]);
    }
  }
"""
PART = """
  for (int t = 0; t < QUERIES; t++) {
    size_t at = size_t(head * QUERIES + t) * size_t(stretches) + size_t(stretch);
    for (int c = 0; c < PER; c++) {
      part[at * C + size_t(32 * c + lane)] = found[t][c];
    }
    if (lane == 0) {
      mosts[at] = most[t];
      sums[at] = sum[t];
    }
  }
"""
JOIN = """
  int lane = int(thread_index_in_simdgroup);
  size_t row = thread_position_in_grid.y;
  int stretches = part_shape[1];
  size_t own = row * size_t(stretches);
  float most = metal::numeric_limits<float>::lowest();
  for (int i = lane; i < stretches; i += 32) {
    most = metal::max(most, mosts[own + size_t(i)]);
  }
  most = simd_max(most);
  float sum = 0.0f;
  for (int i = lane; i < stretches; i += 32) {
    size_t at = own + size_t(i);
    sum = metal::fma(metal::exp(mosts[at] - most), sums[at], sum);
  }
  sum = simd_sum(sum);
  for (int c = lane; c < C; c += 32) {
    float found = 0.0f;
    for (int i = 0; i < stretches; i++) {
      size_t at = own + size_t(i);
      found = metal::fma(metal::exp(mosts[at] - most), part[at * C + size_t(c)], found);
    }
    out[row * C + size_t(c)] = T(found / sum);
  }
"""


def stretches_of(keys: int, window: int, queries: int) -> int:
    """Into how many stretches the keys that can be seen are cut."""
    seen = min(keys, window + queries - 1) if window else keys
    return min(MAX_STRETCHES, -(-seen // STRETCH_KEYS))


def shared_bytes(q: mx.array, k: mx.array) -> int:
    """Threadgroup memory: the queries of a KV head in float32, and 32 keys and values."""
    _, heads, queries, channels = q.shape
    asked = heads // k.shape[1] * queries * channels * 4
    return int(asked + 32 * (2 * channels * q.itemsize + 4))


@cache
def attention(*, scale: float, window: int) -> Kernel:
    """Q [1, Hq, t, C], keys and values [1, H, n, C], sinks [Hq] -> (what is attended to [1, Hq, t, C],).

    The queries are those of the last t keys, and each sees the `window` keys that end with its own; 0: all.
    """
    header = f"constant float SCALE = {scale!r}f;\n"
    inputs = ("q", "k", "v", "sinks")
    whole = Program("attention", inputs, ("out",), SCAN + WHOLE, header, contiguous=False)
    parts = Program(
        "attention_parts", inputs, ("part", "mosts", "sums"), SCAN + PART, header, contiguous=False
    )
    join = Program("attention_join", ("part", "mosts", "sums"), ("out",), JOIN)

    def launch(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array) -> tuple[mx.array, ...]:
        _, heads, queries, channels = q.shape
        _, kv_heads, n, _ = k.shape
        group = heads // kv_heads
        template = (
            ("T", q.dtype),
            ("C", channels),
            ("GROUP", group),
            ("QUERIES", queries),
            ("WINDOW", window),
        )
        stretches = stretches_of(n, window, queries)
        grid, threadgroup = (32 * group * stretches, kv_heads, 1), (32 * group, 1, 1)
        out = ((tuple(q.shape), q.dtype),)
        if stretches == 1:
            return tuple(whole(q, k, v, sinks, launch=Launch(grid, threadgroup, out, template)))
        rows = heads * queries
        results = (
            ((rows, stretches, channels), mx.float32),
            ((rows, stretches), mx.float32),
            ((rows, stretches), mx.float32),
        )
        found = parts(q, k, v, sinks, launch=Launch(grid, threadgroup, results, template))
        how = Launch((32, rows, 1), (32, 1, 1), out, (("T", q.dtype), ("C", channels)))
        return tuple(join(*found, launch=how))

    def reference(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array) -> tuple[mx.array, ...]:
        queries, n = q.shape[2], k.shape[2]
        own = mx.arange(n - queries, n)[:, None]
        key = mx.arange(n)[None]
        mask = (key <= own) & (key > own - window) if window else key <= own
        return (mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks),)

    return Kernel("attention", (whole, parts, join), _accepts, launch, reference)


def _accepts(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array) -> bool:
    if not q.ndim == k.ndim == v.ndim == 4:
        return False
    batch, heads, queries, channels = q.shape
    return bool(
        batch == k.shape[0] == 1
        and tuple(k.shape) == tuple(v.shape)
        and channels == k.shape[3]
        and channels % 32 == 0
        and heads % k.shape[1] == 0
        and heads // k.shape[1] <= MAX_GROUP
        and shared_bytes(q, k) <= MAX_SHARED
        and 0 < queries <= min(MAX_QUERIES, k.shape[2])
        and q.dtype in FLOATS
        and q.dtype == k.dtype == v.dtype == sinks.dtype
        and sinks.size == heads
    )
