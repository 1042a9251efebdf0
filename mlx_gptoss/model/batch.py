"""What one forward is asked for: the next tokens of several sequences, end to end ("ragged")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.cache import Mask, SequenceCache


@dataclass(frozen=True)
class Segment:
    """The next `length` tokens of one sequence, whose earlier tokens are in `cache`.

    ahead: how many tokens more will have been added to each layer's cache before that layer sees these.
    """

    length: int
    cache: SequenceCache
    ahead: int = 0


class Pairs:
    """Row numbers of (token, expert) pairs: T rows that take k experts each."""

    def __init__(self, rows: int, k: int) -> None:
        pairs = np.arange(rows * k, dtype=np.uint32).reshape(rows, k)
        self.token_of_pair = mx.array(pairs // k)  # [T, k]: the row of x that each expert reads
        self.pair = mx.array(pairs)


class Batch(Pairs):
    """What the layers share during one forward: positions, masks and row numbers."""

    def __init__(self, segments: Sequence[Segment], experts_per_token: int) -> None:
        self.segments = segments
        self.tokens = sum(s.length for s in segments)
        super().__init__(self.tokens, experts_per_token)
        starts = [s.cache.offset + s.ahead for s in segments]
        spans = [np.arange(a, a + s.length, dtype=np.int32) for a, s in zip(starts, segments, strict=True)]
        self.positions = mx.array(np.concatenate(spans))
        self.bounds = np.cumsum([s.length for s in segments])[:-1].tolist()
        self.masks: list[dict[str, Mask]] = [s.cache.masks(s.length, s.ahead) for s in segments]
        self._deferred: Callable[[], None] | None = None

    def defer(self, work: Callable[[], None]) -> None:
        """Do this once the graph of the next layer is built up to its experts, or the whole forward's."""
        assert self._deferred is None
        self._deferred = work

    def settle(self) -> None:
        """Do what was deferred."""
        work, self._deferred = self._deferred, None
        if work is not None:
            work()
