"""A forward's operations one by one, to name the first that differs from what it should give.

The model's own forward runs; what its parts hand to each other is listened to. An operation's output becomes
a few sums with random signs, which every value moves: small enough to store.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, cast

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.graph import Layer, Model
from mlx_gptoss.model.matrix import Embedding
from mlx_gptoss.model.projection import Projection

SUMS = 4

Operations: TypeAlias = dict[str, list[float]]
"""What each operation gave, by name and in order: the root mean square of its values, and their sums."""

Tell: TypeAlias = Callable[[str, np.ndarray], None]


class Difference(NamedTuple):
    """The first operation that differs, by how much of its values' root mean square, and whether alone."""

    operation: str
    amount: float
    alone: bool


def operations(model: Model, tokens: list[int]) -> Operations:
    """All tokens but the last as a prompt, then the last by itself. The model is of no use afterwards."""
    found: Operations = {}
    heard: Operations = {}

    def tell(name: str, values: np.ndarray) -> None:
        heard[name] = sketch(values)

    _listen(model, tell)
    cache = model.make_cache()
    for phase, part in (("prompt", tokens[:-1]), ("decode", tokens[-1:])):
        mx.eval(model(mx.array(part), [Segment(len(part), cache)]))
        found |= {f"{name} ({phase})": values for name, values in heard.items()}
        heard.clear()
    return found


def first_difference(was: Operations, now: Operations, tolerance: float) -> Difference | None:
    """The first operation that differs by more than the tolerance."""
    amounts = {name: _amount(was.get(name), now.get(name)) for name in (*was, *now)}
    differing = [name for name, amount in amounts.items() if not amount <= tolerance]  # a NaN differs
    return Difference(differing[0], amounts[differing[0]], len(differing) == 1) if differing else None


def _amount(was: list[float] | None, now: list[float] | None) -> float:
    if was is None or now is None:
        return math.nan
    return float(np.abs(np.subtract(was, now)).max()) / max(was[0], 1e-6)


def sketch(values: np.ndarray) -> list[float]:
    """The root mean square, and SUMS sums with random signs, which are of its size."""
    flat = values.astype(np.float64).ravel()
    sums = _signs(flat.size) @ flat / math.sqrt(flat.size)
    return [math.sqrt(float(flat @ flat) / flat.size), *sums.tolist()]


@lru_cache(maxsize=16)  # layers have the same sizes
def _signs(size: int) -> np.ndarray:
    """Ones and minus ones, float64 [SUMS, size], the same everywhere and for ever."""
    bits = np.frombuffer(hashlib.shake_128(b"signs").digest(-(-SUMS * size // 8)), np.uint8)
    return 2.0 * np.unpackbits(bits)[: SUMS * size].reshape(SUMS, size) - 1


class _Heard:
    """A projection or an embedding whose input, where that has a name, and output are told."""

    def __init__(self, inner: Any, name: str, tell: Tell, before: str | None = None) -> None:
        self._inner, self._name, self._tell, self._before = inner, name, tell, before

    def __call__(self, x: mx.array, batch: Batch | None = None) -> mx.array:
        if self._before is not None:
            self._tell(self._before, _values(x))
        y: mx.array = self._inner(x) if batch is None else self._inner(x, batch)
        self._tell(self._name, _values(y))
        return y

    def arrays(self) -> list[mx.array]:
        return cast("list[mx.array]", self._inner.arrays())


def _values(x: mx.array) -> np.ndarray:
    return np.asarray(x.astype(mx.float32))


def _listen(model: Model, tell: Tell) -> None:
    """Put listeners between the parts of a model."""
    model.embedding = cast(Embedding, _Heard(model.embedding, "embedding", tell))
    for number, layer in enumerate(model.layers):
        _listen_to_layer(layer, number, model.config.num_experts, tell)
    model.head = _Heard(model.head, "head", tell, before="final norm")


def _listen_to_layer(layer: Layer, number: int, experts: int, tell: Tell) -> None:
    def hear(name: str, *arrays: mx.array) -> None:
        tell(f"layer {number}: {name}", np.concatenate([_values(a).ravel() for a in arrays]))

    def heard(inner: Projection, name: str, before: str | None = None) -> Projection:
        return _Heard(inner, name, lambda name, values: tell(f"layer {number}: {name}", values), before)

    def hear_choice(scores: mx.array, chosen: mx.array, weights: mx.array) -> None:
        every = np.zeros((len(chosen), experts), np.float32)  # the chosen ones come in any order
        np.put_along_axis(every, np.asarray(chosen), _values(weights), axis=1)
        tell(f"layer {number}: top experts", every)

    def hear_pairs(name: str, x: mx.array) -> None:
        """Pairs of a row and an expert, in any order."""
        tell(f"layer {number}: {name}", _values(x).reshape(-1, x.shape[-1]).sum(axis=0))

    attention, moe = layer.attention, layer.moe
    attention.qkv = heard(attention.qkv, "q|k|v", before="norm")
    attention.out = heard(attention.out, "projection")
    _after(attention, "project", lambda args, result: hear("bias and RoPE", *result))
    _after(attention, "attend", lambda args, result: hear("attention", result))
    _after(attention, "add", lambda args, result: hear("bias and residual", result))
    moe.router = heard(moe.router, "router", before="norm of the experts")
    _after(moe, "route", lambda args, result: hear_choice(*result))
    weights = cast(Any, moe.experts).weights
    _after(weights, "activate", lambda args, result: hear_pairs("gate_up", args[0]))
    _after(weights, "activate", lambda args, result: hear_pairs("bias and SwiGLU", result))
    _after(weights, "add_bias", lambda args, result: hear_pairs("down", args[0]))
    _after(moe, "add", lambda args, result: hear("bias and sum of experts", result))


def _after(part: object, method: str, listener: Callable[[tuple[Any, ...], Any], None]) -> None:
    """Let a method of one object tell its arguments and its result."""
    inner = getattr(part, method)

    def listened(*args: Any) -> Any:
        result = inner(*args)
        listener(args, result)
        return result

    object.__setattr__(part, method, listened)  # some parts are frozen
