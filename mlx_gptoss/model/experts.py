"""A layer's experts and how they are applied. Experts is the seam: the reader chooses who stands there.

Shapes: T tokens, k experts a token, E experts, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import mlx.core as mx

from mlx_gptoss.device import fuse
from mlx_gptoss.model.batch import Batch, Pairs
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.matrix import Matrix

# From so many (token, expert) pairs an expert on, MLX multiplies each expert's rows together on Metal if they
# are sorted (GatherQMM::eval_gpu). With fewer, sorting costs a GPU about what it saves.
SORT_FROM = 4


def grouped_rows(config: ModelConfig) -> int:
    """From how many rows on each expert's are multiplied together, where all experts are in memory."""
    return SORT_FROM * config.num_experts // config.experts_per_token


class Experts(Protocol):
    """The way in which a layer's experts are applied."""

    def __call__(self, x: mx.array, chosen: mx.array, batch: Batch) -> mx.array:
        """X [T, D], the experts chosen for each row [T, k] -> their outputs [T, k, D]."""
        ...

    def arrays(self) -> list[mx.array]:
        """Every weight that is in memory."""
        ...


Way: TypeAlias = Callable[[mx.array, mx.array, Pairs], mx.array]
"""How rows, the experts chosen for them and their pairs become outputs; arguments as those of Experts."""


class ExpertsInMemory(Experts, Protocol):
    """Experts that are applied in one of several ways, which the number of rows decides.

    Part of the rows, applied in the way of all of them, gives the same bits: an expert's rows must stay
    together.
    """

    def way(self, x: mx.array, chosen: mx.array) -> Way: ...


class Stack(Protocol):
    """The matrices of all experts, of which each row takes one; a Matrix is one."""

    def gather(
        self, x: mx.array, experts: mx.array, rows: mx.array | None, *, in_order: bool = False
    ) -> mx.array: ...


@dataclass(frozen=True)
class ExpertWeights:
    """The stacked experts' two matrices and biases, and the numbers of their activation.

    gate_up is [E, 2F, D] with rows gate, up, gate, up .. when `interleaved` (as published), else all
    gates and then all ups; down is [E, D, F]. `bias` is [E, 2F + D]: the gate_up bias and the down bias side
    by side, so that one gather fetches both.
    """

    gate_up: Matrix
    down: Matrix
    bias: mx.array
    interleaved: bool
    limit: float
    alpha: float

    def activate(self, h: mx.array, bias: mx.array) -> mx.array:
        """SwiGLU of gate_up's outputs [.., 2F] and the experts' biases [.., 2F + D] -> [.., F]."""
        own = bias[..., : self.gate_up.outputs]
        return swiglu(h, own, interleaved=self.interleaved, limit=self.limit, alpha=self.alpha)

    def add_bias(self, y: mx.array, bias: mx.array) -> mx.array:
        """Down's outputs [.., D] plus their part of the biases [.., 2F + D]."""
        return y + bias[..., self.gate_up.outputs :]

    def arrays(self) -> list[mx.array]:
        return [self.bias, *self.gate_up.arrays(), *self.down.arrays()]


def by_pair(
    weights: ExpertWeights, gate_up: Stack, down: Stack, x: mx.array, chosen: mx.array, batch: Pairs
) -> mx.array:
    """Every (token, expert) pair by itself, in the tokens' order; the stacks hold the weights' matrices."""
    bias = weights.bias[chosen]
    h = _hidden(weights, gate_up, x, chosen, bias, batch)
    return _outputs(weights, down, h, chosen, bias, batch)


def _hidden(
    weights: ExpertWeights, gate_up: Stack, x: mx.array, chosen: mx.array, bias: mx.array, batch: Pairs
) -> mx.array:
    """The pairs' activations [T, k, F]."""
    h = gate_up.gather(x[:, None], chosen, batch.token_of_pair).squeeze(-2)
    if batch.low_rank is not None:
        h = h + batch.low_rank.gate_up(x, batch)
    return weights.activate(h, bias)


