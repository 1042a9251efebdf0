"""The KV caches of a layer: slabs that rewind.

Full layers keep every key in a slab that grows in steps and is trimmed by moving a length. Sliding layers
keep the last window and some slack in a slab that is compacted when it is full, so that a short rewind is
free.

Shapes: H KV heads, D channels a head, t new tokens, n keys; arrays are [1, H, n, D] with rotated keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_gptoss.device import on_metal
from mlx_gptoss.model.config import ModelConfig

Mask = mx.array | str | None
KVBits = tuple[int | None, int | None]

# Full layers' slabs grow by doubling between these two numbers of tokens: few copies, bounded waste.
GROW_MIN = 256
GROW_MAX = 4096
# Sliding layers: history kept beyond the window at a compaction, and room until the next one.
SLACK = 64
SPARE = 256
# Metal's attention for up to 8 queries takes 32 rows: queries times the query heads of a KV head. Above that
# and below 9 queries MLX would write it out in matrix products, so it is split.
VECTOR_QUERIES, VECTOR_ROWS = 8, 32


def in_steps(tokens: int) -> int:
    """The room of a full layer's slab, tokens, that is made for so many."""
    return -(-tokens // GROW_MIN) * GROW_MIN


def grown(capacity: int, length: int, tokens: int) -> int:
    """That of a slab which holds `length` tokens once it holds `tokens`, if that is one step from now."""
    return capacity if tokens <= capacity else in_steps(tokens + min(max(length, GROW_MIN), GROW_MAX))


def window_kept(reach: int) -> int:
    """Keys that a sliding layer keeps when its slab is full. reach: the earlier ones that a token sees."""
    return reach + SLACK


def window_room(reach: int, chunk: int = 1) -> int:
    """The room of its slab, tokens, where they come in chunks of `chunk`."""
    return window_kept(reach) + max(SPARE, chunk)


class LayerCache:
    """Keys and values of one layer, in slabs [1, H, capacity, D] with room for more tokens."""

    bits: KVBits = (None, None)  # in which keys and values are stored

    def __init__(self, slabs: list[mx.array]) -> None:
        self._slabs = slabs
        self.offset = 0  # the position of the next token

    @property
    def capacity(self) -> int:
        """Tokens that the slabs have room for."""
        return int(self._slabs[0].shape[2])

    @property
    def token_bytes(self) -> int:
        """Bytes that one stored token takes."""
        return sum(int(s.shape[1] * s.shape[3] * s.itemsize) for s in self._slabs)

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Append t tokens [1, H, t, D]; the keys and values that any of them sees."""
        raise NotImplementedError

    def update_and_fetch_stored(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """`update_and_fetch` for those who read keys and values as they are stored."""
        return list(self.update_and_fetch(k, v))

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, sinks: mx.array, mask: Mask
    ) -> mx.array:
        """Append k, v [1, H, t, D] and attend, with sinks: q [1, Hq, t, D] -> [1, Hq, t, D]."""
        keys, values = self.update_and_fetch(k, v)
        most, t = VECTOR_ROWS * k.shape[1] // q.shape[1], q.shape[2]
        if not 0 < most < t <= VECTOR_QUERIES or not on_metal():
            return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask, sinks=sinks)
        outputs, n = [], keys.shape[2]
        for start in range(0, t, most):
            end = min(start + most, t)
            seen = n - (t - end)  # the last of these rows sees no key beyond
            outputs.append(
                mx.fast.scaled_dot_product_attention(
                    q[:, :, start:end],
                    keys[:, :, :seen],
                    values[:, :, :seen],
                    scale=scale,
                    mask=mask[start:end, :seen] if isinstance(mask, mx.array) else mask,
                    sinks=sinks,
                )
            )
        return mx.concatenate(outputs, axis=2)

    def arrays(self) -> list[mx.array]:
        return list(self._slabs)


class FullCache(LayerCache):
    """Keys and values of one full-attention layer.

    `length` tokens are stored. While a replay runs (offset < length) stored tokens are read and never
    written again.
    """

    def __init__(self, config: ModelConfig, dtype: mx.Dtype) -> None:
        empty = mx.zeros((1, config.num_kv_heads, 0, config.head_dim), dtype)
        super().__init__(self.encode(empty, empty))
        self.length = 0

    def encode(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """New keys and values as this cache stores them, each with tokens on axis 2."""
        return [k, v]

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Append t tokens; every key and value up to the last of them, [1, H, offset + t, D]."""
        start, end = self.offset, self.offset + k.shape[2]
        if start != self.length or end > self.capacity:
            self.append(k, v)
            keys, values = self._slabs
        else:  # as `append`, with fewer calls: decode does it for every sequence and layer
            keys, values = self._slabs
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            self.offset = self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def append(self, k: mx.array, v: mx.array) -> None:
        """Move the offset by t, storing those of the t tokens that are not stored yet."""
        end = self.offset + k.shape[2]
        if end > self.length:
            known = self.length - self.offset
            if known:
                k, v = k[:, :, known:], v[:, :, known:]
            self.write(self.encode(k, v))
        self.offset = end

    def write(self, parts: Sequence[mx.array]) -> None:
        """Store `parts` (as `encode` makes them) after the stored tokens."""
        end = self.length + parts[0].shape[2]
        self.reserve(self.capacity_for(end))
        for i, part in enumerate(parts):
            self._slabs[i][:, :, self.length : end] = part
        self.length = end

    def capacity_for(self, tokens: int) -> int:
        """The capacity the slab has once it holds `tokens` tokens, if it holds them one step from now."""
        return grown(self.capacity, self.length, tokens)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all."""
        tokens = in_steps(tokens)
        if tokens <= self.capacity:
            return
        for i, slab in enumerate(self._slabs):
            room = mx.zeros((*slab.shape[:2], tokens - self.length, slab.shape[3]), slab.dtype)
            self._slabs[i] = mx.concatenate([slab[:, :, : self.length], room], axis=2)

    @property
    def room(self) -> int:
        """Tokens that the slabs have room for or soon will."""
        return self.capacity

    def growth(self, t: int) -> int:
        """Tokens that `room` grows by when t more are appended."""
        return self.capacity_for(self.offset + t) - self.capacity

    def release(self) -> None:
        """Free the slabs; the cache must not be used afterwards."""
        self._slabs = [slab[:, :, :0] for slab in self._slabs]
        mx.eval(self._slabs)

    def seek(self, offset: int, length: int) -> None:
        """Keep `length` stored tokens and go on at position `offset`."""
        self.offset, self.length = offset, min(length, self.length)

    def parts(self, start: int, end: int) -> list[mx.array]:
        """The stored form of tokens [start, end): views into the slab."""
        return [slab[:, :, start:end] for slab in self._slabs]


class QuantizedFullCache(FullCache):
    """The same with keys and values, or one of them, in 4 or 8 bits (affine, groups along the channels).

    `bits` is (keys', values'), None for unquantised. Keys are the sensitive half.
    """

    def __init__(self, config: ModelConfig, dtype: mx.Dtype, bits: KVBits) -> None:
        self.bits = bits
        self._group = 64 if config.head_dim % 64 == 0 else 32
        super().__init__(config, dtype)

    def encode(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """Keys, then values: one dense array, or the words, scales and biases of a quantised one."""
        return [*self._quantize(k, self.bits[0]), *self._quantize(v, self.bits[1])]

    def _quantize(self, x: mx.array, bits: int | None) -> list[mx.array]:
        if bits is None:
            return [x]
        if x.shape[2] == 0:
            columns = (x.shape[3] * bits // 32, x.shape[3] // self._group, x.shape[3] // self._group)
            kinds = (mx.uint32, x.dtype, x.dtype)
            return [mx.zeros((*x.shape[:3], c), kind) for c, kind in zip(columns, kinds, strict=True)]
        return list(mx.quantize(x, group_size=self._group, bits=bits))

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Append t tokens; every key and value up to the last of them, unpacked, [1, H, offset + t, D]."""
        keys, values = self._split(self.update_and_fetch_stored(k, v))
        return self._dense(keys, self.bits[0]), self._dense(values, self.bits[1])

    def update_and_fetch_stored(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """Append t tokens; the parts of every key and value up to the last of them."""
        self.append(k, v)
        return self.parts(0, self.offset)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, sinks: mx.array, mask: Mask
    ) -> mx.array:
        """Append k, v [1, H, t, D] and attend: q [1, Hq, t, D] -> [1, Hq, t, D].

        One token works on the packed values: the sink is one more column of the softmax and is then dropped.
        For more tokens the scores would take more room than the unpacked keys of one layer do.
        """
        if q.shape[2] > 1:
            return super().attend(q, k, v, scale=scale, sinks=sinks, mask=mask)
        packed_keys, packed_values = self._split(self.update_and_fetch_stored(k, v))
        heads, kv_heads = q.shape[1], k.shape[1]
        shape = (1, kv_heads, heads // kv_heads, 1)
        grouped = (q * scale).reshape(*shape, q.shape[3])
        scores = self._product(grouped, packed_keys, self.bits[0], transpose=True)
        column = mx.broadcast_to(sinks.astype(scores.dtype).reshape(*shape, 1), (*shape, 1))
        weights = mx.softmax(mx.concatenate([scores, column], axis=-1), axis=-1, precise=True)[..., :-1]
        return self._product(weights, packed_values, self.bits[1], transpose=False).reshape(q.shape)

    def _split(self, parts: list[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
        of_keys = 1 if self.bits[0] is None else 3
        return parts[:of_keys], parts[of_keys:]

    def _dense(self, parts: list[mx.array], bits: int | None) -> mx.array:
        if bits is None:
            return parts[0]
        words, scales, biases = parts
        return mx.dequantize(words, scales, biases, group_size=self._group, bits=bits)

    def _product(self, x: mx.array, parts: list[mx.array], bits: int | None, transpose: bool) -> mx.array:
        """X [1, H, r, t, ..] times the stored [1, H, n, D] of each KV head, transposed or not."""
        wide = [p[:, :, None] for p in parts]
        if bits is None:
            return x @ (wide[0].swapaxes(-1, -2) if transpose else wide[0])
        words, scales, biases = wide
        return mx.quantized_matmul(
            x, words, scales, biases, transpose=transpose, group_size=self._group, bits=bits
        )


class SlidingCache(LayerCache):
    """Keys and values of one sliding layer: positions [start, offset), of which the last ones matter."""

    def __init__(self, config: ModelConfig, dtype: mx.Dtype) -> None:
        self._empty = mx.zeros((1, config.num_kv_heads, 0, config.head_dim), dtype)
        super().__init__([self._empty, self._empty])
        self._reach = config.sliding_window - 1
        self.start = 0

    @property
    def room(self) -> int:
        """Tokens that the slabs have room for or, at the size they run at, soon will."""
        return max(self.capacity, window_room(self._reach))

    def growth(self, t: int) -> int:
        """Tokens that `room` grows by when t more are appended."""
        return max(0, self.capacity_for(t) - self.room)

    def capacity_for(self, t: int) -> int:
        """The capacity once t more tokens are appended."""
        used = self.offset - self.start
        if used + t <= self.capacity:
            return self.capacity
        return max(min(used, window_kept(self._reach)) + t, window_room(self._reach))

    @property
    def history(self) -> int:
        """How many earlier keys the next token sees."""
        return min(self.offset - self.start, self._reach)

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Append t tokens; the keys and values that any of them sees, [1, H, history + t, D]."""
        used = self.offset - self.start
        first, end = self.offset - min(used, self._reach), used + k.shape[2]
        if end > self.capacity:
            self._compact(k, v)
        else:
            keys, values = self._slabs
            keys[:, :, used:end] = k
            values[:, :, used:end] = v
        self.offset += k.shape[2]
        return self.window(first, self.offset)

    def _compact(self, k: mx.array, v: mx.array) -> None:
        """New slabs of the recent history, the new tokens, and room for more."""
        used = self.offset - self.start
        keep = min(used, window_kept(self._reach))
        capacity = self.capacity_for(k.shape[2])
        room = mx.zeros((*k.shape[:2], capacity - keep - k.shape[2], k.shape[3]), k.dtype)
        self._slabs = [
            mx.concatenate([slab[:, :, used - keep : used], new, room], axis=2)
            for slab, new in zip(self._slabs, (k, v), strict=True)
        ]
        self.start = self.offset - keep

    def restart(self, start: int, *history: mx.array) -> None:
        """Forget everything and go on after the given keys and values, which begin at position `start`."""
        self.start = self.offset = start
        self._slabs = [self._empty, self._empty]
        if history:
            self.update_and_fetch(*history)

    def window(self, start: int, end: int) -> tuple[mx.array, mx.array]:
        """Keys and values of positions [start, end): views into the slabs."""
        keys, values = self._slabs
        start, end = start - self.start, end - self.start
        return keys[:, :, start:end], values[:, :, start:end]
