"""Properties of the scheduler's memory: the budget, who gives way, and what is kept for later requests."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.engine.prefix_store import PrefixStore
from mlx_gptoss.engine.runner import KVCache
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.engine.states import STATE_MAX_DISTANCE, STATE_MIN_DISTANCE, STATE_SLACK
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.model.sequence_cache import SequenceCache
from mlx_gptoss.sampling import SamplingParams
from tests.support.hash_model import MESSAGE, WINDOW, HashModel, expected
from tests.support.hash_model import prompt_of as prompt
from tests.support.scheduling import CHUNK, GREEDY, Client, cache_bytes, make, run


def state_ends(scheduler: Scheduler, tokens: list[int]) -> list[int]:
    """Where the window states along a timeline end, as the store holds it."""
    at, ends = 0, []
    for node in sorted(scheduler.store.nodes(), key=lambda n: n.start):
        if node.start == at and node.tokens.tolist() == tokens[at : node.end]:
            at = node.end
            ends += sorted(node.states)
            for state in node.states.values():
                assert state.start <= max(0, state.end - (WINDOW - 1))
    return ends


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_any_load_stays_within_its_memory_and_gets_its_tokens(seed: int) -> None:
    """Random arrivals, branches, limits, cancellations and budgets; at the end every count adds up."""
    rng = random.Random(seed)
    model = HashModel()
    one = cache_bytes(model, 1280, 40)  # what the longest may grow to
    scheduler = make(
        model,
        budget=int(one * rng.uniform(1.0, 3.0)),
        chunk=rng.choice([1, 5, 16, 40]),
        max_running=rng.randrange(1, 6),
        message_start=rng.choice([None, MESSAGE]),
        pinned_tokens=lambda tokens: len(tokens) // 2,
    )
    document = prompt(1, 400)
    clients = []
    for i in range(8):
        stem = document[: rng.randrange(400)] if rng.random() < 0.6 else []
        asked = [*stem, *prompt(2 + i, rng.randrange(1, 120))]
        clients.append(Client(scheduler, asked, rng.choice([0, 1, 20, 90]), background=rng.random() < 0.1))
        for _ in range(rng.randrange(30)):
            scheduler.step()
            assert scheduler.live_bytes + scheduler.store.nbytes <= scheduler.budget
        if rng.random() < 0.2:
            rng.choice(clients).request.cancelled = True
    while scheduler.step():
        assert scheduler.live_bytes + scheduler.store.nbytes <= scheduler.budget
    assert not scheduler.running and not scheduler.waiting and scheduler.live_bytes == 0

    for c in clients:
        done, want = c.done, expected(c.request.prompt, len(c.tokens))
        assert c.tokens == want
        assert len(want) == c.request.max_tokens or done.finish_reason == "cancelled"
        assert (done.prompt_tokens, done.completion_tokens) == (len(c.request.prompt), len(want))
        assert 0 <= done.cached_tokens < done.prompt_tokens
    counters, front = scheduler.counters, [c for c in clients if not c.request.background]
    reasons = [c.done.finish_reason for c in front]
    assert counters.cancelled == reasons.count("cancelled")
    assert counters.finished == len(front) - counters.cancelled and counters.failed == 0
    assert counters.prompt_tokens == sum(len(c.request.prompt) for c in front)
    assert counters.cached_tokens == sum(c.done.cached_tokens for c in front)
    assert counters.generated_tokens == sum(len(c.tokens) for c in clients)
    assert counters.forwards == len(model.forwards)
    computed = sum(len(tokens) for shares in model.forwards for _, tokens in shares)
    assert counters.computed_tokens == computed == sum(c.request.computed_tokens for c in clients)


# Lengths at which a sequence takes exactly what admission counts on, slabs growing in steps of 256.
PROMPT, OUTPUT = 200, 56


def test_the_youngest_gives_way_and_is_the_first_to_come_back() -> None:
    scheduler = make(HashModel())
    clients = [Client(scheduler, prompt(i, PROMPT), max_tokens=OUTPUT) for i in range(3)]
    while not all(c.tokens for c in clients):
        scheduler.step()
    late = Client(scheduler, prompt(4, 9), max_tokens=OUTPUT)
    oldest, *_, youngest = scheduler.running
    scheduler.budget = scheduler.live_bytes - 1
    scheduler.step()
    assert [r.request.prompt[0] for r in scheduler.running] == [0, 1]
    assert scheduler.waiting[0] is youngest and scheduler.counters.preempted == 1
    scheduler.budget = 1
    scheduler.step()
    assert scheduler.running == [oldest]
    assert [r.request.prompt[0] for r in scheduler.waiting] == [1, 2, 4] and scheduler.counters.preempted == 2
    scheduler.budget = 1 << 26
    run(scheduler)
    for i, client in enumerate(clients):
        assert client.tokens == expected(prompt(i, PROMPT), OUTPUT)
    assert clients[0].request.computed_tokens == PROMPT + OUTPUT - 1
    assert min(c.request.computed_tokens for c in clients[1:]) >= 2 * PROMPT
    assert late.done.finish_reason == "length" and scheduler.counters.preempted == 2


@pytest.mark.parametrize("short", [0, 1])
def test_what_a_sequence_still_needs_shrinks_with_every_token(short: int) -> None:
    scheduler = make(HashModel())
    Client(scheduler, prompt(1, PROMPT), max_tokens=OUTPUT)
    second = Client(scheduler, prompt(2, PROMPT), max_tokens=OUTPUT)
    while len(second.tokens) < 5:
        scheduler.step()
    scheduler.budget = scheduler.live_bytes - 1
    scheduler.step()
    assert len(scheduler.waiting) == 1
    need = cache_bytes(HashModel(), PROMPT + OUTPUT, CHUNK)
    scheduler.budget = scheduler.live_bytes + need - short
    scheduler.step()
    assert len(scheduler.waiting) == short


def test_giving_way_changes_no_draw() -> None:
    params = SamplingParams(seed=3, presence_penalty=0.5, logprobs=1)
    alone = Client(scheduler := make(HashModel()), prompt(2, 30), 20, params)
    run(scheduler)
    scheduler = make(HashModel())
    Client(scheduler, prompt(1, 30), max_tokens=40)
    client = Client(scheduler, prompt(2, 30), 20, params)
    for n in (1, 6, 7):
        scheduler.budget = 1 << 26
        while len(client.tokens) < n:
            scheduler.step()
        scheduler.budget = 1
        scheduler.step()
        assert len(scheduler.waiting) == 1
    scheduler.budget = 1 << 26
    run(scheduler)
    assert client.outputs == alone.outputs
    assert client.done.cached_tokens == 0 and scheduler.counters.cached_tokens == 0


def test_kept_prefixes_give_way_before_any_sequence_does() -> None:
    scheduler = make(HashModel())
    for i in range(30):
        Client(scheduler, prompt(10 + i, 30), max_tokens=1)  # window states are half of it
        run(scheduler)
    clients = [Client(scheduler, prompt(i, 250), max_tokens=20) for i in range(2)]
    while not all(c.tokens for c in clients):
        scheduler.step()
    held, live = scheduler.store.nbytes, scheduler.live_bytes
    scheduler.budget = live + held
    while not all(c.end for c in clients):
        # The caches grow beyond 256 tokens; the store makes room for it, and for no more than that.
        assert scheduler.store.nbytes + scheduler.live_bytes <= scheduler.budget
        if scheduler.live_bytes == live:
            assert scheduler.store.nbytes == held
        elif len(scheduler.running) == 2:
            assert scheduler.store.nbytes > held - 2 * (scheduler.live_bytes - live)
        scheduler.step()
    assert scheduler.counters.preempted == 0


def test_moving_caches_to_and_from_the_store_takes_no_more_than_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room is made before: for a moment there are the caches, those that run, and what is kept."""
    scheduler = make(HashModel())
    insert, load, peaks = PrefixStore.insert, SequenceCache.load, list[int]()

    def watched(store: PrefixStore, tokens: np.ndarray, cache: KVCache, *rest: Any) -> None:
        peaks.append(store.nbytes + cache.committed + scheduler.live_bytes)
        insert(store, tokens, cache, *rest)

    def loading(cache: SequenceCache, *rest: Any) -> int:
        peaks.append(scheduler.store.nbytes + cache.committed + scheduler.live_bytes)
        return load(cache, *rest)

    monkeypatch.setattr(PrefixStore, "insert", watched)
    monkeypatch.setattr(SequenceCache, "load", loading)
    scheduler.budget = 5 * cache_bytes(HashModel(), 256)
    for i in range(12):
        Client(scheduler, prompt(i, 200), max_tokens=20)
    run(scheduler)
    assert len(peaks) == 24 and max(peaks) <= scheduler.budget and scheduler.counters.preempted == 0


