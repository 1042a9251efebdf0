"""What each kernel may stand in for in a model, and what it is examined with there.

It is compared on the model's own weights with random activations, and timed in a decoded token's way through
some of the layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.cache import FullCache, KVBits, SlidingCache
from mlx_gptoss.model.config import FULL, SLIDING
from mlx_gptoss.model.experts import ExpertWeights, ResidentExperts
from mlx_gptoss.model.graph import Layer, MixtureOfExperts, Model
from mlx_gptoss.model.kernels.attention import attention
from mlx_gptoss.model.kernels.down import down
from mlx_gptoss.model.kernels.gate_up import gate_up
from mlx_gptoss.model.kernels.kernel import Kernel
from mlx_gptoss.model.kernels.layer import LayerKernels, OwnAttention
from mlx_gptoss.model.kernels.router import router
from mlx_gptoss.model.kernels.verified import Examination, Outputs
from mlx_gptoss.model.projection import dense_of
from mlx_gptoss.model.sequence_cache import SequenceCache

# Layers of the step that is timed: of both kinds, and more than a chip's caches hold of 20b.
STEP_LAYERS = 4
# Keys that attention over everything is compared and timed with.
COMPARED_KEYS = (1, 31, 257, 1000, 4097)
TIMED_KEYS = (512, 4096, 16384)
# Keys before a token where another kernel than attention is timed.
USUAL_KEYS = 256
DRAWS = 4  # of activations for each layer compared

Part = Literal["attention", "router", "gate_up", "down"]
Operands = tuple[mx.array, ...]


@dataclass(frozen=True)
class Candidate:
    """A kernel in a model.

    part: of LayerKernels. kind: of the layers that it is for, None for all. operands: of a layer, what the
    kernel takes beside the activations; None where it does not suit the layer. at: where they stand among
    them. activations: random ones for a layer, by a number that is a seed or, for attention, the keys.
    """

    name: str
    part: Part
    kernel: Kernel
    operands: Callable[[Layer], Operands | None]
    activations: Callable[[Layer, int], Operands]
    at: int = 1
    kind: str | None = None
    kv_bits: KVBits = (None, None)  # of the sequences that it is for
    compared: Sequence[int] = range(DRAWS)
    timed: Sequence[int] = (USUAL_KEYS,)
    ordered: Callable[[Outputs], Outputs] = lambda outputs: outputs

    def arguments(self, layer: Layer, activations: Operands) -> Operands | None:
        """As the kernel takes them; None where it does not take them."""
        operands = self.operands(layer) if self.kind in (None, layer.attention.kind) else None
        if operands is None:
            return None
        arguments = (*activations[: self.at], *operands, *activations[self.at :])
        return arguments if self.kernel.accepts(*arguments) else None

    def bound(self, layer: Layer, since: int = 0) -> dict[str, Any]:
        """What of LayerKernels a layer gets by it: nothing where it does not suit the layer."""
        if self.arguments(layer, self.activations(layer, 1)) is None:
            return {}
        operands = self.operands(layer)
        assert operands is not None
        kernel, at = self.kernel, self.at

        def run(*activations: mx.array) -> Any:
            outputs = kernel(*activations[:at], *operands, *activations[at:])
            return outputs[0] if len(outputs) == 1 else outputs

        bits = self.kv_bits if self.kind == FULL else (None, None)
        return {self.part: OwnAttention(run, since, bits) if self.part == "attention" else run}

    def kept_as(self, facts: str) -> str:
        """The name of its verdict. facts: what that is about beside the kernel."""
        return f"{self.name} {facts} {self.kernel.source_hash[:16]}"

    def examination(self, model: Model, facts: str) -> Examination:
        """What its verdict is based on; facts as in `kept_as`."""
        suited = [layer for layer in model.layers if self.bound(layer)]
        some = {id(layer): layer for layer in (suited[0], suited[len(suited) // 2], suited[-1])}.values()

        def inputs(layer: Layer, number: int) -> Operands:
            arguments = self.arguments(layer, self.activations(layer, number))
            return () if arguments is None else arguments

        most = model.config.max_position
        steps = [
            (size, Step(model, self, size)) for size in self.timed if size < most or size == self.timed[0]
        ]
        made = [
            partial(inputs, layer, number) for layer in some for number in self.compared if number <= most
        ]
        return Examination(self.kernel, self.kept_as(facts), made, steps, self.ordered)


class Step:
    """A decoded token's way through some layers, with so many keys before it."""

    def __init__(self, model: Model, candidate: Candidate, keys: int) -> None:
        self._model, self._candidate, self._keys = model, candidate, keys
        self._cache: SequenceCache | None = None

    def __call__(self, own: bool) -> list[mx.array]:
        """What comes out of the last layer; own: with the kernel."""
        if self._cache is None:
            self._prepare()
        assert self._cache is not None
        x = self._x
        batch = Batch([Segment(1, self._cache)], self._model.config.experts_per_token)
        for layer in self._layers[own]:
            x = layer(x, batch)
        self._cache.advance(1)
        self._cache.rewind(self._keys)
        return [x]

    def _prepare(self) -> None:
        model, n = self._model, self._keys
        first = next(i for i, layer in enumerate(model.layers) if self._candidate.bound(layer))
        chosen = model.layers[first : first + STEP_LAYERS]
        self._layers = {own: [self._copy(layer, own) for layer in chosen] for own in (True, False)}
        self._cache = SequenceCache(model.config, model.dtype, self._candidate.kv_bits)
        for layer in chosen:
            cache = self._cache.layers[layer.attention.index]
            old = _normal(n, (2, 1, layer.attention.kv_heads, n, layer.attention.channels), model.dtype)
            if isinstance(cache, SlidingCache):
                seen = min(n, self._cache.window_history)
                cache.restart(n - seen, old[0, :, :, n - seen :], old[1, :, :, n - seen :])
            else:
                cache.update_and_fetch(old[0], old[1])
        self._cache.advance(n)
        self._x = _normal(n, (1, model.config.hidden_size), model.dtype)
        mx.eval(self._cache.arrays(), self._x)

    def _copy(self, layer: Layer, own: bool) -> Layer:
        """The layer, sharing its weights, with this kernel or none."""
        made = Layer(copy.copy(layer.attention), copy.copy(layer.moe))
        made.use(LayerKernels(**(self._candidate.bound(layer) if own else {})))
        return made


