"""What streaming is expected to cost: a model of hit rates, not a measurement.

The curve was fitted to a published replay of gpt-oss-120b's choices with least-recently-used slots in each
layer (74, 82, 86, 87.5, 90 and 92 % at 16, 24, 32, 38, 48 and 64 of 128 slots). It is taken for 20b by the
share of experts that have a slot: nobody has published one. `bench --trace` records your own.
"""

from __future__ import annotations

import numpy as np

from mlx_gptoss.checkpoint.memory import MemoryPlan

_SHARES = (0.0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 0.3, 3 / 8, 1 / 2, 2 / 3, 0.78, 1.0)
_HITS = (0.0, 0.62, 0.74, 0.82, 0.86, 0.875, 0.90, 0.92, 0.955, 0.975, 1.0)


def expected_hits(slots: int, experts: int) -> float:
    """The share of a token's experts that is expected to be in memory."""
    return float(np.interp(slots / experts, _SHARES, _HITS))


def read_from_disk(plan: MemoryPlan) -> float:
    """Bytes that a decoded token is expected to read from the disk."""
    if plan.slots is None:
        return 0.0
    config = plan.config
    misses = 1 - expected_hits(plan.slots, config.num_experts)
    return misses * config.experts_per_token * config.num_layers * plan.expert.stored


def macs_working_set(memory: int) -> int:
    """Bytes that Metal lets a Mac's GPU keep resident by default, of its memory: a rule of thumb."""
    return memory * 2 // 3 if memory <= 36 * 2**30 else memory * 3 // 4
