"""Properties of what the caches hold, by token ids written into their keys: contents, windows, bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.model import cache as caches
from mlx_gptoss.model.cache import FullCache, QuantizedFullCache
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig
from mlx_gptoss.model.sequence_cache import SequenceCache, WindowState
from tests.model.test_cache import CONFIG as BASE

CONFIG = replace(BASE, num_layers=5, layer_types=(SLIDING, FULL, SLIDING, FULL, SLIDING))
REACH = CONFIG.sliding_window - 1
SLACK, SPARE, LEAST, MOST = 4, 12, 8, 16
seeds = st.integers(0, 2**32)


@pytest.fixture(autouse=True, scope="module")
def small_slabs() -> Iterator[None]:
    """Small steps, so that short tests grow and compact often."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (("SLACK", SLACK), ("SPARE", SPARE), ("GROW_MIN", LEAST), ("GROW_MAX", MOST)):
            patched.setattr(caches, name, value)
        yield


def keys_of(tokens: list[int], layer: int, config: ModelConfig = CONFIG) -> mx.array:
    """[1, H, t, D]: every channel says the token, the layer and the head."""
    token = np.array(tokens, np.float32)[None, None, :, None] * 100 + layer * 10
    head = np.arange(config.num_kv_heads, dtype=np.float32)[None, :, None, None]
    return mx.array(np.broadcast_to(token + head, (1, config.num_kv_heads, len(tokens), config.head_dim)))