def test_window_states_count_once_they_are_kept() -> None:
    """They are not counted while their sequence runs, and are when it ends."""
    scheduler = make(HashModel(), chunk=512, message_start=MESSAGE)
    long = [MESSAGE if i % STATE_MIN_DISTANCE == 0 else t for i, t in enumerate(prompt(1, 2000))]
    first = Client(scheduler, long, max_tokens=5)
    second = Client(scheduler, prompt(2, 5), max_tokens=50)
    while len(first.tokens) < 2:
        scheduler.step()
    scheduler.budget = scheduler.live_bytes
    while not second.end:
        assert scheduler.live_bytes + scheduler.store.nbytes <= scheduler.budget
        scheduler.step()
    assert first.end and scheduler.store.nbytes and not scheduler.counters.preempted


def test_a_request_that_is_cancelled_in_line_ends_at_the_next_step() -> None:
    scheduler = make(HashModel(), max_running=1)
    Client(scheduler, prompt(1, 9), max_tokens=50)
    waiting = [Client(scheduler, prompt(2 + i, 9)) for i in range(3)]
    waiting[0].request.cancelled = waiting[2].request.cancelled = True
    scheduler.step()
    assert [c.end is not None for c in waiting] == [True, False, True]
    assert waiting[0].done.finish_reason == "cancelled" and scheduler.counters.cancelled == 2
    assert len(scheduler.waiting) == 1 and not waiting[0].request.computed_tokens


