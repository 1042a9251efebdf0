"""What an engine counts, and a moment of it."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass
class EngineStats(Counters):
    """The totals, and what there is now: sequences, and bytes."""

    running: int = 0
    waiting: int = 0
    live_kv_bytes: int = 0
    prefix_bytes: int = 0
    prefix_nodes: int = 0
    kv_budget: int = 0