class Timeline:
    """A SequenceCache and the tokens that it ought to hold; every read is compared."""

    def __init__(self, config: ModelConfig = CONFIG) -> None:
        self.cache = SequenceCache(config, mx.float32)
        self.tokens: list[int] = []
        self._config = config

    def feed(self, tokens: list[int], whole: bool = True) -> None:
        """Append tokens to the position where the cache is. `whole`: every window must be complete."""
        cache, at = self.cache, self.cache.offset
        self.tokens[at : at + len(tokens)] = tokens
        for i, layer in enumerate(cache.layers):
            new = keys_of(tokens, i)
            if isinstance(layer, FullCache):
                first = 0
            else:
                first = at - layer.history
                assert layer.history == min(at, REACH) or not whole
            keys, values = layer.update_and_fetch(new, -new)
            want = keys_of(self.tokens[first : at + len(tokens)], i)
            assert np.array_equal(np.array(keys), np.array(want))
            assert np.array_equal(np.array(values), -np.array(want))
        cache.advance(len(tokens))
        assert (cache.offset, cache.length) == (at + len(tokens), max(len(self.tokens), at + len(tokens)))

    def read(self, n: int) -> None:
        """Append n tokens such that the sliding slabs hold the last ones only."""
        self.feed([random.Random(i).randrange(90) for i in range(n - 1)])
        self.feed([7])

    def go_back(self, position: int, states: list[WindowState], rng: random.Random) -> int:
        """Rewind and feed what must be fed again, in pieces; the position from which that was."""
        start = self.cache.rewind(position, states)
        assert self.cache.offset == start and self.cache.length == position
        self.tokens = self.tokens[:position]
        again = self.tokens[start:]
        while again:
            n = rng.randrange(1, len(again) + 1)
            self.feed(again[:n], whole=False)
            again = again[n:]
        assert self.cache.offset == self.cache.length == position
        return start

    def check(self, state: WindowState) -> None:
        """A state holds the keys and values of its positions."""
        assert state.data is not None
        for n, i in enumerate(i for i, kind in enumerate(self._config.layer_types) if kind == SLIDING):
            want = np.array(keys_of(self.tokens[state.start : state.end], i))[0]
            assert np.array_equal(np.array(state.data[2 * n]), want)
            assert np.array_equal(np.array(state.data[2 * n + 1]), -want)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_after_any_edits_every_layer_holds_its_tokens(seed: int) -> None:
    rng = random.Random(seed)
    line, states = Timeline(), list[WindowState]()
    for _ in range(12):
        action = rng.choice(["feed", "feed", "back", "snapshot", "copy", "reserve"])
        here = len(line.tokens)
        if action == "feed":
            line.feed([rng.randrange(90) for _ in range(rng.choice([1, 1, 2, 9, 30]))])
        elif action == "back":
            position = rng.choice([here, max(0, here - rng.randrange(6)), rng.randrange(here + 1)])
            known = states if rng.random() < 0.6 else []
            start = line.go_back(position, known, rng)
            points = [p for s in known if (p := s.resume_point(position, REACH)) is not None]
            assert start >= max([0, position - 3 * REACH, *points])
            states = [s for s in states if s.end <= position]
        elif action == "snapshot":
            state = line.cache.snapshot(history=rng.choice([None, 11, 30]))
            if state is not None and state.data is not None:
                line.check(state)
                states.append(state)
        elif action == "copy":
            spans = line.cache.export([(0, here // 3), (here // 3, here)], release=True)
            assert sum(a.nbytes for layer in line.cache.full for a in layer.arrays()) == 0
            other = Timeline()
            start = other.cache.load(spans, states)
            assert not any(spans) and other.cache.length == here
            other.tokens = line.tokens
            if start < here:
                other.feed(line.tokens[start:here], whole=False)
            line = other
        else:
            line.cache.reserve(here + rng.randrange(40))
    line.feed([1, 2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_the_last_window_and_some_slack_are_always_at_hand(chunks: list[int], data: st.DataObject) -> None:
    """For a state as well as for a rewind, which then costs nothing."""
    line = Timeline()
    for n in chunks:
        line.feed(list(range(n)))
    offset = line.cache.offset
    end = data.draw(st.integers(max(0, offset - SLACK), offset))
    history = data.draw(st.sampled_from([None, 1, REACH, REACH + 2]))
    state = line.cache.snapshot(end, history)
    assert state is not None
    if end:
        least = max(REACH, history or 0)
        slab_start = max(0, offset - REACH - SLACK)
        assert (state.end, state.start) == (end, max(0, end - least)) or slab_start >= end - least
        assert state.start <= max(0, end - REACH)
        line.check(state)
    assert line.cache.snapshot(offset + 1) is None
    assert line.cache.rewind(end) == end
    line.tokens = line.tokens[:end]
    line.feed([5])


def test_an_empty_cache_goes_back_to_its_beginning_only() -> None:
    cache = SequenceCache(CONFIG, mx.float32)
    assert cache.offset == cache.length == cache.rewind(0) == 0
    with pytest.raises(ValueError, match="expected 0 to 0"):
        cache.rewind(1)


def test_an_empty_timeline_has_an_empty_state() -> None:
    assert SequenceCache(CONFIG, mx.float32).snapshot() == WindowState(0, 0, None)
    all_full = SequenceCache(replace(CONFIG, layer_types=(FULL,) * 5), mx.float32)
    all_full.advance(7)
    assert all_full.snapshot() == WindowState(0, 7, None) and all_full.snapshot(3) == WindowState(0, 3, None)
    assert WindowState(0, 7, None).nbytes == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(30, 80), st.data())
def test_a_state_serves_wherever_its_history_reaches(n: int, data: st.DataObject) -> None:
    line = Timeline()
    line.feed(list(range(n)))
    history = data.draw(st.integers(REACH, 25))
    state = line.cache.snapshot(history=history)
    assert state is not None and state.start == n - history
    line.read(60)
    position = data.draw(st.integers(state.start + 1, n + 20))
    start = line.go_back(position, [state], random.Random(0))
    if position >= state.end:
        # As far as the state leads, unless a replay begins nearer.
        assert start == max(state.end, position - 3 * REACH)
    elif state.start <= position - REACH:
        assert start == position
    else:
        assert start == max(0, position - 3 * REACH)
    line.feed([1, 2, 3])


def test_from_a_long_state_only_what_a_window_needs_is_taken() -> None:
    """The slabs take the room they run at, however much history the state has before and after."""
    line = Timeline()
    line.feed(list(range(90)))
    state = line.cache.snapshot(history=80)
    assert state is not None and (state.start, state.end) == (10, 90)
    line.read(60)
    assert line.go_back(50, [state], random.Random(0)) == 50
    assert {layer.capacity for layer in line.cache.sliding} == {REACH + SLACK + SPARE}
    line.feed([1, 2, 3])


def test_a_state_of_the_beginning_serves_before_a_whole_window_is_there() -> None:
    line = Timeline()
    line.feed([1, 2, 3])
    state = line.cache.snapshot()
    line.read(60)
    assert state is not None and line.go_back(2, [state], random.Random(0)) == 2
    line.feed([7])


def test_after_a_replay_only_what_has_settled_is_kept_as_exact() -> None:
    """The keys that a replay made before its end are not those of a whole computation."""
    line = Timeline()
    line.read(90)
    assert line.go_back(50, [], random.Random(0)) == 50 - 3 * REACH
    assert line.cache.snapshot(50) is not None
    assert line.cache.snapshot(49) is None
    line.feed([1, 2])
    state = line.cache.snapshot(history=30)
    assert state is not None and (state.start, state.end) == (50 - REACH, 52)
    assert line.cache.rewind(51) == 51
    assert line.cache.rewind(49) == 49 - 3 * REACH


def test_a_replay_from_the_beginning_is_exact_all_along() -> None:
    line = Timeline()
    line.read(90)
    assert line.go_back(3 * REACH, [], random.Random(0)) == 0
    for end in (3 * REACH, 3 * REACH - 3, REACH + 1):
        assert line.cache.snapshot(end) is not None


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_growth_is_told_before_it_happens(seed: int) -> None:
    rng = random.Random(seed)
    line = Timeline()
    line.cache.reserve(rng.randrange(60))
    for _ in range(12):
        t = rng.choice([1, 1, 3, 8, 20, 50])
        before, more = line.cache.committed, line.cache.growth(t)
        room = line.cache.sliding[0].capacity
        line.feed([3] * t)
        if line.cache.sliding[0].capacity < room:  # after a long chunk
            assert line.cache.committed - before < more or not more
        else:
            assert line.cache.committed - before == more
        full = sum(a.nbytes for layer in line.cache.full for a in layer.arrays())
        held = sum(a.nbytes for a in line.cache.arrays())
        assert full < held <= line.cache.committed
        if rng.random() < 0.3:
            line.go_back(max(0, len(line.tokens) - rng.randrange(4)), [], rng)


@pytest.mark.parametrize("chunk", [1, SPARE, REACH + SLACK + SPARE, 50])
@pytest.mark.parametrize("back", range(4))
@pytest.mark.parametrize("t", range(1, 5))
def test_a_sliding_slab_gets_the_capacity_that_is_told(chunk: int, back: int, t: int) -> None:
    """Also where the new tokens fill the slab to its end."""
    line = Timeline()
    line.feed([3] * chunk)
    line.go_back(max(0, chunk - back), [], random.Random(0))
    told = [layer.capacity_for(t) for layer in line.cache.sliding]
    line.feed([5] * t)
    assert [layer.capacity for layer in line.cache.sliding] == told


def test_growth_counts_nothing_for_tokens_that_are_stored_already() -> None:
    line = Timeline()
    line.read(64)
    assert line.cache.rewind(50) < 50
    full = sum(layer.capacity for layer in line.cache.full)
    before, more = line.cache.committed, line.cache.growth(9)
    line.tokens = line.tokens[:50]
    line.feed(line.tokens[line.cache.offset :][:9], whole=False)
    assert line.cache.committed - before == more
    assert sum(layer.capacity for layer in line.cache.full) == full


@pytest.mark.parametrize("chunk", [1, SPARE, SPARE + 1, 50])
def test_the_bytes_of_a_length_are_known_beforehand(chunk: int) -> None:
    line = Timeline()
    line.cache.reserve(10 * LEAST)
    assert line.cache.committed == line.cache.nbytes_at(10 * LEAST)
    while len(line.tokens) + chunk <= 10 * LEAST:
        line.feed([3] * chunk)
    used = len(line.tokens) - chunk
    kept = min(used, REACH + SLACK)
    assert line.cache.committed == line.cache.nbytes_at(10 * LEAST, chunk) or kept < REACH + SLACK
    assert line.cache.committed <= line.cache.nbytes_at(10 * LEAST, chunk)
    one = line.cache.nbytes_at(1) - line.cache.nbytes_at(0)
    assert one == 2 * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4


def test_slabs_grow_by_doubling_within_bounds() -> None:
    """Few copies, and never more room beyond the tokens than one step."""
    layer = FullCache(CONFIG, mx.float32)
    capacities = [layer.capacity]
    for n in range(1, 200):
        k = keys_of([n], 0)
        layer.append(k, k)
        assert layer.capacity % LEAST == 0
        if layer.capacity != capacities[-1]:
            step = min(max(n - 1, LEAST), MOST)
            assert n + step <= layer.capacity < n + step + LEAST
            capacities.append(layer.capacity)
    assert layer.capacity_for(10) == layer.capacity == layer.capacity_for(layer.capacity)


@pytest.mark.parametrize("n", [1, LEAST, LEAST + 1, 50])
def test_reserved_room_is_enough_and_keeps_what_is_there(n: int) -> None:
    line = Timeline()
    line.feed([1, 2, 3])
    line.cache.reserve(n)
    capacities = [layer.capacity for layer in line.cache.full]
    assert all(max(n, 3) <= c <= max(n, 3 + LEAST) + LEAST for c in capacities)
    line.cache.reserve(1)
    while len(line.tokens) < n:
        assert line.cache.growth(1) == 0 or line.cache.sliding[0].capacity_for(1) > REACH + SLACK + SPARE
        line.feed([5])
    assert n < 3 or [layer.capacity for layer in line.cache.full] == capacities


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 30))
def test_masks_show_each_token_its_window(before: int, t: int) -> None:
    line = Timeline()
    if before:
        line.feed([3] * before)
    masks, history = line.cache.masks(t), line.cache.sliding[0].history
    for kind, first, reach in ((FULL, 0, 10**9), (SLIDING, before - history, REACH)):
        positions, mask = np.arange(first, before + t), masks[kind]
        if mask is None:
            seen = np.ones((t, len(positions)), bool)
        elif isinstance(mask, str):
            assert mask == "causal"  # aligned at the last key
            seen = positions[None] <= np.arange(before, before + t)[:, None]
        else:
            seen = np.array(mask)
        query = np.arange(before, before + t)[:, None]
        assert np.array_equal(seen, (positions <= query) & (positions >= query - reach))
    # A mask is only built where one is needed.
    assert isinstance(masks[SLIDING], mx.array) == (t > 1 and history + t > REACH + 1)


@pytest.mark.parametrize(("head_dim", "group"), [(32, 32), (64, 64), (96, 32), (128, 64)])
@pytest.mark.parametrize("bits", [(8, 8), (4, None), (None, 8)])
def test_quantised_slabs_take_their_bits(
    head_dim: int, group: int, bits: tuple[int | None, int | None]
) -> None:
    config = replace(CONFIG, head_dim=head_dim, layer_types=(FULL,) * 5)
    layer = QuantizedFullCache(config, mx.float32, bits)
    empty = [a.shape[:2] + a.shape[3:] for a in layer.arrays()]
    want = sum(head_dim * 4 if b is None else head_dim * b // 8 + 2 * 4 * (head_dim // group) for b in bits)
    assert layer.token_bytes == want * CONFIG.num_kv_heads
    k = keys_of([1, 2, 3], 0, config)
    layer.append(k, -k)
    assert [a.shape[:2] + a.shape[3:] for a in layer.arrays()] == empty
    assert len(layer.arrays()) == len(layer.parts(0, 2))
    assert sum(a.nbytes for a in layer.arrays()) == layer.capacity * layer.token_bytes
