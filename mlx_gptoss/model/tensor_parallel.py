"""Layers of which this process has a part: some KV heads with their queries, some columns of the experts.

The output of attention's last projection, and the weighted sum of the experts' outputs, are sums over the
columns that went in: each part gives its own, and `total` adds up those of all (Shoeybi et al. 2019). Norms,
router and residual stream are the same everywhere, so all parts run the same forwards in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx

from mlx_gptoss.model.batch import Batch
from mlx_gptoss.model.cache import LayerCache
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.graph import Attention, MixtureOfExperts
from mlx_gptoss.model.projection import Projection, replayable

Total: TypeAlias = Callable[[mx.array], mx.array]
"""A part's rows [T, D] -> the sum of all parts'."""


class Summed:
    """A projection of whose inputs every part has some."""

    def __init__(self, part: Projection, total: Total) -> None:
        self._part, self._total = part, total
        self.replayable = replayable(part)

    def __call__(self, x: mx.array, batch: Batch | None = None) -> mx.array:
        return self._total(self._part(x, batch))

    def arrays(self) -> list[mx.array]:
        return self._part.arrays()


class PartOfAttention(Attention):
    """Attention of some KV heads; of none where there are more parts than heads."""

    def __init__(
        self, config: ModelConfig, index: int, *, total: Total, out: Projection, **weights: Any
    ) -> None:
        summed = Summed(out, total)
        super().__init__(config, index, out=summed, **weights)
        self._total = total
        summed.replayable &= self.heads > 0  # what has none goes its own way, by `__call__`

    def __call__(self, x: mx.array, batch: Batch) -> mx.array:
        """As Attention."""
        return super().__call__(x, batch) if self.heads else self._others(x, batch)

    def _others(self, x: mx.array, batch: Batch) -> mx.array:
        """X plus what the other parts attend to; the caches hold no heads, and move."""
        for segment in batch.segments:
            cache = segment.cache.layers[self.index]
            assert isinstance(cache, LayerCache)
            none = mx.zeros((1, 0, segment.length, self.channels), x.dtype)
            cache.update_and_fetch(none, none)
        # Sums are added up in one order everywhere, so this one must not be free to come before those of x.
        (nothing,) = mx.depends([mx.zeros_like(x)], [x])
        return x + (self._total(nothing) + self.out_bias)


class PartOfExperts(MixtureOfExperts):
    """Experts of some columns. What is summed up is weighted already: T x D values, not T x k x D."""

    def __init__(self, config: ModelConfig, *, total: Total, **weights: Any) -> None:
        super().__init__(config, **weights)
        self._total = total

    def add(self, x: mx.array, weights: mx.array, y: mx.array) -> mx.array:
        """X [T, D] plus the weighted sum of the experts' outputs, of which y [T, k, D] is this part."""
        return x + self._total((weights[:, None] @ y).squeeze(1))
