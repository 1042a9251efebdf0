"""Properties of the prefix store under any sequence of uses, by token ids written into the keys."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.engine import prefix_store
from mlx_gptoss.engine.prefix_disk import PrefixDisk
from mlx_gptoss.engine.prefix_store import PINNED_SHARE, Node, PrefixStore
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.sequence_cache import SequenceCache, WindowState
from tests.support.hash_model import WINDOW, HashModel
from tests.support.hash_model import prompt_of as prompt

SPAN = 16
LARGE = 10**9
TOKEN = 2 * 4 * 4  # bytes of the full layer's key and value of one token


@pytest.fixture(autouse=True, scope="module")
def short_spans() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prefix_store, "SPAN", SPAN)
        yield


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def filled(tokens: list[int], places: list[int] | None = None) -> tuple[SequenceCache, list[WindowState]]:
    """Caches that hold some tokens, and states that end at the places (default: at the end)."""
    model = HashModel()
    cache, states, at = model.make_cache(), list[WindowState](), 0
    for place in sorted({*(places or []), len(tokens)}):
        if place > at:
            model(mx.array(tokens[at:place], mx.int32), [Segment(place - at, cache)], [])
            at = place
        if places is None or place in places:
            state = cache.snapshot()
            assert state is not None
            states.append(state)
    return cache, states


def put(store: PrefixStore, tokens: list[int], pinned: int = 0, places: list[int] | None = None) -> None:
    store.insert(array(tokens), *filled(tokens, places), pinned)


def ids(data: mx.array) -> list[int]:
    """The tokens in keys [.., n, D]."""
    return [int(t) for t in np.array(data).reshape(-1, data.shape[-2], data.shape[-1])[0, :, 0]]


def line_of(node: Node) -> list[int]:
    """The tokens from the beginning to a node's end."""
    before = [] if node.parent is None else line_of(node.parent)
    return [*before, *node.tokens.tolist()]


