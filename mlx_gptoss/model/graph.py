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
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_gptoss.device import fuse, on_gpu
from mlx_gptoss.model import cpu
from mlx_gptoss.model.cache import Mask, SequenceCache
from mlx_gptoss.model.config import ModelConfig, YarnConfig
from mlx_gptoss.model.matrix import Embedding, Matrix, Projection

# Below this many (token, expert) pairs, sorting the pairs by expert costs a GPU more than it saves.
SORT_FROM = 64


@dataclass(frozen=True)
class Segment:
    """The next `length` tokens of one sequence, whose earlier tokens are in `cache`."""

    length: int
    cache: SequenceCache


class Batch:
    """What the layers share during one forward: positions, masks and row numbers."""

    def __init__(self, segments: Sequence[Segment], experts_per_token: int) -> None:
        self.segments = segments
        self.tokens = sum(s.length for s in segments)
        spans = [np.arange(s.cache.offset, s.cache.offset + s.length, dtype=np.int32) for s in segments]
        self.positions = mx.array(np.concatenate(spans))
        self.bounds = np.cumsum([s.length for s in segments])[:-1].tolist()
        self.masks: list[dict[str, Mask]] = [s.cache.masks(s.length) for s in segments]
        k = experts_per_token
        pairs = np.arange(self.tokens * k, dtype=np.uint32).reshape(self.tokens, k)
        self.token_of_pair = mx.array(pairs // k)  # [T, k]: the row of x that each expert reads
        self.pair = mx.array(pairs)


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
        self.frequencies = 1.0 / mx.array(yarn_inverse_frequencies(config))
        # YaRN multiplies the rotated q and k by a factor each (Peng et al. 2023, eq. 22); their product goes
        # into the scale of the scores, so the cache holds plainly rotated keys. Sinks are not scaled.
        self.scale = yarn_attention_factor(config.rope) ** 2 / math.sqrt(config.head_dim)
        self.norm, self.qkv, self.qkv_bias = norm, qkv, qkv_bias
        self.out, self.out_bias, self.sinks = out, out_bias, sinks

    def __call__(self, x: mx.array, batch: Batch) -> mx.array:
        """x [T, D] -> x plus attention, [T, D]."""
        h, kv, c = self.heads, self.kv_heads, self.channels
        rows = mx.fast.rms_norm(x, self.norm, self.eps)
        qkv = (self.qkv(rows) + self.qkv_bias).reshape(batch.tokens, h + 2 * kv, 1, c)
        # One rotation for the heads of q and k together; a row is a batch entry with an offset of its own.
        qk = mx.fast.rope(
            qkv[:, : h + kv],
            c,
            traditional=False,
            base=None,
            scale=1.0,
            offset=batch.positions,
            freqs=self.frequencies,
        )
        parts = (qk[:, :h], qk[:, h:], qkv[:, h + kv :])
        split = (mx.split(part.transpose(2, 1, 0, 3), batch.bounds, axis=2) for part in parts)
        outputs = [
            segment.cache.layers[self.index].attend(
                q, k, v, scale=self.scale, sinks=self.sinks, mask=masks[self.kind]
            )
            for segment, masks, q, k, v in zip(batch.segments, batch.masks, *split, strict=True)
        ]
        merged = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
        merged = merged.transpose(0, 2, 1, 3).reshape(batch.tokens, h * c)
        return _add_bias_and_residual(self.out(merged), self.out_bias, x)

    def arrays(self) -> list[mx.array]:
        return [self.norm, self.qkv_bias, self.out_bias, self.sinks, *self.qkv.arrays(), *self.out.arrays()]


class Router:
    """Scores of all experts for a row: a plain linear layer."""

    def __init__(self, weight: Matrix, bias: mx.array) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: mx.array) -> mx.array:
        if self.weight.quantization is None:
            return mx.addmm(self.bias, x, self.weight.weight.T)
        return self.weight.apply(x) + self.bias

    def arrays(self) -> list[mx.array]:
        return [self.bias, *self.weight.arrays()]


