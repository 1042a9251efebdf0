"""What one forward is asked for: the next tokens of several sequences, end to end ("ragged")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.cache import Mask, SequenceCache


@dataclass(frozen=True)
class Segment:
    """The next `length` tokens of one sequence, whose earlier tokens are in `cache`."""

    length: int
    cache: SequenceCache


class Batch:
    """What the layers share during one forward: positions, masks and row numbers."""

    def __init__(self, segments: Sequence[Segment], experts_per_token: int) -> None:
        self.segments = segments
        self.tokens = sum(s.length for s in segments)
        spans = [np.arange(s.cache.offset, s.cache.offset + s.length, dtype=np.int32) for s in segments]
        self.positions = mx.array(np.concatenate(spans))
        self.bounds = np.cumsum([s.length for s in segments])[:-1].tolist()
        self.masks: list[dict[str, Mask]] = [s.cache.masks(s.length) for s in segments]
        k = experts_per_token
        pairs = np.arange(self.tokens * k, dtype=np.uint32).reshape(self.tokens, k)
        self.token_of_pair = mx.array(pairs // k)  # [T, k]: the row of x that each expert reads
        self.pair = mx.array(pairs)