def candidates(model: Model, kv_bits: KVBits = (None, None)) -> Iterator[Candidate]:
    """Those that suit some layer of a model; none where experts are read when they are chosen.

    kv_bits: of the full layers' keys and values in the sequences to come.
    """
    if not all(isinstance(layer.moe.experts, ResidentExperts) for layer in model.layers):
        return
    for made in (
        _attention(model, FULL, kv_bits),
        _attention(model, SLIDING, kv_bits),
        _router(model),
        _gate_up(model),
        _down(model),
    ):
        if any(made.bound(layer) for layer in model.layers):
            yield made


def _normal(seed: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _attention(model: Model, kind: str, kv_bits: KVBits) -> Candidate:
    config = model.config
    window = config.sliding_window if kind == SLIDING else 0
    around = (1, window - 1, window) if window else COMPARED_KEYS
    bits = kv_bits if kind == FULL else (None, None)
    name = f"attention over {'a window' if window else 'everything'}"
    if bits != (None, None):
        name += ", keys and values in {} and {} bits".format(*(b or "all" for b in bits))

    def activations(layer: Layer, keys: int) -> Operands:
        """As caches give them: views of slabs with room for more."""
        heads, kv_heads, channels = layer.attention.heads, layer.attention.kv_heads, layer.attention.channels
        q = _normal(keys, (1, heads, 1, channels), model.dtype)
        k, v = _normal(keys + 1, (2, 1, kv_heads, keys + 64, channels), model.dtype)
        cache = SequenceCache(config, model.dtype, bits).layers[layer.attention.index]
        stored = cache.encode(k, v) if isinstance(cache, FullCache) else [k, v]
        return q, *(array[:, :, :keys] for array in stored)

    return Candidate(
        name,
        "attention",
        attention(scale=model.layers[0].attention.scale, window=window, bits=bits),
        lambda layer: (layer.attention.sinks,),
        activations,
        at=1 + sum(1 if b is None else 3 for b in bits),
        kind=kind,
        kv_bits=kv_bits,
        compared=sorted({max(1, n) for n in around}),
        timed=(window,) if window else TIMED_KEYS,
    )


def _router(model: Model) -> Candidate:
    config = model.config
    k = config.experts_per_token
    unpacked: dict[int, mx.array] = {}  # of the layers whose router is quantised: a few MB in all

    def operands(layer: Layer) -> Operands | None:
        dense = dense_of(layer.moe.router)
        if dense is None or dense.bias is None:
            return None
        weight, index = dense.matrix.weight, layer.attention.index
        if dense.matrix.quantization is not None:
            if index not in unpacked:
                # Rounded to the dtype, which moves a score about as much as MLX's rounding of the score does.
                unpacked[index] = dense.matrix.dense(model.dtype)
                mx.eval(unpacked[index])
            weight = unpacked[index]
        return layer.moe.norm, weight, dense.bias

    def activations(layer: Layer, seed: int) -> Operands:
        """A row whose choice is clear: experts that nearly tie may be chosen either way."""
        rows = _normal(seed, (16, 1, config.hidden_size), model.dtype)
        found = operands(layer)
        if found is None:
            return (rows[0],)
        norm, weight, bias = (a.astype(mx.float32) for a in found)
        normed = mx.fast.rms_norm(rows.astype(mx.float32), norm, config.rms_norm_eps)
        scores = mx.sort(normed @ weight.T + bias, axis=-1)[:, 0]
        clear = scores[:, -k] - scores[:, -k - 1] if k < scores.shape[1] else scores[:, 0]
        return (rows[mx.argmax(clear)],)

    def ordered(outputs: Outputs) -> Outputs:
        rows, chosen, weights = outputs
        order = mx.argsort(chosen, axis=-1)
        return [rows, mx.take_along_axis(chosen, order, -1), mx.take_along_axis(weights, order, -1)]

    kernel = router(eps=config.rms_norm_eps, k=k)
    return Candidate("router", "router", kernel, operands, activations, ordered=ordered)


def _gate_up(model: Model) -> Candidate:
    experts = model.layers[0].moe.experts
    assert isinstance(experts, ResidentExperts)
    how = experts.weights

    def operands(layer: Layer) -> Operands | None:
        weights = _weights(layer)
        if weights is None or weights.gate_up.scales is None:
            return None
        return weights.gate_up.weight, weights.gate_up.scales, weights.bias

    def activations(layer: Layer, seed: int) -> Operands:
        return _normal(seed, (1, model.config.hidden_size), model.dtype), _chosen(model, seed)

    kernel = gate_up(limit=how.limit, alpha=how.alpha, interleaved=how.interleaved)
    return Candidate("gate_up", "gate_up", kernel, operands, activations)


def _down(model: Model) -> Candidate:
    k, hidden, inner = (
        model.config.experts_per_token,
        model.config.hidden_size,
        model.config.intermediate_size,
    )

    def operands(layer: Layer) -> Operands | None:
        weights = _weights(layer)
        if weights is None or weights.down.scales is None:
            return None
        return weights.down.weight, weights.down.scales, weights.bias

    def activations(layer: Layer, seed: int) -> Operands:
        h = _normal(seed, (1, k, inner), model.dtype)
        weights = mx.softmax(_normal(seed + 1, (1, k), mx.float32), axis=-1).astype(model.dtype)
        return h, _chosen(model, seed), weights, _normal(seed + 2, (1, hidden), model.dtype)

    return Candidate("down", "down", down(), operands, activations)


def _weights(layer: Layer) -> ExpertWeights | None:
    """Those of a layer whose experts' outputs are added up as in MixtureOfExperts itself."""
    experts = layer.moe.experts
    if type(layer.moe) is not MixtureOfExperts or not isinstance(experts, ResidentExperts):
        return None
    return experts.weights


def _chosen(model: Model, seed: int) -> mx.array:
    """Experts, none of them twice, the first or the last one among them, uint32 [1, k]."""
    count, k = model.config.num_experts, model.config.experts_per_token
    end = seed % 2 * (count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return mx.array(np.array([end, *order[order != end]], np.uint32)[None, :k])
