"""KV caches that rewind: one SequenceCache holds the timeline of one sequence.

Full layers keep every key in a slab that grows in steps and is trimmed by moving a length. Sliding layers
keep the last window and some slack in a slab that is compacted when it is full, so that a short rewind is
free. A longer one starts from a WindowState (a copy of one window of every sliding layer) or, with none at
hand, replays at most (window - 1) x (number of sliding layers) tokens while the full layers only read.

Shapes: H KV heads, D channels a head, t new tokens, n keys; arrays are [1, H, n, D] with rotated keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_gptoss.device import on_metal
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig

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
        return max(self.capacity, self._reach + SLACK + SPARE)

    def growth(self, t: int) -> int:
        """Tokens that `room` grows by when t more are appended."""
        return max(0, self.capacity_for(t) - self.room)

    def capacity_for(self, t: int) -> int:
        """The capacity once t more tokens are appended."""
        used = self.offset - self.start
        if used + t <= self.capacity:
            return self.capacity
        return max(min(used, self._reach + SLACK) + t, self._reach + SLACK + SPARE)

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
        keep = min(used, self._reach + SLACK)
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


class KVSpan(list[mx.array]):
    """The full layers' KV of a run of tokens, apart from any cache: layer after layer its stored parts (keys,
    values; more when quantised), [1, H, n, D].
    """

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in self)

    def cut(self, start: int, end: int, *, compact: bool = False) -> KVSpan:
        """Its tokens [start, end): views into its arrays, or copies that do not keep those alive."""
        if not compact and self and (start, end) == (0, self[0].shape[2]):
            return KVSpan(self)
        parts = [part[:, :, start:end] for part in self]
        return KVSpan(map(mx.contiguous, parts) if compact else parts)

    def whole(self) -> list[mx.array]:
        """The parts of every full layer of the model, wherever they are: for a file."""
        return list(self)


@dataclass(frozen=True)
class WindowState:
    """A copy of the sliding layers' keys and values of positions [start, end).

    `data` is [2 x sliding layers, H, end - start, D] (keys and values of a layer side by side), one compact
    array that pins nothing else. None for a model without sliding layers.
    """

    start: int
    end: int
    data: mx.array | None

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else int(self.data.nbytes)

    def resume_point(self, position: int, reach: int) -> int | None:
        """The last place at or before `position` where a sequence can go on from here, or None."""
        at = min(position, self.end)
        return at if self.start <= max(0, at - reach) else None

    def whole(self) -> WindowState:
        """With the windows of every sliding layer of the model, wherever they are: for a file."""
        return self


@dataclass(frozen=True)
class WayBack:
    """How caches go back to `position`: tokens are fed again from `at` on.

    kept: the sliding slabs still hold the window before `position`. Else they start from `state`, or with
    none from nothing, to be filled by a replay.
    """

    position: int
    at: int
    kept: bool = False
    state: WindowState | None = None


class SequenceCache:
    """The caches of every layer of one sequence, moved together.

    `offset` is the position of the next token to compute; `length` >= offset counts the tokens whose
    full-attention KV is stored. They differ only while a rewind is being replayed. `kv_bits` quantises the
    full layers' keys and values; the sliding layers' are small and stay as they are. adapter: the number of
    the adapter that they are computed with, 0 for none (see low_rank.py). layers: those of the model's layers
    that these caches are for, where the others are elsewhere.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: mx.Dtype,
        kv_bits: KVBits = (None, None),
        adapter: int = 0,
        layers: range | None = None,
    ) -> None:
        self.adapter = adapter
        self._reach = config.sliding_window - 1
        kinds = config.layer_types
        # Layer by layer a sliding window settles one reach later than the one below it, wherever that is.
        self._replay = self._reach * kinds.count(SLIDING)

        def made(kind: str) -> FullCache | SlidingCache:
            if kind == SLIDING:
                return SlidingCache(config, dtype)
            dense = kv_bits == (None, None) or not config.num_kv_heads
            return FullCache(config, dtype) if dense else QuantizedFullCache(config, dtype, kv_bits)

        self.layers = [
            made(kind) for kind in (kinds if layers is None else kinds[layers.start : layers.stop])
        ]
        self.full = [layer for layer in self.layers if isinstance(layer, FullCache)]
        self.sliding = [layer for layer in self.layers if isinstance(layer, SlidingCache)]
        self.offset = 0
        self.length = 0
        # Sliding keys before this position came out of a replay that had not settled yet.
        self._exact_from = 0

    @property
    def window_history(self) -> int:
        """Keys that a full sliding window holds beside the current token."""
        return self._reach

    @property
    def committed(self) -> int:
        """Bytes these caches take, the sliding slabs counted at the size they run at."""
        return sum(layer.room * layer.token_bytes for layer in self.layers)

    def growth(self, t: int) -> int:
        """Bytes that `committed` grows by when t tokens are appended."""
        return sum(layer.growth(t) * layer.token_bytes for layer in self.layers)

    def nbytes_at(self, tokens: int, chunk: int = 1) -> int:
        """Bytes of these caches when they hold `tokens` tokens that came in chunks of `chunk`."""
        full = sum(x.token_bytes for x in self.full)
        sliding = sum(x.token_bytes for x in self.sliding)
        return tokens * full + (self._reach + SLACK + max(SPARE, chunk)) * sliding

    def arrays(self) -> list[mx.array]:
        """Every array the caches hold: what to evaluate after a forward without logits."""
        return [a for layer in self.layers for a in layer.arrays()]

    def masks(self, t: int, ahead: int = 0) -> dict[str, Mask]:
        """The attention masks of t tokens, one for each kind of layer; call before the forward.

        They come after `ahead` tokens more than there are now.

        None: every returned key is visible; "causal": aligned at the last key; else bool [t, keys].
        """
        if t == 1:
            return {FULL: None, SLIDING: None}
        window: Mask = "causal"
        seen = min(self.sliding[0].history + ahead, self._reach) if self.sliding else 0
        if seen + t > self._reach + 1:
            query = mx.arange(seen, seen + t)[:, None]
            key = mx.arange(seen + t)[None]
            window = (key <= query) & (key >= query - self._reach)
        return {FULL: "causal", SLIDING: window}

    def advance(self, t: int) -> None:
        """The t tokens that every layer has just taken are part of the sequence now."""
        self.offset += t
        self.length = max(self.length, self.offset)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, so that no slab has to grow on the way there."""
        for layer in self.full:
            layer.reserve(tokens)

    def rewind(self, position: int, states: Iterable[WindowState] = ()) -> int:
        """Go back to `position` tokens; the position from which tokens must be fed again, <= position.

        Free when the sliding slabs still hold the window before `position`; else from the best of `states`;
        else by a replay of at most (window - 1) x (sliding layers) tokens. Feeding tokens [result:] makes
        everything from `position` on exactly what a fresh computation gives. Raises ValueError when
        `position` is not within the sequence.
        """
        way = self.way_back(position, states)
        self.go_back(way)
        return way.at

    def way_back(self, position: int, states: Iterable[WindowState] = ()) -> WayBack:
        """What `rewind` would do; nothing moves."""
        if not 0 <= position <= self.length:
            raise ValueError(f"position is {position}: expected 0 to {self.length}")
        oldest = max(self.sliding[0].start, self._exact_from) if self.sliding else 0
        if position <= self.offset and oldest <= max(0, position - self._reach):
            return WayBack(position, position, kept=True)
        points = [(at, s) for s in states if (at := s.resume_point(position, self._reach)) is not None]
        best, state = max(points, key=lambda p: p[0], default=(-1, None))
        replay = max(0, position - self._replay)
        return WayBack(position, best, state=state) if best >= replay else WayBack(position, replay)

    def go_back(self, way: WayBack) -> None:
        """Do what was decided, here or by other caches of the same sequence."""
        if way.state is not None:
            self._restore(way.state, way.at)
            self._exact_from = way.state.start
        elif not way.kept:
            for layer in self.sliding:
                layer.restart(way.at)
            self._exact_from = max(0, way.position - self._reach) if way.at else 0
        self._seek(way.at, way.position)

    def _seek(self, offset: int, length: int) -> None:
        for full in self.full:
            full.seek(offset, length)
        for sliding in self.sliding:
            sliding.offset = offset
        self.offset, self.length = offset, length

    def _restore(self, state: WindowState, end: int) -> None:
        if state.data is None:
            for layer in self.sliding:
                layer.restart(end)
            return
        start = max(state.start, end - self._reach - SLACK)
        for i, layer in enumerate(self.sliding):
            pair = state.data[2 * i : 2 * i + 2, :, start - state.start : end - state.start]
            layer.restart(start, pair[:1], pair[1:])

    def snapshot(self, end: int | None = None, history: int | None = None) -> WindowState | None:
        """A copy of the sliding layers' window that ends before position `end` (default: the offset).

        `history` keys are copied (default: window - 1; more, as far as the slabs hold them, lets a sequence
        resume earlier as well). None when the slabs no longer hold a whole, exact window before `end`.
        """
        end = self.offset if end is None else end
        if not self.sliding:
            return WindowState(0, end, None)
        oldest = max(self.sliding[0].start, self._exact_from)
        needed = max(0, end - self._reach)
        if end > self.offset or oldest > needed:
            return None
        return self.copy_window(max(oldest, min(needed, end - (history or 0))), end)

    def copy_window(self, start: int, end: int) -> WindowState:
        """A copy of the sliding layers' keys and values of positions [start, end), which the slabs hold."""
        if start == end:
            return WindowState(0, 0, None)
        pieces = [a for layer in self.sliding for a in layer.window(start, end)]
        return WindowState(start, end, mx.concatenate(pieces, axis=0) if pieces else None)

    def takes(self, state: WindowState) -> bool:
        """Whether a state's shape and dtype are those of these caches."""
        if state.data is None or not self.sliding:
            return state.data is None and not self.sliding
        keys = self.sliding[0].arrays()[0]
        shape = (2 * len(self.sliding), keys.shape[1], state.end - state.start, keys.shape[3])
        return 0 <= state.start < state.end and (state.data.dtype, state.data.shape) == (keys.dtype, shape)

    def export(self, ranges: Sequence[tuple[int, int]], *, release: bool = False) -> list[KVSpan]:
        """Compact copies of the full layers' KV of the token ranges [start, end), for `load`.

        `release` frees each layer's slab once it is copied: the caches end there, and
        there is never a second copy of more than one layer.
        """
        spans = [KVSpan() for _ in ranges]
        for layer in self.full:
            copies = [[mx.contiguous(part) for part in layer.parts(start, end)] for start, end in ranges]
            mx.eval(copies)
            for span, parts in zip(spans, copies, strict=True):
                span.extend(parts)
            if release:
                layer.release()
        return spans

    def load(self, spans: Sequence[list[mx.array]], states: Iterable[WindowState] = ()) -> int:
        """Fill an empty cache with exported spans, in order; the position from which to feed tokens.

        The lists are emptied layer by layer, so what nobody else holds is freed on the way. `states` as in
        `rewind`.
        """
        total = sum(int(span[0].shape[2]) for span in spans) if self.full else 0
        self.fill(spans, total)
        return self.rewind(total, states)

    def fill(self, spans: Sequence[list[mx.array]], total: int) -> None:
        """`load` without the going back: `total` tokens are stored, and no window is known."""
        self.reserve(total)
        for layer in self.full:
            count = len(layer.arrays())
            for span in spans:
                layer.write(span[:count])
                del span[:count]
            mx.eval(layer.arrays())
        self.length = total
        # Nothing is known of the sliding layers yet.
        for sliding in self.sliding:
            sliding.start = sliding.offset = total
        self.offset = total
