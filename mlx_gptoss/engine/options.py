"""How an engine is asked to run, and what memory that leaves for contexts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_gptoss.checkpoint.memory import MemoryPlan, gigabytes
from mlx_gptoss.errors import MemoryLimitError, RequestError
from mlx_gptoss.model.cache import GROW_LEAST, GROW_MOST, KVBits, SequenceCache

# Left for activations, logits and allocations in flight, bytes, when the KV budget is chosen here.
SCRATCH = 512 * 2**20
# Of the memory that the weights leave, the share that KV caches and the prefix store may take.
KV_SHARE = 0.6
# The value of `draft` that needs no second model.
LOOKUP = "lookup"
# The engine allows no context shorter than this, tokens: a budget that small is a mistake.
LEAST_CONTEXT = 64


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs.

    max_context: tokens of prompt and output together, at most (default: the model's, or what the budget
    holds). kv_budget: bytes for KV caches and kept prefixes (default: chosen from what the weights leave).
    kv_bits: 8 or 4 to quantise the full layers' keys and values, or a pair (keys', values') with None for
    unquantised; off by default. prefill_chunk: prompt tokens in one forward. max_running, max_waiting:
    requests at a time, and in line. prefix_cache: a folder in which prefixes are kept from one process to the
    next (default: they are not); it holds what users wrote, so keep it private. draft: "lookup" to guess
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
    draft: str | Path | None = None
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        for name, least in (
            ("max_context", LEAST_CONTEXT),
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
        if len(self.bits) != 2 or any(b not in (None, 4, 8) for b in self.bits):
            raise RequestError(
                f"kv_bits is {self.kv_bits!r}: expected 8, 4, or a pair of keys' and values' bits",
                "kv_bits",
            )

    @property
    def bits(self) -> KVBits:
        """kv_bits as a pair."""
        return self.kv_bits if isinstance(self.kv_bits, tuple) else (self.kv_bits, self.kv_bits)


def plan_context(memory: MemoryPlan, options: EngineOptions, free: int) -> tuple[int, int]:
    """(KV budget in bytes, longest context in tokens) for a model on a machine with `free` bytes.

    Raises MemoryLimitError when what is asked for cannot fit, with the numbers.
    """
    config = memory.config
    left = free - memory.total() - SCRATCH
    if options.kv_budget is not None and options.kv_budget > max(left, 0):
        raise MemoryLimitError(
            f"kv_budget is {gigabytes(options.kv_budget)}: the weights leave {gigabytes(max(left, 0))} of "
            f"{gigabytes(free)} free; ask for less, or close other programs",
            needed=options.kv_budget,
            available=max(left, 0),
        )
    budget = options.kv_budget if options.kv_budget is not None else int(left * KV_SHARE)
    if options.bits != (None, None) and config.head_dim % 32:
        raise RequestError(
            f"kv_bits needs heads of a multiple of 32 channels, and this model's have {config.head_dim}",
            "kv_bits",
        )
    probe = SequenceCache(config, memory.dtype, options.bits)
    holds = (budget - probe.nbytes_at(0, options.prefill_chunk)) // max(
        1, probe.nbytes_at(1) - probe.nbytes_at(0)
    )
    # A slab grows in steps, so a sequence of the longest context must not need all of it: what is left is the
    # longest n with n + _step(n) <= holds.
    holds -= min(max(holds // 2 + GROW_LEAST // 2, 2 * GROW_LEAST), GROW_MOST + GROW_LEAST)
    wanted = config.max_position if options.max_context is None else options.max_context
    if wanted > config.max_position:
        raise RequestError(
            f"max_context is {wanted}: the model's own limit is {config.max_position} tokens", "max_context"
        )
    context = min(wanted, holds)
    if context < (wanted if options.max_context is not None else LEAST_CONTEXT):
        asked = options.max_context or LEAST_CONTEXT
        needed = probe.nbytes_at(asked + _step(asked), options.prefill_chunk)
        raise MemoryLimitError(
            f"a context of {asked} tokens needs {gigabytes(needed)} for KV and the steps it grows in, and "
            f"the budget is {gigabytes(max(budget, 0))}: lower max_context or raise kv_budget",
            needed=needed,
            available=max(budget, 0),
        )
    return budget, context


def _step(tokens: int) -> int:
    """The most room, tokens, that a slab of so many tokens has beyond them (see FullCache.capacity_for)."""
    return min(max(tokens, GROW_LEAST), GROW_MOST) + GROW_LEAST
