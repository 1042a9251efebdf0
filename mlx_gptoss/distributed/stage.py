"""A rank's layers, with its part of every sequence's caches and of every kept prefix: does what it is told.

Sequences, spans of KV and window states go by numbers that rank 0 gives. Rank 0 has a stage as well: what it
decides is done there first, and then in the same order on every other.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_gptoss.checkpoint.adapter import Adapter
from mlx_gptoss.engine.runner import adapt_layers
from mlx_gptoss.errors import HostError
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.graph import Layer, run_layers
from mlx_gptoss.model.kernels.layer import NONE
from mlx_gptoss.model.sequence_cache import KVSpan, SequenceCache, WayBack, WindowState


class Stage:
    """layers: those of the model's layers that `where` names; config: the whole model's."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: mx.Dtype,
        layers: list[Layer],
        where: range,
        kv_bits: KVBits,
        *,
        interleaved: bool,
    ) -> None:
        self.config, self.dtype, self.where = config, dtype, where
        self._layers, self._kv_bits, self._interleaved = layers, kv_bits, interleaved
        self.caches: dict[int, SequenceCache] = {}
        self.spans: dict[int, KVSpan] = {}
        self.states: dict[int, WindowState] = {}

    def empty(self, adapter: int = 0) -> SequenceCache:
        """Caches of these layers that no sequence has."""
        return SequenceCache(self.config, self.dtype, self._kv_bits, adapter, self.where)

    def clear(self) -> None:
        """Forget every sequence and every prefix."""
        self.caches.clear()
        self.spans.clear()
        self.states.clear()

    # --- what rank 0 tells: the records of runner.py, argument for argument

    def make(self, cache: int, adapter: int) -> None:
        self.caches[cache] = self.empty(adapter)

    def free(self, caches: list[int], spans: list[int], states: list[int]) -> None:
        for numbers, held in ((caches, self.caches), (spans, self.spans), (states, self.states)):
            for number in numbers:
                held.pop(number, None)  # what failed was never there

    def reserve(self, cache: int, tokens: int) -> None:
        self.caches[cache].reserve(tokens)

    def go_back(self, cache: int, position: int, at: int, kept: bool, state: int | None) -> None:
        window = None if state is None else self.states[state]
        self.caches[cache].go_back(WayBack(position, at, kept, window))

    def snapshot(self, cache: int, state: int, start: int, end: int) -> None:
        self.states[state] = made = self.caches[cache].copy_window(start, end)
        if made.data is not None:
            mx.async_eval(made.data)

    def export(self, cache: int, ranges: list[list[int]], spans: list[int], release: bool) -> None:
        made = self.caches[cache].export([(start, end) for start, end in ranges], release=release)
        self.spans.update(zip(spans, made, strict=True))

    def cut(self, span: int, made: int, start: int, end: int, compact: bool) -> None:
        self.spans[made] = self.spans[span].cut(start, end, compact=compact)
        if compact:
            mx.eval(self.spans[made])

    def load(self, cache: int, spans: list[int], total: int) -> None:
        self.caches[cache].fill([KVSpan(self.spans[span]) for span in spans], total)

    def adopt_span(self, span: int, parts: list[mx.array]) -> None:
        self.spans[span] = KVSpan(parts)

    def adopt_state(self, state: int, start: int, end: int, data: mx.array | None) -> None:
        self.states[state] = WindowState(start, end, data)

    def put_adapter(self, number: int, adapter: Adapter | None) -> None:
        adapt_layers(self._layers, number, adapter, interleaved=self._interleaved, first=self.where.start)

    def forward(self, x: mx.array, shares: Sequence[Sequence[int]], rows: Sequence[int] | None) -> mx.array:
        """X [T, D] of sequences end to end, (cache, length) each -> the wanted rows (None: all) of what comes
        out, evaluated as the caches are.
        """
        segments = [
            Segment(length, cache := self.caches[number], adapter=cache.adapter) for number, length in shares
        ]
        x = run_layers(self._layers, x, segments, self.config.experts_per_token, awaited=True)
        if rows is not None and len(rows) < len(x):
            # None: the caches are all that this step is for, and the last layer need not be finished.
            x = x[mx.array(list(rows), mx.int32)] if len(rows) else mx.zeros((0, x.shape[1]), x.dtype)
        mx.eval(x, [self.caches[number].arrays() for number, _ in shares])
        return x


class PartStage(Stage):
    """A rank's part of every layer."""

    def retrace(self) -> None:
        """Forget the graphs that are replayed: what the layers add up with has changed."""
        for layer in self._layers:
            layer.use(NONE)

    def forward(self, x: mx.array, shares: Sequence[Sequence[int]], rows: Sequence[int] | None) -> mx.array:
        """As Stage's; but all rows are computed to the end, for that is what the others are waiting for.

        Raises HostError when one of these is lost.
        """
        try:
            x = super().forward(x, shares, None)
        except RuntimeError as error:
            if not str(error).startswith(("[ring]", "[jaccl]")):
                raise
            raise HostError(f"another part is lost: {error}") from None
        return x if rows is None else x[mx.array(list(rows), mx.int32)]
