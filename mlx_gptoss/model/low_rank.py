"""Low-rank adapters (LoRA, Hu et al. 2021) beside the weights: y += x @ a.T @ b.T, each row with its own
adapter.

An adapter has a number > 0; a Segment names the one that its rows run with. A batch without adapters, or a
row without one, costs nothing or nearly so; a batch with a single adapter takes two products a matrix; rows
of several adapters are gathered from stacks in which adapter 0 is zero (S-LoRA, Sheng et al. 2023, with MLX's
own gathering product). Training runs the very same operations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.batch import Batch, Pairs
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.cpu import low_rank
from mlx_gptoss.model.graph import Layer
from mlx_gptoss.model.projection import Projection, replayable

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUTER = "router"
EXPERTS = ("gate_up_proj", "down_proj")
PARTS = (*ATTENTION, ROUTER, *EXPERTS)
_FUSED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Pair:
    """a [.., rank, inputs] and b [.., outputs, rank], of one matrix or of a stack of experts [E, ..]."""

    a: mx.array
    b: mx.array

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])

    def scaled(self, scale: float, dtype: mx.Dtype) -> Pair:
        """The pair with the scale in b, in the dtype of the activations."""
        return Pair(self.a.astype(dtype), (scale * self.b).astype(dtype))


def part_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices that may be adapted (of each expert's)."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q_proj": (q, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "o_proj": (d, q),
        ROUTER: (config.num_experts, d),
        "gate_up_proj": (2 * f, d),
        "down_proj": (d, f),
    }


class _Pairs:
    """The pairs of one matrix by the adapters' numbers, and all of them as one stack once it is needed."""

    def __init__(self) -> None:
        self.by_number: dict[int, Pair] = {}
        self._stack: Pair | None = None

    def put(self, number: int, pair: Pair | None) -> None:
        """Add or, with None, remove an adapter's pair."""
        self._stack = None
        self.by_number.pop(number, None)
        if pair is not None:
            self.by_number[number] = pair

    def only(self, batch: Batch) -> tuple[bool, Pair | None]:
        """Whether all rows run with one adapter (or none), and its pair."""
        if not self.by_number or batch.adapters.isdisjoint(self.by_number):
            return True, None
        if len(batch.adapters) > 1:
            return False, None
        (number,) = batch.adapters
        return True, self.by_number[number]

    @property
    def stack(self) -> Pair:
        """A [n, .., rank, inputs] and b [n, .., outputs, rank] of all numbers below n, ranks padded."""
        if self._stack is None:
            rank, some = max(p.rank for p in self.by_number.values()), next(iter(self.by_number.values()))
            none = Pair(mx.zeros_like(some.a), mx.zeros_like(some.b))
            pairs = [self.by_number.get(n, none) for n in range(max(self.by_number) + 1)]
            self._stack = Pair(
                mx.stack([_padded(p.a, -2, rank) for p in pairs]),
                mx.stack([_padded(p.b, -1, rank) for p in pairs]),
            )
        return self._stack

    def arrays(self) -> list[mx.array]:
        return [array for p in self.by_number.values() for array in (p.a, p.b)]


class AdaptedProjection:
    """A projection with adapters beside it."""

    def __init__(self, base: Projection) -> None:
        self.base = base
        self.pairs = _Pairs()
        self.replayable = replayable(base)

    def __call__(self, x: mx.array, batch: Batch | None = None) -> mx.array:
        y = self.base(x, batch)
        if batch is None:
            return y
        uniform, pair = self.pairs.only(batch)
        if uniform:
            return y if pair is None else y + low_rank(x, pair.a, pair.b)
        stack, numbers = self.pairs.stack, _within(batch, self.pairs.stack)
        z = mx.gather_mm(x[:, None], stack.a.swapaxes(-1, -2), rhs_indices=numbers)
        return y + mx.gather_mm(z, stack.b.swapaxes(-1, -2), rhs_indices=numbers).squeeze(1)

    def arrays(self) -> list[mx.array]:
        return [*self.base.arrays(), *self.pairs.arrays()]


class ExpertAdapters:
    """The adapters of a layer's experts (see graph.AdaptedExperts)."""

    def __init__(self) -> None:
        self.pairs = {name: _Pairs() for name in EXPERTS}

    def of(self, chosen: mx.array, batch: Batch) -> ChosenPairs | None:
        """What they add for the experts chosen for each row [T, k]; None where no row has one of them."""
        if not batch.adapted:
            return None
        found: dict[str, tuple[Pair, mx.array]] = {}
        for name, pairs in self.pairs.items():
            uniform, pair = pairs.only(batch)
            if pair is not None:
                found[name] = (pair, chosen)
            elif not uniform:
                stack = pairs.stack
                count = stack.a.shape[1]
                flat = Pair(stack.a.flatten(0, 1), stack.b.flatten(0, 1))
                found[name] = (flat, chosen + _within(batch, stack)[:, None] * count)
        return ChosenPairs(found) if found else None


