"""A sequence that is read whole and kept nowhere: what stands for its caches in training.

Keys and values are those of the call itself, so the forward may run any number of times, and be
differentiated: nothing is written. The logits are those of a SequenceCache that starts empty, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.cache import Mask
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig
from mlx_gptoss.model.cpu import attention


class Whole:
    """A sequence from its first token to its last, to the graph and to each of its layers."""

    offset = 0

    def __init__(self, config: ModelConfig) -> None:
        self._reach = config.sliding_window - 1
        self.layers: Sequence[Whole] = [self] * config.num_layers

    def masks(self, t: int, ahead: int = 0) -> Mapping[str, Mask]:
        """As SequenceCache.masks."""
        if t == 1:
            return {FULL: None, SLIDING: None}
        window: Mask = "causal"
        if t > self._reach + 1:
            query, key = mx.arange(t)[:, None], mx.arange(t)[None]
            window = (key <= query) & (key >= query - self._reach)
        return {FULL: "causal", SLIDING: window}

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, sinks: mx.array, mask: Mask
    ) -> mx.array:
        """As LayerCache.attend, without appending: q [1, Hq, t, D] -> [1, Hq, t, D]."""
        return attention(q, k, v, scale=scale, sinks=sinks, mask=mask)

    def advance(self, t: int) -> None:
        """Nothing moves."""


def whole_segments(config: ModelConfig, lengths: Sequence[int], adapter: int = 0) -> list[Segment]:
    """Sequences of these lengths, each read whole."""
    whole = Whole(config)
    return [Segment(length, whole, adapter=adapter) for length in lengths]
