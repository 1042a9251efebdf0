"""What one forward is asked for: the next tokens of several sequences, end to end ("ragged")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.cache import Mask

# A graph is traced once for each number of rows up to this; larger ones come in any number, and take the GPU
# longer than Python.
REPLAYED_ROWS = 16


class LayerKV(Protocol):
    """The earlier keys and values of one layer."""

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, sinks: mx.array, mask: Mask
    ) -> mx.array: ...


class SequenceKV(Protocol):
    """The earlier tokens of one sequence, to the graph. A SequenceCache is one."""

    @property
    def offset(self) -> int: ...

    @property
    def layers(self) -> Sequence[LayerKV]: ...

    def masks(self, t: int, ahead: int = 0) -> Mapping[str, Mask]: ...

    def advance(self, t: int) -> None: ...


@dataclass(frozen=True)
class Segment:
    """The next `length` tokens of one sequence, whose earlier tokens are in `cache`.

    ahead: how many tokens more will have been added to each layer's cache before that layer sees these.
    adapter: the number of the adapter that they run with (see low_rank.py), 0 for none.
    """

    length: int
    cache: SequenceKV
    ahead: int = 0
    adapter: int = 0


class LowRank(Protocol):
    """What adapters add to the outputs of the experts' two matrices, for certain pairs."""

    def gate_up(self, x: mx.array, pairs: Pairs) -> mx.array:
        """X [T, D] -> [T, k, 2F], rows as the weights have them."""
        ...

    def down(self, h: mx.array, pairs: Pairs) -> mx.array:
        """The activations h [T, k, F] -> [T, k, D]."""
        ...

    def some(self, pairs: np.ndarray) -> LowRank:
        """For some of the pairs, int [P] out of T x k: each becomes a row of its own, with one expert."""
        ...


class Pairs:
    """Row numbers of (token, expert) pairs: T rows that take k experts each.

    low_rank: what adapters add in the layer that is being applied, if they do.
    """

    def __init__(self, rows: int, k: int, low_rank: LowRank | None = None) -> None:
        self.low_rank = low_rank
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
        self.masks = [s.cache.masks(s.length, s.ahead) for s in segments]
        self.adapters = frozenset(s.adapter for s in segments)
        self._deferred: Callable[[], None] | None = None

    @classmethod
    def of_arrays(cls, positions: mx.array, token_of_pair: mx.array, pair: mx.array) -> Batch:
        """A batch of no sequences: all that a replayed graph knows of one (see graph.CompiledLayer)."""
        batch = cls.__new__(cls)
        batch.segments, batch.masks, batch.bounds = (), [], []
        batch.tokens, batch.positions = int(positions.shape[0]), positions
        batch.token_of_pair, batch.pair, batch.low_rank = token_of_pair, pair, None
        batch.adapters, batch._deferred = frozenset({0}), None
        return batch

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """As `of_arrays` takes them."""
        return self.positions, self.token_of_pair, self.pair

    @cached_property
    def small(self) -> bool:
        """Whether a replayed graph serves it."""
        return self.tokens <= REPLAYED_ROWS and not self.adapted

    @cached_property
    def decodes(self) -> bool:
        """Whether kernels of our own may serve it: a single row, without an adapter."""
        return self.tokens == 1 and not self.adapted

    @property
    def adapted(self) -> bool:
        """Whether any row runs with an adapter."""
        return self.adapters != {0}

    @cached_property
    def adapter_of_row(self) -> mx.array:
        """The adapter's number for each row, uint32 [T]."""
        numbers = np.array([s.adapter for s in self.segments], np.uint32)
        return mx.array(np.repeat(numbers, [s.length for s in self.segments]))

    def defer(self, work: Callable[[], None]) -> None:
        """Do this once the graph of the next layer is built up to its experts, or the whole forward's."""
        assert self._deferred is None
        self._deferred = work

    @property
    def unsettled(self) -> bool:
        """Whether something is deferred: then the last layer's output cannot be evaluated yet."""
        return self._deferred is not None

    def settle(self) -> None:
        """Do what was deferred."""
        work, self._deferred = self._deferred, None
        if work is not None:
            work()