def test_memory_is_free_again_however_a_request_ends() -> None:
    def stop(token: int) -> bool:
        raise ValueError("no")

    scheduler = make(HashModel())
    first = expected(prompt(1, 9), 1)[0]
    ended = {
        "stop": Client(scheduler, prompt(1, 9), stop_ids=frozenset([first])),
        "length": Client(scheduler, prompt(2, 9)),
        "cancelled": Client(scheduler, prompt(3, 9), max_tokens=9999),
        "failed": Client(scheduler, prompt(4, 9), stop_text=stop),
    }
    for _ in range(20):
        scheduler.step()
    ended["cancelled"].request.cancelled = True
    waiting = Client(scheduler, prompt(5, 9))
    waiting.request.cancelled = True
    run(scheduler)
    assert waiting.done.finish_reason == "cancelled" and not waiting.tokens
    for reason in ("stop", "length", "cancelled"):
        assert ended[reason].done.finish_reason == reason
    assert isinstance(ended["failed"].end, GptOssError) and "ValueError: no" in str(ended["failed"].end)
    assert scheduler.live_bytes == 0 and not scheduler.running and not scheduler.waiting
    counters = scheduler.counters
    assert (counters.finished, counters.cancelled, counters.failed) == (2, 2, 1)
    assert scheduler.stats().prefix_bytes == sum(n.kv_bytes + n.state_bytes for n in scheduler.store.nodes())


