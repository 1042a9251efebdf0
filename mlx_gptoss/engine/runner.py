"""What runs a forward: the few calls that the scheduler makes on a model and on a sequence's caches.

LocalRunner is a model in this process. A model whose layers lie on several machines is another ModelRunner:
its caches stand for those that the other machines hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

import mlx.core as mx

from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.cache import GROW_MIN, KVBits, SequenceCache, WindowState
from mlx_gptoss.model.graph import Model

Spans: TypeAlias = list[list[mx.array]]


class KVCache(Protocol):
    """The caches of one sequence; see SequenceCache for what the calls promise."""

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def committed(self) -> int: ...

    @property
    def window_history(self) -> int: ...

    def growth(self, t: int) -> int: ...

    def reserve(self, tokens: int) -> None: ...

    def rewind(self, position: int, states: Iterable[WindowState] = ()) -> int: ...

    def snapshot(self, end: int | None = None, history: int | None = None) -> WindowState | None: ...

    def export(self, ranges: Sequence[tuple[int, int]], *, release: bool = False) -> Spans: ...

    def load(self, spans: Sequence[list[mx.array]], states: Iterable[WindowState] = ()) -> int: ...

    def arrays(self) -> list[mx.array]: ...


class ModelRunner(Protocol):
    """A model to the engine. Used by the engine's thread only."""

    @property
    def vocab_size(self) -> int: ...

    def make_cache(self) -> KVCache:
        """Empty caches for one sequence."""
        ...

    def cache_bytes(self, tokens: int, chunk: int) -> int:
        """Bytes of one sequence's caches with room for `tokens` tokens that come in chunks of `chunk`."""
        ...

    def fits(self, tokens: int, parts: Sequence[mx.array], states: Iterable[WindowState]) -> bool:
        """Whether exported parts of so many tokens, and window states, are of this model's caches."""
        ...

    def forward(
        self, tokens: mx.array, shares: Sequence[tuple[int, KVCache]], rows: Sequence[int] | None = None
    ) -> mx.array | None:
        """Run the next tokens of each sequence, int32 [T] end to end, and move their caches.

        shares: how many of the tokens are each sequence's, and its caches. rows: those whose logits are
        wanted (None: all). Returns logits [R, vocab], None when R is 0; not evaluated yet.
        """
        ...


class LocalRunner:
    """A model in this process."""

    def __init__(self, model: Model, kv_bits: KVBits = (None, None)) -> None:
        self._model = model
        self._kv_bits = kv_bits
        self._empty = self.make_cache()

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    def make_cache(self) -> SequenceCache:
        return SequenceCache(self._model.config, self._model.dtype, self._kv_bits)

    def cache_bytes(self, tokens: int, chunk: int) -> int:
        return self._empty.nbytes_at(-(-tokens // GROW_MIN) * GROW_MIN, chunk)

    def fits(self, tokens: int, parts: Sequence[mx.array], states: Iterable[WindowState]) -> bool:
        (wanted,) = self._empty.export([(0, 0)])
        same = [(w.dtype, (*w.shape[:2], tokens, w.shape[3])) for w in wanted]
        return same == [(p.dtype, p.shape) for p in parts] and all(map(self._empty.takes, states))

    def forward(
        self, tokens: mx.array, shares: Sequence[tuple[int, KVCache]], rows: Sequence[int] | None = None
    ) -> mx.array | None:
        segments = []
        for length, cache in shares:
            assert isinstance(cache, SequenceCache)  # this runner made it
            segments.append(Segment(length, cache))
        return self._model(tokens, segments, rows)
