"""Tensor parallelism: a part of every layer on each host, and a ModelRunner over all of them.

Rank 0, which decides, has the embedding and the head alone. The parts are ranks 1 to N, of which the first
runs beside it: MLX's group of ranks lives as long as its processes do, so those in it can be started anew
when one is lost, and rank 0 with the callers stays. Hidden states go to all parts, which add up between them,
and come back from the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_gptoss.checkpoint.adapter import Adapter
from mlx_gptoss.checkpoint.part import part_config
from mlx_gptoss.distributed.group import Group
from mlx_gptoss.distributed.plan import Share
from mlx_gptoss.distributed.runner import PipelineRunner
from mlx_gptoss.distributed.stage import Stage
from mlx_gptoss.errors import RequestError
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig
from mlx_gptoss.model.graph import Model


class Mirror(Stage):
    """Rank 0's caches: of no heads, so that they hold nothing, and of as many layers as have every kind of
    attention. They know what the parts' caches know: where a sequence is, and what a rewind would find.
    """

    def __init__(self, config: ModelConfig, dtype: mx.Dtype) -> None:
        kinds = config.layer_types
        last = max(kinds.index(kind) for kind in (FULL, SLIDING) if kind in kinds)
        nothing = part_config(config, range(0), range(0))
        super().__init__(nothing, dtype, [], range(last + 1), (None, None), interleaved=True)

    def forward(self, x: mx.array, shares: Sequence[Sequence[int]], rows: Sequence[int] | None) -> mx.array:
        """X as it is; the caches move."""
        for number, length in shares:
            cache, none = self.caches[number], mx.zeros((1, 0, length, self.config.head_dim), self.dtype)
            for layer in cache.layers:
                layer.update_and_fetch(none, none)
            cache.advance(length)
        mx.eval(x)
        return x


class TensorRunner(PipelineRunner):
    """model: the embedding and the head, without layers. shares: of ranks 1 to N."""

    def __init__(self, group: Group, model: Model, shares: Sequence[Share], kv_bits: KVBits) -> None:
        mirror = Mirror(model.config, model.dtype)
        super().__init__(group, model, mirror, [range(0), *(share.layers for share in shares)], kv_bits)
        self.hold_depth(1)  # all ranks work on one forward
        self._heads = [share.heads for share in shares]

    def put_adapter(self, number: int, adapter: Adapter | None) -> None:
        """Raises RequestError for an adapter."""
        if adapter is not None:
            raise RequestError(
                "adapters do not run in tensor parallelism: leave out parallel='tensor', or merge the "
                "adapter into the model (mlx-gptoss adapter merge)",
                "adapter",
            )

    def divide_span(self, parts: Sequence[mx.array]) -> list[list[mx.array]]:
        """By heads. The parts are [1, H, n, ..], as many of each layer."""
        layers, tokens = len(self._empty.full), parts[0].shape[2] if parts else 0
        none = mx.zeros((1, 0, tokens, self._config.head_dim), self._model.dtype)
        here = [none] * (2 * len(self.stage.empty().full))
        return [
            here,
            *(
                [mx.contiguous(part[:, heads.start : heads.stop]) for part in parts]
                if heads
                else [none] * (2 * layers)
                for heads in self._heads
            ),
        ]

    def divide_state(self, data: mx.array) -> list[list[mx.array]]:
        """By heads. The data is [2 x sliding layers, H, n, D]."""
        here = data[: 2 * len(self.stage.empty().sliding), :0]
        return [[here], *([mx.contiguous(data[:, heads.start : heads.stop])] for heads in self._heads)]

    def join_span(self, parts: list[list[mx.array]]) -> list[mx.array]:
        """What `divide_span` divides."""
        held = [one for one, heads in zip(parts[1:], self._heads, strict=True) if heads]
        return [mx.concatenate(list(part), axis=1) for part in zip(*held, strict=True)]

    def join_state(self, parts: list[list[mx.array]]) -> mx.array:
        """What `divide_state` divides."""
        return mx.concatenate([data for (data,) in parts[1:]], axis=1)
