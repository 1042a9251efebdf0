"""KV caches that rewind: one SequenceCache holds the timeline of one sequence, in the caches of its layers.

A short rewind moves lengths. A longer one starts from a WindowState (a copy of one window of every sliding
layer) or, with none at hand, replays at most (window - 1) x (number of sliding layers) tokens while the full
layers only read.

Shapes: H KV heads, D channels a head, t new tokens, n keys; arrays are [1, H, n, D] with rotated keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_gptoss.model.cache import (
    FullCache,
    KVBits,
    Mask,
    QuantizedFullCache,
    SlidingCache,
    window_kept,
    window_room,
)
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig


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
        return tokens * full + window_room(self._reach, chunk) * sliding

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
        start = max(state.start, end - window_kept(self._reach))
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

    def fits(self, tokens: int, parts: Sequence[mx.array], states: Iterable[WindowState]) -> bool:
        """Whether exported parts of so many tokens, and window states, are of caches of this kind."""
        (wanted,) = self.export([(0, 0)])
        same = [(w.dtype, (*w.shape[:2], tokens, w.shape[3])) for w in wanted]
        return same == [(p.dtype, p.shape) for p in parts] and all(map(self.takes, states))

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
