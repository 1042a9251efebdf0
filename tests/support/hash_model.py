"""A model whose logits are a hash of the context that it finds in its caches.

It has real caches, of a sliding and a full layer, and no weights: a prefix reused wrongly, or a window that
is not whole, gives other tokens than `expected` computes from the tokens alone. It is fast, so that the
scheduler can be tried on many loads.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig, YarnConfig
from mlx_gptoss.model.sequence_cache import SequenceCache

WINDOW = 16
VOCAB = 211
MESSAGE = 100  # a token to begin messages with
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=8,
    intermediate_size=8,
    num_experts=2,
    experts_per_token=1,
    head_dim=4,
    num_attention_heads=1,
    num_kv_heads=1,
    vocab_size=VOCAB,
    sliding_window=WINDOW,
    layer_types=(SLIDING, FULL),
    rms_norm_eps=1e-5,
    rope_theta=150000.0,
    rope=YarnConfig(32.0, 32.0, 1.0, 4096, False),
    swiglu_limit=7.0,
    max_position=131072,
)


def logits_of(context: Sequence[int], window: Sequence[int] | None = None) -> np.ndarray:
    """float32 [vocab] after a context, of which a sliding layer sees `window` (default: its last tokens)."""
    seen = context[-WINDOW:] if window is None else window
    seed = zlib.crc32(np.array([*seen, -1, *context], np.int32).tobytes())
    return np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)


def prompt_of(seed: int, n: int) -> list[int]:
    """n tokens without MESSAGE; the first one is the seed, so that different prompts share nothing."""
    others = np.random.default_rng(seed).integers(0, VOCAB - 1, n - 1)
    return [seed, *(others + (others >= MESSAGE)).tolist()]


def expected(prompt: Sequence[int], n: int) -> list[int]:
    """The n tokens that greedy decoding gives."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(logits_of(tokens).argmax()))
    return tokens[len(prompt) :]


class HashModel:
    """Stands in for mlx_gptoss.model.graph.Model.

    `forwards` lists for every forward its shares: (position of the first token, the tokens).
    """

    def __init__(self) -> None:
        self.config = CONFIG
        self.dtype = mx.float32
        self.forwards: list[list[tuple[int, list[int]]]] = []

    def make_cache(self) -> SequenceCache:
        return SequenceCache(self.config, self.dtype)

    def __call__(
        self,
        tokens: mx.array,
        segments: Sequence[Segment],
        rows: Sequence[int] | None = None,
        *,
        awaited: bool = False,
    ) -> mx.array | None:
        ids: list[int] = np.array(tokens).tolist()
        assert sum(s.length for s in segments) == len(ids)
        wanted = range(len(ids)) if rows is None else rows
        logits: dict[int, np.ndarray] = {}
        shares, at = [], 0
        for segment in segments:
            cache, own = segment.cache, ids[at : at + segment.length]
            assert isinstance(cache, SequenceCache)
            shares.append((cache.offset, own))
            keys = mx.broadcast_to(mx.array(own, mx.float32)[None, None, :, None], (1, 1, len(own), 4))
            window, context = (
                np.array(layer.update_and_fetch(keys, keys)[0][0, 0, :, 0]).astype(int).tolist()
                for layer in cache.layers
            )
            cache.advance(len(own))
            for i in range(len(own)):
                if at + i in wanted:
                    hidden = len(own) - 1 - i
                    seen = window[: len(window) - hidden][-WINDOW:]
                    logits[at + i] = logits_of(context[: len(context) - hidden], seen)
            at += len(own)
        self.forwards.append(shares)
        return mx.array(np.stack([logits[row] for row in wanted])) if wanted else None
