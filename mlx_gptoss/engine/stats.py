"""What an engine counts, and a moment of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from mlx_gptoss.model.streamed import StreamCounts


@dataclass
class Counters:
    """Totals since the engine started."""

    finished: int = 0  # requests
    cancelled: int = 0  # requests
    failed: int = 0  # requests
    preempted: int = 0  # times a sequence gave its memory back, to start again
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    forwards: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted
    drafts_given_up: int = 0  # requests for which guessing did not pay


@dataclass(frozen=True)
class RankStats:
    """One of the machines that share a model, as it last told of itself."""

    layers: int
    steps: int  # forwards
    sent_bytes: int
    waited_seconds: float  # for hidden states
    peak_bytes: int  # of its process
    active_bytes: int  # of MLX's arrays


@dataclass
class EngineStats(Counters):
    """The totals, and what there is now: sequences, and bytes."""

    running: int = 0
    waiting: int = 0
    live_kv_bytes: int = 0
    prefix_bytes: int = 0
    prefix_nodes: int = 0
    kv_budget: int = 0
    # Of the experts that are read from the disk, in all layers together and of each; nothing where all fit.
    expert_hits: int = 0
    expert_misses: int = 0
    expert_read_bytes: int = 0
    expert_read_seconds: float = 0.0
    expert_wait_seconds: float = 0.0
    expert_layers: tuple[StreamCounts, ...] = ()
    # Of the machines that share the model, this one first; none where it has none.
    ranks: tuple[RankStats, ...] = ()
    rank_losses: int = 0  # how often one of them was lost

    @property
    def expert_hit_rate(self) -> float | None:
        """See hit_rate."""
        return hit_rate(self.expert_layers)


def hit_rate(layers: Sequence[StreamCounts]) -> float | None:
    """Of the experts that steps chose, the share that was in memory; None before the first step."""
    chosen = sum(c.hits + c.misses for c in layers)
    return sum(c.hits for c in layers) / chosen if chosen else None


def expert_totals(layers: Sequence[StreamCounts]) -> dict[str, Any]:
    """The fields of EngineStats that tell of streamed experts."""
    sums = {f"expert_{f.name}": sum(getattr(c, f.name) for c in layers) for f in fields(StreamCounts)}
    del sums["expert_slots"]
    return {**sums, "expert_layers": tuple(layers)}
