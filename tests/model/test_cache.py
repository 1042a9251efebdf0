"""Properties of the KV caches, on a small attention-only model written here (float32)."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.model import cache as caches
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig, YarnConfig
from mlx_gptoss.model.sequence_cache import SequenceCache, WindowState

CONFIG = ModelConfig(
    num_layers=5,
    hidden_size=8,
    intermediate_size=8,
    num_experts=2,
    experts_per_token=1,
    head_dim=8,
    num_attention_heads=4,
    num_kv_heads=2,
    vocab_size=50,
    sliding_window=9,
    layer_types=(SLIDING, FULL, SLIDING, FULL, SLIDING),
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope=YarnConfig(4.0, 32.0, 1.0, 64, False),
    swiglu_limit=7.0,
    max_position=4096,
)


class TinyModel:
    """Embedding, attention layers with sinks and a residual: enough to feel every cached key."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        q, kv = config.num_attention_heads, config.num_kv_heads
        width = config.hidden_size

        def weight(*shape: int) -> mx.array:
            return mx.array(rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0]))

        self.config = config
        self.embedding = weight(config.vocab_size, width) * 8
        self.qkv = [weight(width, (q + 2 * kv) * config.head_dim) for _ in config.layer_types]
        self.out = [weight(q * config.head_dim, width) * 2 for _ in config.layer_types]
        self.sinks = [weight(q) for _ in config.layer_types]

    def __call__(self, tokens: list[int], cache: SequenceCache) -> np.ndarray:
        c, t = self.config, len(tokens)
        q, kv = c.num_attention_heads, c.num_kv_heads
        masks = cache.masks(t)
        x = self.embedding[mx.array(tokens)]
        for i, layer in enumerate(cache.layers):
            heads = mx.tanh(x) @ self.qkv[i]
            heads = heads.reshape(1, t, q + 2 * kv, c.head_dim).transpose(0, 2, 1, 3)
            rotated = mx.fast.rope(
                heads[:, : q + kv], c.head_dim, traditional=False, base=1e4, scale=1.0, offset=cache.offset
            )
            y = layer.attend(
                rotated[:, :q],
                rotated[:, q:],
                heads[:, q + kv :],
                scale=0.5,
                sinks=self.sinks[i],
                mask=masks[c.layer_types[i]],
            )
            x = x + y.transpose(0, 2, 1, 3).reshape(t, -1) @ self.out[i]
        cache.advance(t)
        return np.array(x)


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(CONFIG)


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps, so that short tests grow and compact often."""
    for name, value in (("SLACK", 4), ("SPARE", 12), ("GROW_MIN", 8), ("GROW_MAX", 16)):
        monkeypatch.setattr(caches, name, value)


def fresh(model: TinyModel, tokens: list[int]) -> np.ndarray:
    return model(tokens, SequenceCache(model.config, mx.float32))


def some_tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(CONFIG.vocab_size) for _ in range(n)]


def test_sliding_layers_see_exactly_their_window(model: TinyModel) -> None:
    """The window, counted by brute force: a token moves its own output and the next 8, no more."""
    one = replace(CONFIG, num_layers=1, layer_types=(SLIDING,))
    single = TinyModel(one)
    tokens = some_tokens(random.Random(1), 30)
    changed = [*tokens[:10], (tokens[10] + 1) % CONFIG.vocab_size, *tokens[11:]]
    moved = np.abs(fresh(single, tokens) - fresh(single, changed)).max(axis=1) > 0
    assert np.flatnonzero(moved).tolist() == list(range(10, 19))


@pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 13, 19], [8, 9, 10, 13], [39, 1], [25, 1, 1, 1, 12]])
def test_any_split_into_chunks_gives_the_same_outputs(model: TinyModel, chunks: list[int]) -> None:
    tokens = some_tokens(random.Random(2), 40)
    cache = SequenceCache(CONFIG, mx.float32)
    rest, parts = tokens, []
    for n in chunks:
        parts.append(model(rest[:n], cache))
        rest = rest[n:]
    np.testing.assert_allclose(np.concatenate(parts), fresh(model, tokens), atol=1e-5)
    assert cache.offset == cache.length == 40


def test_random_edit_scripts_equal_a_fresh_computation(model: TinyModel) -> None:
    """40 scripts of appends, short and deep rewinds, branches and swaps between sequences."""
    worst = 0.0
    for seed in range(40):
        rng = random.Random(seed)
        live: list[tuple[SequenceCache, list[int], list[WindowState]]] = [
            (SequenceCache(CONFIG, mx.float32), [], []) for _ in range(2)
        ]
        cache, tokens, states = live[0]
        got = np.zeros((0, CONFIG.hidden_size), np.float32)
        for _ in range(4):
            action = rng.choice(["append", "append", "short", "deep", "branch", "swap"])
            if action == "swap":
                cache, tokens, states = live[rng.randrange(2)]
            start = len(tokens)
            if action == "short":
                start = max(0, start - rng.randrange(5))
            elif action in ("deep", "branch"):
                start = rng.randrange(start + 1)
            if action == "branch":
                spans = cache.export([(0, start)])
                other = SequenceCache(CONFIG, mx.float32)
                fed_from = other.load(spans, states if rng.random() < 0.5 else ())
                states = [s for s in states if s.end <= start]
                cache, tokens = other, tokens[:start]
                live[rng.randrange(2)] = (cache, tokens, states)
            else:
                fed_from = cache.rewind(start, states if rng.random() < 0.5 else ())
            tokens[start:] = some_tokens(rng, rng.randrange(1, 24))
            states[:] = [s for s in states if s.end <= start]
            feed = tokens[fed_from:]
            cut = rng.randrange(len(feed))
            outputs = [model(part, cache) for part in (feed[:cut], feed[cut:]) if part]
            got = np.concatenate(outputs)[start - fed_from :]
            state = cache.snapshot(history=rng.choice([None, 12]))
            if state is not None:
                states.append(state)
            want = fresh(model, tokens)[start:]
            worst = max(worst, float(np.abs(got - want).max()))
        assert cache.length == len(tokens)
    assert worst < 1e-5


def test_a_short_rewind_is_free_and_a_deep_one_bounded(model: TinyModel) -> None:
    cache = SequenceCache(CONFIG, mx.float32)
    model(some_tokens(random.Random(3), 100), cache)
    for _ in range(20):
        model([1], cache)
    assert cache.rewind(117) == 117
    assert cache.rewind(50) == 50 - 8 * 3
    model(some_tokens(random.Random(3), 26), cache)
    assert cache.rewind(49) in range(49 - 8 * 3, 50)


def test_a_state_with_more_history_resumes_earlier(model: TinyModel) -> None:
    cache = SequenceCache(CONFIG, mx.float32)
    model(some_tokens(random.Random(4), 60), cache)
    state = cache.snapshot(history=20)
    assert state is not None and (state.start, state.end) == (40, 60)
    model(some_tokens(random.Random(5), 60), cache)
    assert cache.rewind(48, [state]) == 48
    model(some_tokens(random.Random(5), 60), cache)
    assert cache.rewind(47, [state]) == 47 - 8 * 3


def test_what_goes_on_from_the_middle_of_a_state_is_exact(model: TinyModel) -> None:
    tokens, other = some_tokens(random.Random(4), 60), some_tokens(random.Random(6), 60)
    cache = SequenceCache(CONFIG, mx.float32)
    model(tokens, cache)
    state = cache.snapshot(history=20)
    assert state is not None
    model(other, cache)
    assert cache.rewind(48, [state]) == 48
    together = np.concatenate([model(other[:3], cache), model(other[3:20], cache)])
    np.testing.assert_allclose(together, fresh(model, tokens[:48] + other[:20])[48:], atol=1e-5)


def test_a_state_without_keys_is_of_a_model_without_windows(model: TinyModel) -> None:
    cache = SequenceCache(CONFIG, mx.float32)
    model(some_tokens(random.Random(4), 30), cache)
    state = cache.snapshot()
    assert state is not None
    full = SequenceCache(replace(CONFIG, layer_types=(FULL,) * CONFIG.num_layers), mx.float32)
    empty = full.snapshot()
    assert empty is not None and full.takes(empty) and cache.takes(state)
    assert not full.takes(state) and not cache.takes(empty)


def test_full_layers_are_never_written_twice(model: TinyModel) -> None:
    tokens = some_tokens(random.Random(6), 80)
    cache = SequenceCache(CONFIG, mx.float32)
    model(tokens[:70], cache)
    model(tokens[70:], cache)
    before = [np.array(a) for a in cache.export([(0, 60)])[0]]
    again = cache.rewind(60)
    assert again < 60
    model(tokens[again:], cache)
    for old, new in zip(before, cache.export([(0, 60)])[0], strict=True):
        assert np.array_equal(old, np.array(new))


def test_a_snapshot_pins_nothing() -> None:
    """A kept snapshot holds its own bytes and lets the slabs go, also with one KV head."""
    config = replace(CONFIG, num_kv_heads=1, num_attention_heads=2, head_dim=64)
    model = TinyModel(config)
    mx.synchronize()
    start = mx.get_active_memory()
    cache = SequenceCache(config, mx.float32)
    model(some_tokens(random.Random(7), 500), cache)
    state = cache.snapshot()
    assert state is not None
    mx.eval(state.data)
    del cache
    assert mx.get_active_memory() - start <= state.nbytes + 64 * 1024


def test_positions_outside_the_sequence_are_refused(model: TinyModel) -> None:
    cache = SequenceCache(CONFIG, mx.float32)
    model([1, 2, 3], cache)
    for position in (-1, 4):
        with pytest.raises(ValueError, match=f"position is {position}"):
            cache.rewind(position)


QUANTIZABLE = replace(CONFIG, head_dim=32, layer_types=(FULL,) * 3, num_layers=3)


@pytest.mark.parametrize("bits", [(8, 8), (8, None), (None, 8), (4, 4)])
def test_quantised_keys_with_sinks_equal_unpacked_ones(bits: tuple[int | None, int | None]) -> None:
    """One token on the packed values gives what dense attention over the unpacked values gives."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32))

    packed, dense = (SequenceCache(QUANTIZABLE, mx.float32, bits).full[0] for _ in range(2))
    k, v, sinks = array(1, 2, 50, 32), array(1, 2, 50, 32), array(4)
    for layer in (packed, dense):
        layer.append(k, v)
    q, k, v = array(1, 4, 1, 32), array(1, 2, 1, 32), array(1, 2, 1, 32)
    got = packed.attend(q, k, v, scale=0.2, sinks=sinks, mask=None)
    keys, values = dense.update_and_fetch(k, v)
    want = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.2, mask=None, sinks=sinks)
    assert float(mx.abs(got - want).max()) < 1e-5