def test_what_was_computed_is_kept_and_nothing_else() -> None:
    scheduler = make(HashModel())
    done = Client(scheduler, prompt(1, 40), max_tokens=7)
    filled = Client(scheduler, prompt(2, 40), max_tokens=0)
    broken = Client(scheduler, prompt(3, 40), max_tokens=0)
    scheduler.step()
    broken.request.cancelled = True
    run(scheduler)
    for client, n in ((done, 46), (filled, 40), (broken, 40)):
        timeline = np.array([*client.request.prompt, *client.tokens], np.int32)
        held = scheduler.store.common(timeline)
        assert held == n if client is not broken else 0 < held < n
    assert len(scheduler.store) == 3


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    scheduler = make(HashModel())
    for _ in range(2):
        client = Client(scheduler, prompt(1, 40))
        run(scheduler)
        assert client.tokens == expected(prompt(1, 40), 4)
    assert client.done.cached_tokens == 39


def test_the_same_prompt_twice_at_a_time_is_read_once() -> None:
    model = HashModel()
    scheduler = make(model)
    clients = [Client(scheduler, prompt(1, 10 * CHUNK), max_tokens=5) for _ in range(3)]
    run(scheduler)
    for client in clients:
        assert client.tokens == expected(prompt(1, 10 * CHUNK), 5)
    assert scheduler.counters.cached_tokens == 2 * (10 * CHUNK - 1)


def test_a_branch_begins_without_a_replay_where_another_began() -> None:
    """A state is taken where a timeline is left, so that only the first one to leave it reads again."""
    scheduler = make(HashModel())
    document = prompt(1, 300)
    Client(scheduler, document, max_tokens=1)
    run(scheduler)
    for i, cached in enumerate([150 - (WINDOW - 1), 150, 150]):
        client = Client(scheduler, [*document[:150], *prompt(2 + i, 20)], max_tokens=3)
        run(scheduler)
        assert client.done.cached_tokens == cached
        assert client.tokens == expected(client.request.prompt, 3)
    assert 150 in state_ends(scheduler, document)


def test_a_branch_leaves_a_state_also_where_it_began_without_a_replay() -> None:
    """The state that it began from lies further on, in a branch that may be dropped."""
    scheduler = make(HashModel())
    document = prompt(1, 300)
    Client(scheduler, document, max_tokens=1)
    run(scheduler)
    assert state_ends(scheduler, document) == [300]
    client = Client(scheduler, [*document[:280], *prompt(2, 20)], max_tokens=1)
    run(scheduler)
    assert client.done.cached_tokens == 280
    assert state_ends(scheduler, document) == [280, 300]
    # Both with all the history that there was.
    first = 300 - (WINDOW - 1) - STATE_SLACK
    assert {s.start for n in scheduler.store.nodes() for s in n.states.values() if s.end <= 280} == {first}


@pytest.mark.parametrize("running", [False, True])
def test_a_conversation_goes_on_without_a_replay(running: bool) -> None:
    """From the end of an answer, also when that is still being written."""
    scheduler = make(HashModel())
    first = Client(scheduler, prompt(1, 100), max_tokens=60 if running else 30)
    while len(first.tokens) < 30:
        scheduler.step()
    if not running:
        run(scheduler)
    timeline = [*prompt(1, 100), *first.tokens[:29]]
    second = Client(scheduler, [*timeline, MESSAGE, *prompt(2, 5)], max_tokens=5)
    run(scheduler)
    assert second.done.cached_tokens == 129
    assert second.tokens == expected(second.request.prompt, 5)


