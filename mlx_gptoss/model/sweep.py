"""A long prompt through streamed experts: layer by layer over all of it, so that each expert is read once.

The rows are cut into the blocks that a prompt is fed in otherwise, and every product is made of one block's
rows, so the bits are the same. A block's attention needs the earlier blocks of its own layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.graph import Layer, Model
from mlx_gptoss.model.streamed import StreamedExperts

Progress = Callable[[float], None]

# What the experts' outputs may take, bytes; they are there three times while they are put in order.
OUTPUTS = 384 * 2**20


def rows_at_once(config: ModelConfig, dtype: mx.Dtype, block: int) -> int:
    """How many rows one sweep may have: whole blocks, one at least."""
    row = 3 * config.experts_per_token * config.hidden_size * dtype.size
    return max(1, OUTPUTS // row // block) * block


def sweep(
    model: Model,
    tokens: mx.array,
    segments: Sequence[Segment],
    rows: Sequence[int] | None,
    block: int,
    progress: Progress = lambda share: None,
) -> mx.array | None:
    """As Model.__call__, in blocks of `block` rows; `progress` is told the share of the layers done.

    rows: in ascending order. Their logits are made block by block as well.
    """
    batches = [Batch(part, model.config.experts_per_token) for part in cut(segments, block)]
    x = model.embedding(tokens)
    xs = [x[i * block : (i + 1) * block] for i in range(len(batches))]
    for i, layer in enumerate(model.layers):
        xs = _through(layer, xs, batches)
        mx.eval(xs)
        progress((i + 1) / len(model.layers))
    for segment in segments:
        segment.cache.advance(segment.length)
    wanted = range(len(tokens)) if rows is None else rows
    parts = [
        model.logits(x, [row - i * block for row in wanted if 0 <= row - i * block < len(x)])
        for i, x in enumerate(xs)
    ]
    found = [part for part in parts if part is not None]
    return mx.concatenate(found) if found else None


def cut(segments: Sequence[Segment], block: int) -> list[list[Segment]]:
    """The segments' rows in blocks of `block` rows, the last one with what is left."""
    blocks: list[list[Segment]] = []
    room = 0
    for segment in segments:
        done = 0
        while done < segment.length:
            if not room:
                blocks.append([])
                room = block
            count = min(room, segment.length - done)
            blocks[-1].append(replace(segment, length=count, ahead=segment.ahead + done))
            done += count
            room -= count
    return blocks


def _through(layer: Layer, xs: Sequence[mx.array], batches: Sequence[Batch]) -> list[mx.array]:
    """The blocks after one layer."""
    pairs = [(layer.attention(x, batch), batch) for x, batch in zip(xs, batches, strict=True)]
    experts = layer.moe.experts
    if not isinstance(experts, StreamedExperts):
        return [layer.moe(x, batch) for x, batch in pairs]
    routed = [layer.moe.route(x, batch) for x, batch in pairs]
    asked = [
        experts.block(r, chosen, batch) for (r, chosen, _), (_, batch) in zip(routed, pairs, strict=True)
    ]
    outputs = experts.sweep(asked)
    return [
        layer.moe.add(x, weights, y)
        for (x, _), (_, _, weights), y in zip(pairs, routed, outputs, strict=True)
    ]