def test_quantised_caches_rewind_and_export_like_the_others() -> None:
    model = TinyModel(QUANTIZABLE)
    tokens = some_tokens(random.Random(8), 40)

    def run(cache: SequenceCache, part: list[int]) -> np.ndarray:
        return np.concatenate([model([t], cache) for t in part])

    whole = SequenceCache(QUANTIZABLE, mx.float32, (8, 8))
    want = run(whole, tokens)
    assert whole.rewind(25) == 25
    np.testing.assert_allclose(run(whole, tokens[25:]), want[25:], atol=1e-5)
    other = SequenceCache(QUANTIZABLE, mx.float32, (8, 8))
    assert other.load(whole.export([(0, 10), (10, 30)])) == 30
    np.testing.assert_allclose(run(other, tokens[30:]), want[30:], atol=1e-5)
    assert whole.nbytes_at(1000) < 0.35 * SequenceCache(QUANTIZABLE, mx.float32).nbytes_at(1000)


def test_eight_bits_move_the_outputs_little() -> None:
    model = TinyModel(QUANTIZABLE)
    tokens = some_tokens(random.Random(9), 60)
    exact = model(tokens, SequenceCache(QUANTIZABLE, mx.float32))
    eight = model(tokens, SequenceCache(QUANTIZABLE, mx.float32, (8, 8)))
    scale = np.abs(exact).mean()
    assert 0 < np.abs(eight - exact).mean() < 0.02 * scale


