"""How an engine is asked to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from mlx_gptoss.errors import RequestError
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.sizes import parse_size

# The value of `draft` that needs no second model.
LOOKUP = "lookup"
# The engine allows no context shorter than this, tokens: a budget that small is a mistake.
MIN_CONTEXT = 64


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs.

    max_context: tokens of prompt and output together, at most (default: the model's, or what the budget
    holds). kv_budget: bytes for KV caches and kept prefixes (default: chosen from what the weights leave).
    kv_bits: 8 or 4 to quantise the full layers' keys and values, or a pair (keys', values') with None for
    unquantised; off by default. prefill_chunk: prompt tokens in one forward. max_running, max_waiting:
    requests at a time, and in line. prefix_cache: a folder in which prefixes are kept from one process to the
    next (default: they are not); it holds what users wrote, so keep it private. expert_memory: bytes for
    experts ("12GB" or a number); those that find no place are read from the disk whenever a token needs them.
    "all" keeps every expert in memory, "auto" does so where they fit. draft: "lookup" to guess
    tokens from the prompt and the output, or a second model of the same vocabulary (folder or Hub id) to
    guess with; draft_tokens: guesses in one forward.
    """

    max_context: int | None = None
    kv_budget: int | None = None
    kv_bits: int | KVBits | None = None
    prefill_chunk: int = 512
    max_running: int = 16
    max_waiting: int = 1024
    prefix_cache: str | Path | None = None
    expert_memory: int | str = "auto"
    draft: str | Path | None = None
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        for name, least in (
            ("max_context", MIN_CONTEXT),
            ("kv_budget", 1),
            ("prefill_chunk", 1),
            ("max_running", 1),
            ("max_waiting", 0),
            ("draft_tokens", 1),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RequestError(f"{name} is {value!r}: expected a whole number >= {least}", name)
        if self.expert_bytes == 0:
            raise RequestError(
                f"expert_memory is {self.expert_memory!r}: expected 'auto', 'all', or a size such as '12GB'",
                "expert_memory",
            )
        if len(self.bits) != 2 or any(b not in (None, 4, 8) for b in self.bits):
            raise RequestError(
                f"kv_bits is {self.kv_bits!r}: expected 8, 4, or a pair of keys' and values' bits",
                "kv_bits",
            )

    @property
    def bits(self) -> KVBits:
        """kv_bits as a pair."""
        return self.kv_bits if isinstance(self.kv_bits, tuple) else (self.kv_bits, self.kv_bits)

    @property
    def expert_bytes(self) -> int | None:
        """expert_memory as a number of bytes; None for "auto" and "all"."""
        if self.expert_memory in ("auto", "all"):
            return None
        if isinstance(self.expert_memory, str):
            return parse_size(self.expert_memory) or 0
        return max(0, self.expert_memory) if type(self.expert_memory) is int else 0


class EngineKeywords(TypedDict, total=False):
    """The fields of EngineOptions as keyword arguments, for editors and type checkers."""

    max_context: int | None
    kv_budget: int | None
    kv_bits: int | KVBits | None
    prefill_chunk: int
    max_running: int
    max_waiting: int
    prefix_cache: str | Path | None
    expert_memory: int | str
    draft: str | Path | None
    draft_tokens: int