def check(store: PrefixStore) -> None:
    """What holds after everything that is done to a store."""
    total = 0
    for node in store.nodes():
        line = line_of(node)
        assert len(line) == node.end and len(node.tokens) > 0
        assert {first: int(child.tokens[0]) for first, child in node.children.items()} == {
            first: first for first in node.children
        }
        assert all(child.start == node.end and child.parent is node for child in node.children.values())
        if node.loaded:
            assert [ids(part) for part in node.parts] == [node.tokens.tolist()] * 2
            total += node.kv_bytes + node.state_bytes
        for end, state in node.states.items():
            assert node.start < end == state.end <= node.end and state.data is not None
            assert ids(state.data) == line[state.start : end]
    assert total == store.nbytes <= store.limit


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_whatever_is_done_the_trie_stays_sound_and_within_its_limit(seed: int, on_disk: bool) -> None:
    rng = random.Random(seed)
    with TemporaryDirectory() as folder:
        store = PrefixStore(
            rng.choice([LARGE, 6000]), PrefixDisk(Path(folder), "model", LARGE) if on_disk else None
        )
        held: list[list[int]] = [[]]
        for _ in range(25):
            stem = rng.choice(held)
            stem = stem[: rng.randrange(len(stem) + 1)]
            tokens = [*stem, *prompt(rng.randrange(200), rng.randrange(1, 40))]
            action = rng.choice(["put", "put", "put", "match", "shrink", "save"])
            if action == "put":
                places = sorted(rng.sample(range(1, len(tokens) + 1), min(len(tokens), 2)))
                put(store, tokens, rng.choice([0, len(tokens) // 2, len(tokens)]), places)
                if store.limit == LARGE:
                    assert store.common(array(tokens)) == len(tokens)
                held.append(tokens)
            elif action == "match":
                known = store.common(array(tokens))
                match = store.match(array(tokens))
                assert match.length == known or (on_disk and match.length < known)
                assert [t for span in match.spans for t in ids(span[0])] == tokens[: match.length]
                for state in match.states:
                    reach = min(state.end, match.length)
                    assert state.data is not None and state.start < match.length
                    assert ids(state.data)[: reach - state.start] == tokens[state.start : reach]
            elif action == "shrink":
                limit = rng.randrange(store.nbytes + 1)
                store.shrink(limit)
                assert store.nbytes <= limit
            else:
                store.save()
            check(store)
        store.shrink(0)
        assert store.nbytes == 0 and not any(node.loaded for node in store.nodes())
        assert len(store) == 0 or on_disk


def test_what_was_used_longest_ago_goes_first() -> None:
    store = PrefixStore(LARGE)
    lines = [prompt(i, SPAN) for i in range(6)]
    for line in lines:
        put(store, line, places=[])
    order = [3, 0, 5, 1, 4, 2]
    for i in order:
        store.match(array(lines[i]))
    assert store.nbytes == 6 * SPAN * TOKEN
    for n in range(1, 7):
        # Not one byte more is dropped than must be: a whole node.
        store.shrink((7 - n) * SPAN * TOKEN)
        store.shrink((7 - n) * SPAN * TOKEN - 1)
        assert [store.common(array(lines[i])) > 0 for i in order] == [False] * n + [True] * (6 - n)


def test_a_use_counts_for_everything_on_its_way() -> None:
    store = PrefixStore(LARGE)
    stem = prompt(1, SPAN)
    put(store, [*stem, *prompt(2, SPAN)], places=[])
    put(store, prompt(3, SPAN), places=[])
    put(store, [*stem, *prompt(4, SPAN)], places=[])
    store.shrink(3 * SPAN * TOKEN)  # the branch of 2
    assert store.common(array([*stem, *prompt(2, SPAN)])) == SPAN
    store.shrink(2 * SPAN * TOKEN)
    assert store.common(array(prompt(3, SPAN))) == 0
    assert store.common(array([*stem, *prompt(4, SPAN)])) == 2 * SPAN


def test_a_timeline_is_dropped_from_its_end() -> None:
    store = PrefixStore(LARGE)
    line = prompt(1, 5 * SPAN + 3)
    put(store, line, places=[])
    assert sorted(n.end - n.start for n in store.nodes()) == [3, *[SPAN] * 5]
    for spans in (5, 4, 1, 0):
        store.shrink(spans * SPAN * TOKEN)
        assert store.common(array(line)) == spans * SPAN


@pytest.mark.parametrize("pinned", [SPAN - 3, SPAN, 2 * SPAN + 5])
def test_pinned_tokens_outlive_others_and_end_where_they_end(pinned: int) -> None:
    store = PrefixStore(LARGE)
    line = prompt(1, 3 * SPAN)
    put(store, line, pinned, places=[])
    for i in range(2, 6):
        put(store, prompt(i, 3 * SPAN), places=[])
        store.match(array(prompt(i, 3 * SPAN)))
    store.shrink(pinned * TOKEN)
    assert store.common(array(line)) == pinned
    assert len([n for n in store.nodes() if n.pinned]) == -(-pinned // SPAN) == len(store)


def test_pins_hold_for_their_share_of_the_limit_those_used_last_first() -> None:
    store = PrefixStore(40 * SPAN * TOKEN)
    lines = [prompt(i, SPAN) for i in range(20)]
    for line in lines:
        put(store, line, SPAN, places=[])
    put(store, prompt(99, 15 * SPAN), places=[])
    kept = int(PINNED_SHARE * 40)
    store.shrink(kept * SPAN * TOKEN)
    assert [store.common(array(line)) for line in lines] == [0] * (20 - kept) + [SPAN] * kept


def test_what_must_stay_is_not_dropped() -> None:
    store = PrefixStore(LARGE)
    line = prompt(1, 2 * SPAN)
    put(store, line, places=[])
    put(store, [*line[:SPAN], *prompt(2, SPAN)], places=[])
    put(store, prompt(3, SPAN), places=[])
    path = [n for n in store.nodes() if line_of(n) == line[: n.end]]
    store.shrink(0, path)
    assert store.common(array(line)) == 2 * SPAN and len(store) == 2
    assert store.nbytes == 2 * SPAN * TOKEN


def test_window_states_are_thinned_to_their_share_before_anything_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those used longest ago first, and those at the end of a timeline last."""
    monkeypatch.setattr(prefix_store, "STATES_SHARE", 0.1)
    store = PrefixStore(LARGE)
    lines = [prompt(i, 2 * SPAN) for i in range(3)]
    every = [WINDOW - 1, SPAN, 2 * SPAN]
    for line in lines:
        put(store, line, places=every)
    store.match(array(lines[0]))
    one = 2 * (WINDOW - 1) * 4 * 4

    def left() -> list[list[int]]:
        return [
            sorted(end for n in store.nodes() if line_of(n) == line[: n.end] for end in n.states)
            for line in lines
        ]

    for limit, want in (
        (9 * one, [every, every, every]),
        (9 * one - 1, [every, every[1:], every]),
        (7 * one, [every, every[2:], every]),
        (4 * one, [every[1:], every[2:], every[2:]]),
        (3 * one, [every[2:]] * 3),
        (2 * one, [every[2:], [], every[2:]]),
    ):
        store.shrink(10 * limit)
        assert left() == want
        check(store)
    assert all(store.common(array(line)) == 2 * SPAN for line in lines)


def test_a_state_is_put_where_it_ends_also_within_a_span() -> None:
    """The span is cut there, as a state must not lie beyond what its node holds."""
    store = PrefixStore(LARGE)
    line = prompt(1, SPAN)
    put(store, line, places=[])
    put(store, line[:7], places=[7])
    assert sorted((n.start, n.end, sorted(n.states)) for n in store.nodes()) == [(0, 7, [7]), (7, SPAN, [])]
    put(store, line[:3], places=[])
    assert len(store) == 2
    check(store)


def test_states_beyond_a_match_serve_if_they_reach_back_into_it() -> None:
    store = PrefixStore(LARGE)
    line = prompt(1, 2 * SPAN)
    put(store, line, places=[SPAN, SPAN + 1, 2 * SPAN])
    match = store.match(array(line[:SPAN]))
    # Of the next span the state of SPAN + 1 reaches back, and that of 2 x SPAN does not.
    assert sorted(s.end for s in match.states) == [SPAN, SPAN + 1]
    assert sorted(s.end for s in store.match(array(line[: SPAN - 1])).states) == [SPAN]


def test_a_cut_span_keeps_its_states_pins_and_uses(tmp_path: Path) -> None:
    store = PrefixStore(LARGE, PrefixDisk(tmp_path, "model", LARGE))
    line = prompt(1, SPAN)
    put(store, line, SPAN, places=[5, 9, SPAN])
    while store.save():
        pass
    put(store, [*line[:9], *prompt(2, 3)], places=[12])
    nodes = {(n.start, n.end): n for n in store.nodes()}
    assert {key: sorted(n.states) for key, n in nodes.items()} == {
        (0, 9): [5, 9],
        (9, SPAN): [SPAN],
        (9, 12): [12],
    }
    assert [nodes[key].pinned for key in ((0, 9), (9, SPAN), (9, 12))] == [True, True, False]
    check(store)
    # All three are written again, parents first, and nothing of the span that was cut is left.
    count = 0
    while store.save():
        count += 1
    assert count == 3 and len(list(tmp_path.glob("*/*.*"))) == 3
    again = PrefixStore(LARGE, PrefixDisk(tmp_path, "model", LARGE))
    assert again.common(array(line)) == SPAN and len(again) == 3


def test_a_state_that_came_later_is_written_too(tmp_path: Path) -> None:
    store = PrefixStore(LARGE, PrefixDisk(tmp_path, "model", LARGE))
    line = prompt(1, SPAN)
    put(store, line, places=[])
    assert store.save() and not store.save()
    put(store, line, places=[])
    assert not store.save()
    put(store, line, places=[SPAN])
    assert store.save() and not store.save()
    again = PrefixStore(LARGE, PrefixDisk(tmp_path, "model", LARGE))
    assert [s.end for s in again.match(array(line)).states] == [SPAN]


def test_what_is_on_disk_already_is_not_written_again_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that came later is dropped before its turn: there is nothing new of its span."""
    monkeypatch.setattr(prefix_store, "STATES_SHARE", 0.0)
    store = PrefixStore(LARGE, PrefixDisk(tmp_path, "model", LARGE))
    lines = [prompt(1, SPAN), prompt(2, SPAN)]
    put(store, lines[0], places=[])
    assert store.save()
    (file,) = tmp_path.glob("*/*.prefix")
    written = file.stat()
    put(store, lines[0], places=[SPAN])
    put(store, lines[1], places=[])
    assert store.nbytes == 2 * SPAN * TOKEN  # no state is left
    assert store.save() and not store.save()
    assert file.stat().st_ino == written.st_ino
    again = PrefixStore(LARGE, PrefixDisk(tmp_path, "model", LARGE))
    assert [again.common(array(line)) for line in lines] == [SPAN, SPAN]


def test_what_is_read_fits_beside_what_is_in_memory_of_its_timeline(tmp_path: Path) -> None:
    store = PrefixStore(LARGE, PrefixDisk(tmp_path, "model", LARGE))
    line = prompt(1, 4 * SPAN)
    put(store, line, places=[])
    while store.save():
        pass
    store.shrink(2 * SPAN * TOKEN)
    files = {n.end: n.path.stat().st_size for n in store.nodes() if n.path is not None}
    store.limit = store.nbytes + files[3 * SPAN]  # what a span takes is counted by its file
    match = store.match(array(line))
    assert match.length == 3 * SPAN and store.nbytes <= store.limit
    store.limit -= 1
    store.shrink(2 * SPAN * TOKEN)
    assert store.match(array(line)).length == 2 * SPAN


def test_a_cleared_store_is_empty_and_saves_nothing(tmp_path: Path) -> None:
    store = PrefixStore(LARGE, PrefixDisk(tmp_path, "model", LARGE))
    put(store, prompt(1, 40))
    store.clear()
    assert store.nbytes == len(store) == store.common(array(prompt(1, 40))) == 0
    assert not store.save() and store.match(array(prompt(1, 40))).length == 0