@pytest.mark.parametrize("t", [1, 2, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("earlier", [0, 10, 300])
@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_few_queries_are_split_to_what_metals_kernel_takes(
    kind: str, earlier: int, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 8 query heads a KV head, 4 queries at a time; the result is that of all at once."""
    config = replace(CONFIG, num_attention_heads=16, head_dim=64, sliding_window=128)
    rng = np.random.default_rng(t)

    def normal(heads: int, n: int) -> mx.array:
        return mx.array(rng.standard_normal((1, heads, n, 64)).astype(np.float32))

    old, new = (normal(2, earlier), normal(2, earlier)), (normal(2, t), normal(2, t))
    q, sinks = normal(16, t), mx.array(rng.standard_normal(16).astype(np.float32))
    sizes: list[int] = []
    attention = mx.fast.scaled_dot_product_attention

    def noting(q: mx.array, *rest: Any, **more: Any) -> mx.array:
        sizes.append(q.shape[2])
        return attention(q, *rest, **more)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", noting)
    found = []
    for metal in (False, True):
        monkeypatch.setattr(caches, "on_metal", partial(bool, metal))
        cache = SequenceCache(config, mx.float32)
        layer = cache.layers[config.layer_types.index(kind)]
        if earlier:
            for each in cache.layers:
                each.update_and_fetch(*old)
            cache.advance(earlier)
        mask = cache.masks(t)[kind]
        found.append(np.array(layer.attend(q, *new, scale=0.1, sinks=sinks, mask=mask)))
    assert sizes == ([t] + ([4] * (t // 4) + [t % 4] * (t % 4 > 0) if t <= 8 else [t]))
    assert np.abs(found[0] - found[1]).max() < 1e-5


@pytest.mark.parametrize("t", [1, 5, 8])
@pytest.mark.parametrize("heads", [1, 4, 11, 32, 64])
def test_no_part_has_more_rows_than_metals_kernel_takes(
    heads: int, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of query heads a KV head; where one query alone has too many nothing is split."""
    queries: list[int] = []

    def noting(q: mx.array, *_: object, **more: object) -> mx.array:
        queries.append(q.shape[2])
        return q

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", noting)
    monkeypatch.setattr(caches, "on_metal", lambda: True)
    cache = SequenceCache(replace(CONFIG, num_attention_heads=heads, num_kv_heads=1), mx.float32)
    k = mx.zeros((1, 1, t, CONFIG.head_dim))
    cache.full[0].attend(
        mx.zeros((1, heads, t, CONFIG.head_dim)), k, k, scale=1.0, sinks=mx.zeros(heads), mask="causal"
    )
    assert sum(queries) == t
    assert heads * max(queries) <= 32 if heads <= 32 else len(queries) == 1