@pytest.mark.parametrize("written", [0, 60])
def test_a_resumed_sequence_resumes_a_little_before_its_states_as_well(written: int) -> None:
    """Those of a prompt's end as well as those of an answer's."""
    scheduler = make(HashModel())
    first = Client(scheduler, prompt(1, 200 - written), max_tokens=written + 1)
    run(scheduler)
    document = [*first.request.prompt, *first.tokens[:written]]
    for i, n in enumerate((200 - STATE_SLACK, 200 - STATE_SLACK - 1)):
        client = Client(scheduler, [*document[:n], *prompt(2 + i, 5)], max_tokens=1)
        run(scheduler)
        assert client.done.cached_tokens == (n if i == 0 else n - (WINDOW - 1))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 1400), max_size=12), st.integers(300, 1500), st.sampled_from([16, 100, 512, 2000])
)
def test_window_states_lie_where_a_conversation_may_branch(starts: list[int], n: int, chunk: int) -> None:
    tokens = prompt(1, n)
    for start in starts:
        if start < n:
            tokens[start] = MESSAGE
    scheduler = make(HashModel(), chunk=chunk, message_start=MESSAGE)
    Client(scheduler, tokens, max_tokens=0)
    run(scheduler)
    ends = state_ends(scheduler, tokens)
    assert ends[-1] == n
    at = 0
    for end in ends:
        assert MESSAGE not in tokens[at + STATE_MIN_DISTANCE : end]
        assert end - at < STATE_MAX_DISTANCE + chunk
        if end != n:
            start_of_message = tokens[end] == MESSAGE and end - at >= STATE_MIN_DISTANCE
            assert start_of_message or (end - at >= STATE_MAX_DISTANCE and end % chunk == 0)
        at = end


def test_a_long_answer_has_states_along_it() -> None:
    scheduler = make(HashModel())
    client = Client(scheduler, prompt(1, 50), max_tokens=2 * STATE_MAX_DISTANCE + 9)
    run(scheduler)
    timeline = [*prompt(1, 50), *client.tokens]
    along = [50, 50 + STATE_MAX_DISTANCE, 50 + 2 * STATE_MAX_DISTANCE, len(timeline) - 1]
    assert state_ends(scheduler, timeline) == along


def test_pinned_prefixes_are_told_by_the_prompt() -> None:
    asked: list[list[int]] = []

    def pinned(tokens: list[int]) -> int:
        asked.append(list(tokens))
        return 20

    scheduler = make(HashModel(), pinned_tokens=pinned)
    Client(scheduler, prompt(1, 40), max_tokens=3)
    run(scheduler)
    assert asked == [prompt(1, 40)]
    assert sorted((n.start, n.end, n.pinned) for n in scheduler.store.nodes()) == [
        (0, 20, True),
        (20, 42, False),
    ]


def test_a_closed_scheduler_has_told_everyone_and_holds_nothing() -> None:
    scheduler = make(HashModel(), max_running=1)
    Client(scheduler, prompt(9, 40), max_tokens=1)
    run(scheduler)
    clients = [Client(scheduler, prompt(i, 9), max_tokens=50) for i in range(3)]
    for _ in range(5):
        scheduler.step()
    scheduler.close()
    for client in clients:
        assert isinstance(client.end, GptOssError) and "closed" in str(client.end) and not client.after_end
    assert not scheduler.running and not scheduler.waiting
    assert scheduler.live_bytes == scheduler.store.nbytes == 0 and scheduler.counters.failed == 3


def test_the_stats_are_the_moment_and_the_totals() -> None:
    scheduler = make(HashModel(), max_running=2)
    for i in range(3):
        Client(scheduler, prompt(i, 9), max_tokens=50 if i else 2, params=GREEDY)
    for _ in range(8):
        scheduler.step()
    stats, counters = scheduler.stats(), scheduler.counters
    assert (stats.running, stats.waiting, stats.finished) == (2, 0, 1)
    assert stats.live_kv_bytes == scheduler.live_bytes > 0 and stats.kv_budget == scheduler.budget
    assert stats.prefix_bytes == scheduler.store.nbytes > 0 and stats.prefix_nodes == 1
    assert {name: getattr(stats, name) for name in vars(counters)} == vars(counters)
