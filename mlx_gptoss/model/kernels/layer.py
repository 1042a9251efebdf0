"""What of a layer a kernel of ours may do for a decoded token, in the place of MLX's operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_gptoss.model.batch import Segment
    from mlx_gptoss.model.cache import KVBits, LayerCache


@dataclass(frozen=True)
class OwnAttention:
    """Attention of one token to `since` keys or more.

    run: q [1, Hq, 1, C], keys and values [1, H, n, C], all of which it sees -> [1, Hq, 1, C]. bits: how they
    are to be stored; then in place of one stand the parts that the cache has of it.
    """

    run: Callable[..., mx.array]
    since: int = 0
    bits: KVBits = (None, None)

    def serves(self, segment: Segment, cache: LayerCache) -> bool:
        """Whether it attends for these tokens, whose keys and values are in this cache."""
        enough = segment.cache.offset + segment.ahead >= self.since - 1
        return segment.length == 1 and enough and cache.bits == self.bits


@dataclass(frozen=True)
class LayerKernels:
    """Bound to the layer's weights; None: MLX's operations. T is 1, and its row has no adapter.

    router: x [T, D] -> the experts' inputs [T, D], the chosen experts and their weights [T, k].
    gate_up: the experts' inputs and the chosen ones -> the activations h [T, k, F].
    down: h, the chosen ones, their weights, x -> x plus the weighted sum [T, D].
    """

    attention: OwnAttention | None = None
    router: Callable[[mx.array], tuple[mx.array, ...]] | None = None
    gate_up: Callable[[mx.array, mx.array], mx.array] | None = None
    down: Callable[[mx.array, mx.array, mx.array, mx.array], mx.array] | None = None


NONE = LayerKernels()
