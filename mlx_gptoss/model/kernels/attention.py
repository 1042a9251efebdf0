"""Attention of one to four queries, with sinks, over everything or over a window.

MLX's form that reads the keys and values of a KV head once for all of its query heads takes no sinks; the one
that does reads them once for each. Here a threadgroup serves a KV head and a stretch of the keys, a simdgroup
in it one query head: 32 keys at a time are brought into threadgroup memory, where each lane scores one of
them. Where there are several stretches, a second kernel joins what they found (Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax"). Keys and values in 8 or 4 bits are unpacked on their way there.

Shapes: t queries, Hq query heads, H KV heads, C channels, n keys. Arrays may be views: strides are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.kernels.kernel import FLOATS, Kernel, Launch, Program, Template

MAX_QUERIES = 4
MAX_GROUP = 16  # query heads a KV head, of which each is a simdgroup
MAX_SHARED = 32768  # bytes of threadgroup memory that every chip has
# Keys of a stretch, and the most stretches: enough threadgroups for the largest chips.
STRETCH_KEYS, MAX_STRETCHES = 256, 64

SCAN = """
  constexpr int PER = C / 32;
  constexpr int PAD = 4 / sizeof(TILE);
  threadgroup float asked[GROUP * QUERIES * C];
  threadgroup TILE key_tile[32 * (C + PAD)];
  threadgroup TILE value_tile[32 * C];
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
@LOAD@    threadgroup_barrier(mem_flags::mem_threadgroup);
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
# 32 rows of keys or values into their tile, past the last one zeros.
LOAD_DENSE = """
    for (int i = index; i < 32 * C; i += 32 * GROUP) {
      int row = i / C, c = i % C, at = first + row;
      TILE_[row * STEP_ + c] = at < end ? TILE(VALUE_) : TILE(0.0f);
    }
"""
# The same of words that hold PER_ values of BITS_ bits each, the lowest first; some of them share a factor.
LOAD_PACKED = """
    for (int i = index; i < 32 * C / PER_; i += 32 * GROUP) {
      int row = i / (C / PER_), w = i % (C / PER_), g = w * PER_ / SHARING_, at = first + row;
      uint word = at < end ? WORD_ : 0u;
      float factor = at < end ? float(FACTOR_) : 0.0f;
      float bias = at < end ? float(BIAS_) : 0.0f;
      for (int j = 0; j < PER_; j++) {
        TILE_[row * STEP_ + w * PER_ + j] = metal::fma(float(word & MASK_), factor, bias);
        word >>= BITS_;
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


@cache
def attention(*, scale: float, window: int, bits: KVBits = (None, None)) -> Kernel:
    """Q [1, Hq, t, C], keys and values [1, H, n, C], sinks [Hq] -> (what is attended to [1, Hq, t, C],).

    The queries are those of the last t keys, and each sees the `window` keys that end with its own; 0: all.
    bits: of the keys and of the values, None for arrays as they are. In place of a packed one stand three:
    words, scales and biases, as mx.quantize makes them.
    """
    parts = Parts(bits)
    text = SCAN.replace("@LOAD@", parts.load)
    header = f"constant float SCALE = {scale!r}f;\n" + parts.header
    inputs = ("q", *parts.names, "sinks")
    name = "attention" + "".join(f"_{b or 'dense'}" for b in bits if bits != (None, None))
    whole = Program(name, inputs, ("out",), text + WHOLE, header, contiguous=False)
    found = ("part", "mosts", "sums")
    some = Program(f"{name}_parts", inputs, found, text + PART, header, contiguous=False)
    join = Program("attention_join", found, ("out",), JOIN)

    @cache
    def launches(
        shape: tuple[int, ...], kv_heads: int, stretches: int, dtype: mx.Dtype, shared: tuple[int, ...]
    ) -> tuple[Launch, Launch]:
        """Of queries [1, Hq, t, C] over all keys at once or, in two steps, over several stretches of them."""
        _, heads, queries, channels = shape
        group, rows = heads // kv_heads, heads * queries
        template: Template = (
            ("T", dtype),
            ("C", channels),
            ("GROUP", group),
            ("QUERIES", queries),
            ("WINDOW", window),
            *((f"SHARING_OF_{name}", n) for name, n in zip("kv", shared, strict=True) if n),
        )
        of_parts = tuple(((rows, stretches, *n), mx.float32) for n in ((channels,), (), ()))
        out = ((shape, dtype),)
        grid, threadgroup = (32 * group * stretches, kv_heads, 1), (32 * group, 1, 1)
        first = Launch(grid, threadgroup, out if stretches == 1 else of_parts, template)
        return first, Launch((32, rows, 1), (32, 1, 1), out, (("T", dtype), ("C", channels)))

    def launch(q: mx.array, *stored: mx.array) -> tuple[mx.array, ...]:
        shape, (_, kv_heads, n, _) = tuple(q.shape), stored[0].shape
        stretches = stretches_of(n, window, shape[2])
        first, second = launches(shape, kv_heads, stretches, q.dtype, parts.shared(stored, shape[3]))
        if stretches == 1:
            return tuple(whole(q, *stored, launch=first))
        return tuple(join(*some(q, *stored, launch=first), launch=second))

    def reference(q: mx.array, *stored: mx.array) -> tuple[mx.array, ...]:
        k, v = parts.dense(stored[:-1], q.shape[3])
        queries, n = q.shape[2], k.shape[2]
        own = mx.arange(n - queries, n)[:, None]
        key = mx.arange(n)[None]
        mask = (key <= own) & (key > own - window) if window else key <= own
        return (mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=stored[-1]),)

    def accepts(q: mx.array, *stored: mx.array) -> bool:
        return len(stored) == len(parts.names) + 1 and _accepts(parts, q, stored[:-1], stored[-1])

    return Kernel(name, (whole, some, join), accepts, launch, reference)


class Parts:
    """How keys and values are stored, in the text and in arrays."""

    def __init__(self, bits: KVBits) -> None:
        self.bits = bits
        packed = [(n, f"{n}_scales", f"{n}_biases") for n in "kv"]
        self._named = [names if b else names[:1] for names, b in zip(packed, bits, strict=True)]
        self.names = [name for names in self._named for name in names]
        scales = [f"{n}_scales" for n in "kv"]
        self._scales = [self.names.index(n) if n in self.names else None for n in scales]
        self.header = f"#define TILE {'T' if bits == (None, None) else 'float'}\n"

    @property
    def load(self) -> str:
        """The text that fills both tiles."""
        k, v = self.bits
        return self._load("k", k, "key_tile", "(C + PAD)") + self._load("v", v, "value_tile", "C")

    @staticmethod
    def _load(name: str, bits: int | None, tile: str, step: str) -> str:
        def at(array: str, column: str) -> str:
            strides = f"{array}_strides"
            return f"{array}[kv_head * {strides}[1] + at * {strides}[2] + {column} * {strides}[3]]"

        words = {"TILE_": tile, "STEP_": step, "VALUE_": at(name, "c"), "SHARING_": f"SHARING_OF_{name}"}
        if bits:
            words |= {"PER_": str(32 // bits), "BITS_": str(bits), "MASK_": f"{(1 << bits) - 1}u"}
            words |= {"WORD_": at(name, "w"), "FACTOR_": at(f"{name}_scales", "g")}
            words |= {"BIAS_": at(f"{name}_biases", "g")}
        return re.sub(r"\b[A-Z]+_(?!\w)", lambda m: words[m[0]], LOAD_PACKED if bits else LOAD_DENSE)

    def _of(self, stored: Sequence[mx.array]) -> list[Sequence[mx.array]]:
        """Keys' arrays, values' arrays."""
        count = len(self._named[0])
        return [stored[:count], stored[count:]]

    def shared(self, stored: Sequence[mx.array], channels: int) -> tuple[int, ...]:
        """How many channels of keys and of values share a scale; 0 where there are none."""
        return tuple(0 if i is None else channels // stored[i].shape[3] for i in self._scales)

    def dense(self, stored: Sequence[mx.array], channels: int) -> list[mx.array]:
        """Keys and values."""
        found = []
        for bits, (first, *others) in zip(self.bits, self._of(stored), strict=True):
            if bits is not None:
                scales, biases = others
                group = channels // scales.shape[3]
                first = mx.dequantize(first, scales, biases, group_size=group, bits=bits)
            found.append(first)
        return found

    def fit(self, stored: Sequence[mx.array], dtype: mx.Dtype, shape: tuple[int, ...]) -> bool:
        """Whether they hold keys and values of this shape and dtype."""
        for b, (first, *others) in zip(self.bits, self._of(stored), strict=True):
            columns = shape[3] if b is None else shape[3] * b // 32
            if tuple(first.shape) != (*shape[:3], columns) or first.dtype != (
                dtype if b is None else mx.uint32
            ):
                return False
            if any(tuple(a.shape[:3]) != shape[:3] or a.dtype != dtype for a in others):
                return False
        return True


def shared_bytes(q: mx.array, kv_heads: int, tile_bytes: int) -> int:
    """Threadgroup memory: the queries of a KV head in float32, and 32 keys and values."""
    _, heads, queries, channels = q.shape
    asked = heads // kv_heads * queries * channels * 4
    return int(asked + 32 * (2 * channels * tile_bytes + 4))


def _accepts(parts: Parts, q: mx.array, stored: Sequence[mx.array], sinks: mx.array) -> bool:
    if not all(a.ndim == 4 for a in (q, *stored)):
        return False
    batch, heads, queries, channels = q.shape
    _, kv_heads, n, _ = stored[0].shape
    tile_bytes = q.itemsize if parts.bits == (None, None) else 4
    return bool(
        batch == 1
        and parts.fit(stored, q.dtype, (1, kv_heads, n, channels))
        and channels % 32 == 0
        and heads % kv_heads == 0
        and heads // kv_heads <= MAX_GROUP
        and shared_bytes(q, kv_heads, tile_bytes) <= MAX_SHARED
        and 0 < queries <= min(MAX_QUERIES, n)
        and q.dtype in FLOATS
        and q.dtype == sinks.dtype
        and sinks.size == heads
    )
