"""Reading a part of every layer: some KV heads and some columns of the experts (tensor parallelism).

Of rows only the part's bytes are read; columns lie among all others, so those are read an expert at a time
and cut. Nothing whole stays in memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import mlx.core as mx

from mlx_gptoss.checkpoint.layouts import Form, TensorSpec, sizes
from mlx_gptoss.checkpoint.reader import Checkpoint, Portion
from mlx_gptoss.checkpoint.safetensors import read_part
from mlx_gptoss.errors import RequestError
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.matrix import Matrix
from mlx_gptoss.model.tensor_parallel import PartOfAttention, PartOfExperts, Total

Side = Literal["outputs", "inputs"]


class PartOfCheckpoint(Checkpoint):
    """A checkpoint whose layers have these KV heads and these columns of each expert.

    total: see tensor_parallel.Total. part_config: the shape of the part, which its caches have. What every
    part would add in full, the bias of the experts' second matrix, is the part's that has the first column.
    Raises RequestError for a part that cuts through values which share a scale.
    """

    def __init__(
        self,
        folder: Path,
        dtype: mx.Dtype | str | None,
        heads: range,
        channels: range,
        total: Total,
        portion: Portion | None = None,
    ) -> None:
        super().__init__(folder, dtype, portion)
        self.channels = channels
        self.part_config = part_config(self.config, heads, channels)
        self._cuts = _cuts(self.config, heads, channels)
        self.make_attention = partial(PartOfAttention, total=total)
        self.make_experts = partial(PartOfExperts, total=total)

    def _take(self, name: str) -> mx.array:
        spec = self.specs[name]
        side, ranges = self._cuts.get(spec.key, ("outputs", []))
        axis = self._axis(spec, side) if ranges else None
        if axis is None:
            array = super()._take(name)
            adds = spec.key == "experts.down" and self.channels.start > 0  # the bias: of the first part alone
            return mx.zeros_like(array) if adds else array
        whole = sizes(self.config)[spec.key][0 if side == "outputs" else 1]
        parts = [self._read(name, axis, part, whole) for part in ranges]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)

    def _axis(self, spec: TensorSpec, side: Side) -> int | None:
        """Where a tensor's outputs or inputs lie; None for a vector's inputs."""
        stacked = spec.part == "experts"
        if len(spec.shape) == 1 + stacked:
            return len(spec.shape) - 1 if side == "outputs" else None
        if stacked and self.layout.experts is Form.TRANSPOSED:
            return 2 if side == "outputs" else 1
        return stacked + (side == "inputs")

    def _read(self, name: str, axis: int, part: range, whole: int) -> mx.array:
        info = self.tensors[name]
        count = info.shape[axis]  # of a packed matrix fewer than `whole` values
        ends = [end * count / whole for end in (part.start, part.stop)]
        if not all(end.is_integer() for end in ends):
            raise RequestError(
                f"{name} has groups of {whole // count} values, which {part.start} to {part.stop} cuts "
                "through: use fewer machines, or --parallel pipeline",
                "hosts",
            )
        values = mx.array(read_part(info, axis, int(ends[0]), int(ends[1])))
        return values.view(mx.bfloat16) if info.dtype == "BF16" else values

    def _from_records(self, layer: int) -> tuple[Matrix, Matrix]:
        gate_up, down = super()._from_records(layer)
        first, last = self.channels.start, self.channels.stop
        rows = gate_up.rows(2 * first, 2 * last).mapped(mx.contiguous)
        whole = self.config.intermediate_size

        def columns(a: mx.array) -> mx.array:
            return mx.contiguous(a[..., first * a.shape[-1] // whole : last * a.shape[-1] // whole])

        return rows, down.mapped(columns)


def part_config(config: ModelConfig, heads: range, channels: range) -> ModelConfig:
    """The shape of a part."""
    queries = config.num_attention_heads // config.num_kv_heads
    return replace(
        config,
        num_kv_heads=len(heads),
        num_attention_heads=queries * len(heads),
        intermediate_size=len(channels),
    )


def _cuts(config: ModelConfig, heads: range, channels: range) -> dict[str, tuple[Side, list[range]]]:
    """Of every key that is divided: which side, and the part's values there."""
    queries = config.num_attention_heads // config.num_kv_heads
    q = range(heads.start * queries, heads.stop * queries)

    def wide(some: range, before: int = 0) -> range:
        return range((before + some.start) * config.head_dim, (before + some.stop) * config.head_dim)

    behind_q, behind_k = config.num_attention_heads, config.num_attention_heads + config.num_kv_heads
    return {
        "attention.q": ("outputs", [wide(q)]),
        "attention.k": ("outputs", [wide(heads)]),
        "attention.v": ("outputs", [wide(heads)]),
        "attention.qkv": ("outputs", [wide(q), wide(heads, behind_q), wide(heads, behind_k)]),
        "attention.out": ("inputs", [wide(q)]),
        "attention.sinks": ("outputs", [q]),
        "experts.gate": ("outputs", [channels]),
        "experts.up": ("outputs", [channels]),
        "experts.gate_up": ("outputs", [range(2 * channels.start, 2 * channels.stop)]),
        "experts.down": ("inputs", [channels]),
    }