def _outputs(
    weights: ExpertWeights, down: Stack, h: mx.array, chosen: mx.array, bias: mx.array, batch: Pairs
) -> mx.array:
    """The pairs' outputs [T, k, D]."""
    y = down.gather(h.reshape(chosen.size, 1, -1), chosen, batch.pair).squeeze(-2)
    if batch.low_rank is not None:
        y = y + batch.low_rank.down(h, batch)
    return weights.add_bias(y, bias)


class ResidentExperts:
    """All experts in memory, applied by MLX's gathering products: the way on a GPU."""

    replayable = True

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights

    def __call__(self, x: mx.array, chosen: mx.array, batch: Batch) -> mx.array:
        return self.way(x, chosen)(x, chosen, batch)

    def hidden(self, x: mx.array, chosen: mx.array, batch: Batch) -> mx.array:
        """The first half for few rows: x [T, D] -> the activations [T, k, F]."""
        return _hidden(self.weights, self.weights.gate_up, x, chosen, self.weights.bias[chosen], batch)

    def outputs(self, h: mx.array, chosen: mx.array, batch: Batch) -> mx.array:
        """The second half for few rows: activations [T, k, F] -> the experts' outputs [T, k, D]."""
        return _outputs(self.weights, self.weights.down, h, chosen, self.weights.bias[chosen], batch)

    def way(self, x: mx.array, chosen: mx.array) -> Way:
        few = chosen.size < SORT_FROM * self.weights.gate_up.weight.shape[0]
        return self._as_they_come if few else self._in_order

    def _as_they_come(self, x: mx.array, chosen: mx.array, batch: Pairs) -> mx.array:
        return by_pair(self.weights, self.weights.gate_up, self.weights.down, x, chosen, batch)

    def _in_order(self, x: mx.array, chosen: mx.array, batch: Pairs) -> mx.array:
        """The pairs in the experts' order: each expert is read once."""
        weights, flat = self.weights, chosen.flatten()
        order = mx.argsort(flat)
        back = mx.argsort(order)
        experts = flat[order]
        bias = weights.bias[experts]
        rows = x[order // chosen.shape[-1]][:, None]
        h = weights.gate_up.gather(rows, experts, None, in_order=True).squeeze(-2)
        if batch.low_rank is not None:
            h = h + batch.low_rank.gate_up(x, batch).reshape(chosen.size, -1)[order]
        h = weights.activate(h, bias)
        y = weights.down.gather(h[:, None], experts, None, in_order=True).squeeze(-2)
        y = weights.add_bias(y, bias)[back].reshape(*chosen.shape, -1)
        if batch.low_rank is not None:
            y = y + batch.low_rank.down(h[back].reshape(*chosen.shape, -1), batch)
        return y

    def arrays(self) -> list[mx.array]:
        return self.weights.arrays()


def swiglu(h: mx.array, bias: mx.array, *, interleaved: bool, limit: float, alpha: float) -> mx.array:
    """SwiGLU of gate_up's outputs [.., 2F] and their biases -> [.., F]; the order as in ExpertWeights."""
    fused = _swiglu_interleaved if interleaved else _swiglu_halves
    return fused(h, bias, limit=limit, alpha=alpha)


def _swiglu(gate: mx.array, up: mx.array, limit: float, alpha: float) -> mx.array:
    """Gate clamped from above only, up on both sides: gate * sigmoid(alpha * gate) * (up + 1)."""
    gate = mx.minimum(gate, limit)
    up = mx.clip(up, -limit, limit)
    return gate * mx.sigmoid(alpha * gate) * (up + 1)


@fuse
def _swiglu_interleaved(h: mx.array, bias: mx.array, limit: float, alpha: float) -> mx.array:
    """Rows gate, up, gate, up .. [.., 2F] with their bias -> [.., F]."""
    return _swiglu(h[..., ::2] + bias[..., ::2], h[..., 1::2] + bias[..., 1::2], limit, alpha)


@fuse
def _swiglu_halves(h: mx.array, bias: mx.array, limit: float, alpha: float) -> mx.array:
    """All gates, then all ups, [.., 2F] with their bias -> [.., F]."""
    width = h.shape[-1] // 2
    return _swiglu(h[..., :width] + bias[..., :width], h[..., width:] + bias[..., width:], limit, alpha)