class Experts:
    """The stacked experts' two matrices and biases.

    gate_up is [E, 2F, D] with rows gate, up, gate, up .. when `interleaved` (as published), else all
    gates and then all ups; down is [E, D, F]. `bias` is [E, 2F + D]: the gate_up bias and the down bias side
    by side, so that one gather fetches both.
    """

    def __init__(
        self, gate_up: Matrix, down: Matrix, bias: mx.array, config: ModelConfig, *, interleaved: bool
    ) -> None:
        self.gate_up = gate_up if on_gpu() else cpu.expert_stack(gate_up)
        self.down = down if on_gpu() else cpu.expert_stack(down)
        self.bias = bias
        self.width = gate_up.outputs
        self.interleaved = interleaved
        swiglu = _swiglu_interleaved if interleaved else _swiglu_halves
        self.activate = partial(swiglu, limit=config.swiglu_limit, alpha=config.swiglu_alpha)

    def __call__(self, x: mx.array, chosen: mx.array, batch: Batch) -> mx.array:
        """x [T, D], chosen experts [T, k] -> their outputs [T, k, D]."""
        if on_gpu() and chosen.size >= SORT_FROM:
            return self._sorted(x, chosen)
        gate_up, down = self.gate_up, self.down
        if not (isinstance(gate_up, Matrix) or isinstance(down, Matrix)) and gate_up.pays_by_expert(
            x, chosen
        ):
            return self._by_expert(gate_up, down, x, chosen)
        bias = self.bias[chosen]
        h = self.gate_up.gather(x[:, None], chosen, batch.token_of_pair).squeeze(-2)
        h = self.activate(h, bias[..., : self.width])
        pairs = h.reshape(chosen.size, 1, -1)
        y = self.down.gather(pairs, chosen, batch.pair).squeeze(-2)
        return y + bias[..., self.width :]

    def _sorted(self, x: mx.array, chosen: mx.array) -> mx.array:
        """The same with the (token, expert) pairs in the experts' order: a GPU reads each expert once."""
        flat = chosen.flatten()
        order = mx.argsort(flat)
        experts = flat[order]
        bias = self.bias[experts]
        rows = x[order // chosen.shape[-1]][:, None]
        h = self.gate_up.gather(rows, experts, None, in_order=True).squeeze(-2)
        h = self.activate(h, bias[..., : self.width])
        y = self.down.gather(h[:, None], experts, None, in_order=True).squeeze(-2)
        y = y + bias[..., self.width :]
        return y[mx.argsort(order)].reshape(*chosen.shape, -1)

    def _by_expert(self, gate_up: cpu.Stack, down: cpu.Stack, x: mx.array, chosen: mx.array) -> mx.array:
        """The same on the CPU backend for many rows: expert by expert, products by the host's BLAS."""
        experts = np.asarray(chosen).reshape(-1)
        rows = np.repeat(np.asarray(x), chosen.shape[-1], axis=0)
        bias = self.bias[chosen].reshape(len(experts), -1)
        h = mx.array(gate_up.by_expert(rows, experts))
        h = self.activate(h, bias[:, : self.width])
        y = mx.array(down.by_expert(np.asarray(h), experts))
        return (y + bias[:, self.width :]).reshape(*chosen.shape, -1)

    def arrays(self) -> list[mx.array]:
        return [self.bias, *self.gate_up.arrays(), *self.down.arrays()]


class MixtureOfExperts:
    """The router picks k experts a token; their outputs are summed with the softmax of the k scores."""

    def __init__(self, config: ModelConfig, *, norm: mx.array, router: Router, experts: Experts) -> None:
        self.k = config.experts_per_token
        self.eps = config.rms_norm_eps
        self.norm, self.router, self.experts = norm, router, experts

    def __call__(self, x: mx.array, batch: Batch) -> mx.array:
        """x [T, D] -> x plus the experts' sum, [T, D]."""
        rows = mx.fast.rms_norm(x, self.norm, self.eps)
        scores = self.router(rows)
        chosen = mx.argpartition(scores, kth=-self.k, axis=-1)[:, -self.k :]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1, precise=True)
        y = self.experts(rows, chosen, batch)
        return mx.addmm(x[:, None], weights[:, None], y).squeeze(1)

    def arrays(self) -> list[mx.array]:
        return [self.norm, *self.router.arrays(), *self.experts.arrays()]


class Layer:
    """Attention, then the mixture of experts; each adds to the residual stream."""

    def __init__(self, attention: Attention, moe: MixtureOfExperts) -> None:
        self.attention, self.moe = attention, moe

    def __call__(self, x: mx.array, batch: Batch) -> mx.array:
        return self.moe(self.attention(x, batch), batch)

    def arrays(self) -> list[mx.array]:
        return [*self.attention.arrays(), *self.moe.arrays()]


class Model:
    """Embedding, layers, final norm and head."""

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

    def __call__(
        self, tokens: mx.array, segments: Sequence[Segment], rows: Sequence[int] | None = None
    ) -> mx.array | None:
        """Run the next tokens of each segment and move their caches.

        tokens int32 [T]: the segments' tokens end to end. rows: the rows whose logits are wanted (None: all).
        Returns logits [R, vocab] in the compute dtype, or None when R is 0. Lazy: evaluate the result, or
        the caches' arrays when there is none.
        """
        batch = Batch(segments, self.config.experts_per_token)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, batch)
        for segment in segments:
            segment.cache.advance(segment.length)
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
        """Index, counted in channels / 2, of the pair that turns so often within the original context."""
        wavelength = rope.original_max_position / (times * 2 * math.pi)
        return c * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c - 1)
    if low == high:
        high += 0.001  # an empty ramp is a step
    slowed = np.clip((np.arange(c // 2) - low) / (high - low), 0, 1)
    return (frequency * (1 - slowed) + frequency / rope.factor * slowed).astype(np.float32)


@fuse
def _add_bias_and_residual(y: mx.array, bias: mx.array, x: mx.array) -> mx.array:
    return x + (y + bias)


def _swiglu(gate: mx.array, up: mx.array, limit: float, alpha: float) -> mx.array:
    """gate clamped from above only, up on both sides: gate * sigmoid(alpha * gate) * (up + 1)."""
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
