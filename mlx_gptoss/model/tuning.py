"""How often a forward is handed to Metal: what is fastest on the machine at hand (see pace.py).

Decode is measured as it runs, a step launched before the last one is read; a step that is waited for, by
itself; and a prompt with its peak memory, which must not grow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import mlx.core as mx

from mlx_gptoss.device import on_metal
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.kernels.record import Record, sizes
from mlx_gptoss.model.pace import USUAL, Paces
from mlx_gptoss.model.sequence_cache import SequenceCache

CHOICES = {"decode": (0, 4, 8, 12), "awaited": (0, 1, 2, 4, 6, 8, 12), "prompt": (1, 2, 4)}
CONTEXT = 256  # tokens before a decoded one
PROMPT = 512  # tokens, as many as the engine feeds at once
STEPS = 12  # of decoding, in each round
ROUNDS = 4  # by turns; the first warms up and the fastest counts
# What is fastest by less than this is noise: the pace stays as it is.
LEAST_GAIN = 0.02
MORE_MEMORY = 1.02


@dataclass(frozen=True)
class Tuned:
    """The paces to use; by name, and for each number of layers, the seconds of a step or prompt."""

    paces: Paces
    seconds: dict[str, dict[int, float]]


SECTION = "pace"


def keep(paces: Paces, model: Model, record: Record) -> None:
    """Remember what was measured with a model."""
    record.put(SECTION, _name(model), asdict(paces))


def known(model: Model, record: Record) -> Paces:
    """What was measured with a model of these shapes; the usual paces where nothing was that makes sense."""
    found: Any = record.get(SECTION, _name(model)) if on_metal() else None
    if not isinstance(found, dict) or found.keys() != asdict(USUAL).keys():
        return USUAL
    return Paces(**found) if all(type(n) is int and n >= 0 for n in found.values()) else USUAL


def _name(model: Model) -> str:
    return f"{len(model.layers)} layers, {sizes(model)}"


def tune(model: Model, clock: Callable[[], float] = time.perf_counter) -> Tuned:
    """Measure; the model is left as it was. Takes some seconds."""
    found, seconds = USUAL, dict[str, dict[int, float]]()
    kept = model.paces
    try:
        for field in fields(Paces):
            name = field.name
            run = _prompt if name == "prompt" else _decode(awaited=name == "awaited")
            seconds[name], peaks = _measured(model, name, run, clock)
            start = getattr(USUAL, name)
            most = MORE_MEMORY * peaks[start] if name == "prompt" else float("inf")
            allowed = {n: s for n, s in seconds[name].items() if peaks[n] <= most}
            best = min(allowed, key=allowed.__getitem__)
            if seconds[name][start] >= (1 + LEAST_GAIN) * allowed[best]:
                found = replace(found, **{name: best})
    finally:
        model.paces = kept
    return Tuned(found, seconds)


def _measured(
    model: Model, name: str, run: Callable[[Model], int], clock: Callable[[], float]
) -> tuple[dict[int, float], dict[int, int]]:
    """For each choice the least seconds, and the most bytes allocated meanwhile."""
    choices = sorted({getattr(USUAL, name), *(n for n in CHOICES[name] if n < len(model.layers))})
    least = dict.fromkeys(choices, float("inf"))
    most = dict.fromkeys(choices, 0)
    for i in range(ROUNDS):
        for n in choices:
            model.paces = replace(USUAL, **{name: n})
            mx.clear_cache()
            mx.reset_peak_memory()
            start = clock()
            steps = run(model)
            if i:
                least[n] = min(least[n], (clock() - start) / steps)
                most[n] = max(most[n], mx.get_peak_memory())
    return least, most


def _prompt(model: Model) -> int:
    cache = model.make_cache()
    tokens = mx.arange(PROMPT, dtype=mx.int32) % model.config.vocab_size
    mx.eval(model(tokens, [Segment(PROMPT, cache)], [PROMPT - 1]))
    return 1


def _decode(*, awaited: bool) -> Callable[[Model], int]:
    def run(model: Model) -> int:
        cache = _context(model)
        token, before = mx.array([1], mx.int32), None
        for _ in range(STEPS):
            logits = model(token, [Segment(1, cache)], awaited=awaited)
            assert logits is not None
            token = mx.argmax(logits, axis=-1).astype(mx.int32)
            mx.async_eval(token)
            if awaited:
                mx.eval(token)
            elif before is not None:
                mx.eval(before)
            before = token
        mx.eval(token)
        return STEPS

    return run


def _context(model: Model) -> SequenceCache:
    """A cache of so many tokens, whatever they are."""
    config, cache = model.config, model.make_cache()
    for layer in cache.layers:
        old = mx.zeros((1, config.num_kv_heads, CONTEXT, config.head_dim), model.dtype)
        layer.update_and_fetch(old, old)
    cache.advance(CONTEXT)
    mx.eval(cache.arrays())
    return cache
