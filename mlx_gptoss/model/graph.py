"""The gpt-oss graph, whole, from token ids to logits.

One forward serves everything: it takes the tokens of any number of sequences end to end ([T], "ragged")
and a Segment for each sequence. Norms, projections, router and experts run over all T rows at once; only
attention runs a segment at a time. A prompt, a chunk of a prompt beside running decodes, a batch of decodes
and the verification of a draft are the same call.

Shapes: T tokens, D hidden, F intermediate, E experts, k experts a token, Hq query heads, H KV heads,
C channels a head. Names and formulas follow the published reference (openai/gpt-oss, torch/model.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_gptoss.device import fuse, on_gpu
from mlx_gptoss.model.batch import Batch, LowRank, Segment
from mlx_gptoss.model.cache import LayerCache
from mlx_gptoss.model.config import ModelConfig, YarnConfig
from mlx_gptoss.model.experts import Experts, ResidentExperts
from mlx_gptoss.model.kernels.layer import NONE, LayerKernels, OwnAttention
from mlx_gptoss.model.matrix import Embedding
from mlx_gptoss.model.pace import USUAL, Pace, Paces
from mlx_gptoss.model.projection import Projection, replayable
from mlx_gptoss.model.sequence_cache import SequenceCache


class Attention:
    """Grouped-query attention with sinks, over everything or over a sliding window."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        norm: mx.array,
        qkv: Projection,
        qkv_bias: mx.array,
        out: Projection,
        out_bias: mx.array,
        sinks: mx.array,
    ) -> None:
        self.index = index
        self.kind = config.layer_types[index]
        self.heads, self.kv_heads = config.num_attention_heads, config.num_kv_heads
        self.channels = config.head_dim
        self.eps = config.rms_norm_eps
        self.frequencies = mx.array(1.0 / yarn_inverse_frequencies(config))
        # YaRN multiplies the rotated q and k by a factor each (Peng et al. 2023, eq. 22); their product goes
        # into the scale of the scores, so the cache holds plainly rotated keys. Sinks are not scaled.
        self.scale = yarn_attention_factor(config.rope) ** 2 / math.sqrt(config.head_dim)
        self.norm, self.qkv, self.qkv_bias = norm, qkv, qkv_bias
        self.out, self.out_bias, self.sinks = out, out_bias, sinks
        self.own: OwnAttention | None = None  # set by Layer.use

    def __call__(self, x: mx.array, batch: Batch) -> mx.array:
        """X [T, D] -> x plus attention, [T, D]."""
        return self.add(x, self.attend(*self.project(x, batch), batch), batch)

    def project(self, x: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """X [T, D] -> rotated queries [T, Hq, 1, C], rotated keys and values [T, H, 1, C]."""
        h, kv, c = self.heads, self.kv_heads, self.channels
        rows = mx.fast.rms_norm(x, self.norm, self.eps)
        qkv = (self.qkv(rows, batch) + self.qkv_bias).reshape(batch.tokens, h + 2 * kv, 1, c)
        # One rotation for all heads, v's for nothing: Metal would copy a part of them first. A row is a batch
        # entry with an offset of its own.
        rotated = mx.fast.rope(
            qkv,
            c,
            traditional=False,
            base=None,
            scale=1.0,
            offset=batch.positions,
            freqs=self.frequencies,
        )
        return rotated[:, :h], rotated[:, h : h + kv], qkv[:, h + kv :]

    def attend(self, q: mx.array, k: mx.array, v: mx.array, batch: Batch) -> mx.array:
        """`project`'s outputs, appended to each sequence's cache -> what rows attend to, [T, Hq, 1, C]."""
        single = len(batch.segments) == 1
        parts = [[a] if single else mx.split(a, batch.bounds) for a in (q, k, v)]
        outputs = []
        for segment, masks, qs, ks, vs in zip(batch.segments, batch.masks, *parts, strict=True):
            if segment.length > 1:  # a single token's rows are the same either way
                qs, ks, vs = (a.transpose(2, 1, 0, 3) for a in (qs, ks, vs))
            cache, own = segment.cache.layers[self.index], self.own
            if own is not None and isinstance(cache, LayerCache) and own.serves(segment, cache):
                y = own.run(qs, *cache.update_and_fetch_stored(ks, vs))
            else:
                y = cache.attend(qs, ks, vs, scale=self.scale, sinks=self.sinks, mask=masks[self.kind])
            outputs.append(y.transpose(2, 1, 0, 3) if segment.length > 1 else y)
        return outputs[0] if single else mx.concatenate(outputs)

    def add(self, x: mx.array, attended: mx.array, batch: Batch) -> mx.array:
        """X [T, D] plus the projection of what its rows attend to [T, Hq, 1, C]."""
        y = self.out(attended.reshape(batch.tokens, self.heads * self.channels), batch)
        return _add_bias_and_residual(y, self.out_bias, x)

    def arrays(self) -> list[mx.array]:
        return [self.norm, self.qkv_bias, self.out_bias, self.sinks, *self.qkv.arrays(), *self.out.arrays()]


class AdaptedExperts(Protocol):
    """The adapters of a layer's experts."""

    def of(self, chosen: mx.array, batch: Batch) -> LowRank | None:
        """What they add for the experts chosen for each row [T, k]; None where there is nothing."""
        ...


class MixtureOfExperts:
    """The router scores the experts of a token and k are picked; their outputs are summed with the softmax of
    the k scores.
    """

    def __init__(self, config: ModelConfig, *, norm: mx.array, router: Projection, experts: Experts) -> None:
        self.k = config.experts_per_token
        self.eps = config.rms_norm_eps
        self.norm, self.router, self.experts = norm, router, experts
        self.adapters: AdaptedExperts | None = None  # of the experts; see low_rank.py
        self.kernels = NONE  # set by Layer.use

    def __call__(self, x: mx.array, batch: Batch) -> mx.array:
        """X [T, D] -> x plus the experts' sum, [T, D]."""
        rows, chosen, weights = self.route(x, batch)
        gate_up, down, experts = self.kernels.gate_up, self.kernels.down, self.experts
        own = batch.decodes and (gate_up is not None or down is not None)
        if not own or not isinstance(experts, ResidentExperts):
            return self.add(x, weights, experts(rows, chosen, batch))
        h = experts.hidden(rows, chosen, batch) if gate_up is None else gate_up(rows, chosen)
        if down is not None:
            return down(h, chosen, weights, x)
        return self.add(x, weights, experts.outputs(h, chosen, batch))

    def route(self, x: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """X [T, D] -> the experts' inputs [T, D], the experts chosen for each row, their weights [T, k]."""
        if batch.decodes and self.kernels.router is not None:
            rows, chosen, weights = self.kernels.router(x)
            return rows, chosen, weights
        rows = mx.fast.rms_norm(x, self.norm, self.eps)
        scores = self.router(rows, batch)
        # Whom a token goes to has no gradient; how much each counts has.
        chosen = mx.stop_gradient(mx.argpartition(scores, kth=-self.k, axis=-1)[:, -self.k :])
        batch.low_rank = None if self.adapters is None else self.adapters.of(chosen, batch)
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1, precise=True)
        return rows, chosen, weights

    def add(self, x: mx.array, weights: mx.array, y: mx.array) -> mx.array:
        """X [T, D] plus the weighted sum of the experts' outputs y [T, k, D]."""
        return mx.addmm(x[:, None], weights[:, None], y).squeeze(1)

    def arrays(self) -> list[mx.array]:
        return [self.norm, *self.router.arrays(), *self.experts.arrays()]


class CompiledLayer:
    """The same layer for few rows, whose graph takes Python longer to build than a GPU to run.

    What does not touch the caches is traced once for each number of rows, before attention and after it, and
    then replayed. Rows with adapters are not served.
    """

    def __init__(self, attention: Attention, moe: MixtureOfExperts) -> None:
        # Nothing here refers to the layer: a circle would keep its weights until the garbage is collected.
        self._attention, self._moe = attention, moe

        def before(x: mx.array, *arrays: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            return attention.project(x, Batch.of_arrays(*arrays))

        def to_experts(x: mx.array, y: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
            batch = Batch.of_arrays(*arrays)
            x = attention.add(x, y, batch)
            return x, *moe.route(x, batch)

        def after(x: mx.array, y: mx.array, *arrays: mx.array) -> mx.array:
            batch = Batch.of_arrays(*arrays)
            return moe(attention.add(x, y, batch), batch)

        self._before, self._to_experts = mx.compile(before), mx.compile(to_experts)
        self._after = mx.compile(after)

    @property
    def usable(self) -> bool:
        """Whether its projections can be replayed."""
        return all(map(replayable, (self._attention.qkv, self._attention.out, self._moe.router)))

    def __call__(self, x: mx.array, batch: Batch) -> mx.array:
        """As Layer."""
        arrays = batch.arrays
        y = self._attention.attend(*self._before(x, *arrays), batch)
        if replayable(self._moe.experts):
            return self._after(x, y, *arrays)
        x, rows, chosen, weights = self._to_experts(x, y, *arrays)
        return self._moe.add(x, weights, self._moe.experts(rows, chosen, batch))


class Layer:
    """Attention, then the mixture of experts; each adds to the residual stream."""

    def __init__(self, attention: Attention, moe: MixtureOfExperts) -> None:
        self.attention, self.moe = attention, moe
        self._compiled = CompiledLayer(attention, moe)

    def use(self, kernels: LayerKernels) -> None:
        """From now on, and in copies made later, decoded tokens go through these."""
        self.attention.own, self.moe.kernels = kernels.attention, kernels
        self._compiled = CompiledLayer(self.attention, self.moe)

    def __call__(self, x: mx.array, batch: Batch) -> mx.array:
        if batch.small and on_gpu() and self._compiled.usable:
            return self._compiled(x, batch)
        return self.moe(self.attention(x, batch), batch)

    def arrays(self) -> list[mx.array]:
        return [*self.attention.arrays(), *self.moe.arrays()]


def run_layers(
    layers: Sequence[Layer],
    x: mx.array,
    segments: Sequence[Segment],
    k: int,
    paces: Paces = USUAL,
    *,
    awaited: bool = False,
) -> mx.array:
    """The segments' rows x [T, D] through these layers -> [T, D]; moves their caches. k: experts a token."""
    batch = Batch(segments, k)
    pace = Pace(batch, paces, awaited=awaited)
    for layer in layers:
        x = layer(x, batch)
        pace.built(x)
    batch.settle()
    for segment in segments:
        segment.cache.advance(segment.length)
    return x


class Model:
    """Embedding, layers, final norm and head. paces: what suits the machine, where it was measured."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Embedding,
        layers: list[Layer],
        norm: mx.array,
        head: Projection,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.embedding, self.layers, self.norm, self.head = embedding, layers, norm, head
        self.paces = USUAL

    def __call__(
        self,
        tokens: mx.array,
        segments: Sequence[Segment],
        rows: Sequence[int] | None = None,
        *,
        awaited: bool = False,
    ) -> mx.array | None:
        """Run the next tokens of each segment and move their caches.

        tokens int32 [T]: the segments' tokens end to end. rows: the rows whose logits are wanted (None: all).
        awaited: the result is read before anything else is launched (see pace.py). Returns logits [R, vocab]
        in the compute dtype, or None when R is 0. Lazy: evaluate the result, or the caches' arrays when there
        is none.
        """
        x = self.embedding(tokens)
        k = self.config.experts_per_token
        x = run_layers(self.layers, x, segments, k, self.paces, awaited=awaited)
        return self.logits(x, rows)

    def logits(self, x: mx.array, rows: Sequence[int] | None = None) -> mx.array | None:
        """Final hidden states [T, D] -> logits of the wanted rows, [R, vocab]; None when there are none."""
        if rows is not None:
            if not len(rows):
                return None
            first, last = rows[0], rows[-1]
            if list(rows) == list(range(first, last + 1)):
                x = x[first : last + 1]
            else:
                x = mx.take(x, mx.array(list(rows)), axis=0)
        return self.head(mx.fast.rms_norm(x, self.norm, self.config.rms_norm_eps))

    def make_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        return SequenceCache(self.config, self.dtype)

    def arrays(self) -> list[mx.array]:
        """Every weight."""
        return [
            *self.embedding.arrays(),
            *(a for layer in self.layers for a in layer.arrays()),
            self.norm,
            *self.head.arrays(),
        ]


def yarn_attention_factor(rope: YarnConfig) -> float:
    """YaRN's factor on the rotated q and on the rotated k (Peng et al. 2023, eq. 22)."""
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def yarn_inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """RoPE's angle per position for each pair of channels, float32 [C / 2], stretched by YaRN.

    A pair that turns more than beta_fast times within the original context keeps its frequency, one that
    turns less than beta_slow times is slowed by the factor, and between the two ends of the ramp they blend
    (Peng et al. 2023, sections 3.2 and 3.3). gpt-oss keeps the ends fractional (`truncate` false).
    """
    c, rope = config.head_dim, config.rope
    frequency = config.rope_theta ** -(np.arange(0, c, 2, dtype=np.float64) / c)
    if rope.factor <= 1:
        return frequency.astype(np.float32)

    def pair_that_turns(times: float) -> float:
        """The (fractional) index of the channel pair that turns this many times in the original context."""
        wavelength = rope.original_max_position / (times * 2 * math.pi)
        return c * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c - 1)
    if low == high:
        high += 0.001  # an empty ramp is a step
    slowed = np.clip((np.arange(c // 2) - low) / (high - low), 0, 1)
    blended: np.ndarray = frequency * (1 - slowed) + frequency / rope.factor * slowed
    return blended.astype(np.float32)


@fuse
def _add_bias_and_residual(y: mx.array, bias: mx.array, x: mx.array) -> mx.array:
    return x + (y + bias)