@dataclass(frozen=True)
class ChosenPairs:
    """As batch.LowRank. By the matrix's name: its pairs, stacked, and which one each row takes [T, k]."""

    by_name: Mapping[str, tuple[Pair, mx.array]]

    def gate_up(self, x: mx.array, pairs: Pairs) -> mx.array:
        """As LowRank.gate_up."""
        return self._added("gate_up_proj", x[:, None], pairs.token_of_pair)

    def down(self, h: mx.array, pairs: Pairs) -> mx.array:
        """As LowRank.down."""
        return self._added("down_proj", h.reshape(-1, 1, h.shape[-1]), pairs.pair)

    def some(self, pairs: np.ndarray) -> ChosenPairs:
        """As LowRank.some."""
        at = mx.array(pairs.astype(np.uint32))
        return ChosenPairs({n: (p, which.flatten()[at][:, None]) for n, (p, which) in self.by_name.items()})

    def _added(self, name: str, x: mx.array, rows: mx.array) -> mx.array:
        """X [N, 1, inputs] by the rows [T, k] of the pairs -> [T, k, outputs]."""
        if name not in self.by_name:
            return mx.zeros((1, 1, 1), x.dtype)
        pair, which = self.by_name[name]
        z = mx.gather_mm(x, pair.a.swapaxes(-1, -2), lhs_indices=rows, rhs_indices=which)
        y = mx.gather_mm(z.reshape(which.size, 1, -1), pair.b.swapaxes(-1, -2), rhs_indices=which.flatten())
        return y.reshape(*which.shape, -1)


def adaptable(layer: Layer) -> Layer:
    """The layer with room for adapters: a shallow copy that shares every weight."""
    attention, moe = copy.copy(layer.attention), copy.copy(layer.moe)
    attention.qkv, attention.out = AdaptedProjection(attention.qkv), AdaptedProjection(attention.out)
    moe.router = AdaptedProjection(moe.router)
    return Layer(attention, moe)


def put_adapter(
    layer: Layer, number: int, parts: Mapping[str, Pair], scale: float, *, interleaved: bool
) -> None:
    """Give an adaptable layer an adapter's parts, in place of those it has; none of them removes it.

    `parts` by name (PARTS); gate_up_proj's outputs are rows gate, up, gate, up, as published. interleaved:
    whether the layer's own weights have them so (see ExpertWeights).
    """
    attention, moe = layer.attention, layer.moe
    dtype = attention.norm.dtype
    pairs: dict[str, Pair | None] = {name: pair.scaled(scale, dtype) for name, pair in parts.items()}
    h, kv, c = attention.heads, attention.kv_heads, attention.channels
    for projection, pair in (
        (attention.qkv, side_by_side([pairs.get(n) for n in _FUSED], [h * c, kv * c, kv * c])),
        (attention.out, pairs.get("o_proj")),
        (moe.router, pairs.get(ROUTER)),
    ):
        assert isinstance(projection, AdaptedProjection)
        projection.pairs.put(number, pair)
    added = moe.adapters if isinstance(moe.adapters, ExpertAdapters) else ExpertAdapters()
    for name in EXPERTS:
        pair = pairs.get(name)
        if pair is not None and name == "gate_up_proj" and not interleaved:
            pair = Pair(pair.a, mx.concatenate([pair.b[:, ::2], pair.b[:, 1::2]], axis=1))
        added.pairs[name].put(number, pair)
    moe.adapters = added if any(p.by_number for p in added.pairs.values()) else None


def side_by_side(pairs: Sequence[Pair | None], outputs: Sequence[int]) -> Pair | None:
    """One pair for matrices that stand one above the other: ranks side by side, b block-diagonal."""
    present = [p for p in pairs if p is not None]
    if not present:
        return None
    rank, at = sum(p.rank for p in present), 0
    blocks = []
    for pair, count in zip(pairs, outputs, strict=True):
        if pair is None:
            blocks.append(mx.zeros((count, rank), present[0].b.dtype))
            continue
        left, right = (
            mx.zeros((count, at), pair.b.dtype),
            mx.zeros((count, rank - at - pair.rank), pair.b.dtype),
        )
        blocks.append(mx.concatenate([left, pair.b, right], axis=1))
        at += pair.rank
    return Pair(mx.concatenate([p.a for p in present]), mx.concatenate(blocks))


def adapter_arrays(layers: Iterable[Layer]) -> list[mx.array]:
    """What the adapters of adaptable layers hold: to evaluate after `put_adapter`."""
    found = []
    for layer in layers:
        for projection in (layer.attention.qkv, layer.attention.out, layer.moe.router):
            assert isinstance(projection, AdaptedProjection)
            found += projection.pairs.arrays()
        if isinstance(layer.moe.adapters, ExpertAdapters):
            found += [a for pairs in layer.moe.adapters.pairs.values() for a in pairs.arrays()]
    return found


def _within(batch: Batch, stack: Pair) -> mx.array:
    """The adapter of each row, 0 for those that the stack does not know, uint32 [T]."""
    numbers = batch.adapter_of_row
    return mx.where(numbers < len(stack.a), numbers, 0).astype(mx.uint32)


def _padded(array: mx.array, axis: int, size: int) -> mx.array:
    """Zeros appended along an axis up to a size."""
    missing = size - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return mx.pad(array, widths)
