"""Random adapters of any model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.adapter import Adapter
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.low_rank import EXPERTS, PARTS, Pair, part_sizes


def random_adapter(
    config: ModelConfig,
    rank: int = 4,
    layers: tuple[int, ...] = (1, 2),
    seed: int = 0,
    names: tuple[str, ...] = PARTS,
) -> Adapter:
    """Of a change that is felt: the root mean square of b @ a is about a tenth."""
    rng, sizes = np.random.default_rng(seed), part_sizes(config)

    def made(name: str) -> Pair:
        outputs, inputs = sizes[name]
        lead = (config.num_experts,) if name in EXPERTS else ()
        shapes = ((rank, inputs), (outputs, rank))
        a, b = ((rng.standard_normal((*lead, *s)) / 4).astype(np.float32) for s in shapes)
        return Pair(mx.array(a), mx.array(b))

    return Adapter(
        {i: {name: made(name) for name in names} for i in layers}, 1.5, {"base": "openai/x", "step": 7}
    )
