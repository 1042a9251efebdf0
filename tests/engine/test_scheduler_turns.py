"""Properties of whose turn it is: admission, the order of arrival, the shared chunk, background work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.engine import scheduler as scheduling
from mlx_gptoss.engine.request import Request
from mlx_gptoss.engine.scheduler import EXPECTED_OUTPUT, WORTH_WAITING, Scheduler
from tests.support.hash_model import WINDOW, HashModel, expected
from tests.support.hash_model import prompt_of as prompt
from tests.support.scheduling import CHUNK, GREEDY, Client, cache_bytes, make, run


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 24))
def test_the_chunk_is_shared_evenly_and_used_up(lengths: list[int], chunk: int) -> None:
    """Max-min fairness: who gets less than it needs gets no less than anybody else."""
    model = HashModel()
    scheduler = make(model, chunk=chunk, max_running=8)
    prompts = [prompt(i, n) for i, n in enumerate(lengths)]
    clients = [Client(scheduler, p, max_tokens=1) for p in prompts]
    run(scheduler)
    left = list(lengths)
    for shares in model.forwards:
        got = {
            p[0]: len(tokens)
            for p, n in zip(prompts, left, strict=True)
            for at, tokens in shares
            if n and at == len(p) - n and tokens == p[at : at + len(tokens)]
        }
        needs = {p[0]: n for p, n in zip(prompts, left, strict=True) if n}
        assert got.keys() == needs.keys()
        assert sum(got.values()) == min(sum(needs.values()), max(chunk, len(needs)))
        for name, n in got.items():
            assert 1 <= n <= needs[name]
            assert n == needs[name] or n >= max(got.values()) - 1
        left = [n - got.get(p[0], 0) for p, n in zip(prompts, left, strict=True)]
    assert not any(left)
    assert [c.tokens for c in clients] == [expected(p, 1) for p in prompts]


@pytest.mark.parametrize(
    ("length", "forwards"),
    [(32, [32]), (33, [21, 12]), (43, [31, 12]), (44, [32, 12]), (50, [32, 18]), (70, [32, 26, 12])],
)
def test_a_prompt_ends_with_enough_rows_to_read_each_expert_once(length: int, forwards: list[int]) -> None:
    model = HashModel()
    client = Client(scheduler := make(model, chunk=32, grouped_rows=12), prompt(1, length), max_tokens=1)
    run(scheduler)
    assert [len(tokens) for ((_, tokens),) in model.forwards] == forwards
    assert client.tokens == expected(prompt(1, length), 1)


def test_a_chunk_too_short_to_give_anything_up_is_used_up() -> None:
    model = HashModel()
    Client(scheduler := make(model, chunk=20, grouped_rows=12), prompt(1, 23), max_tokens=1)
    run(scheduler)
    assert [len(tokens) for ((_, tokens),) in model.forwards] == [20, 3]


@pytest.mark.parametrize("gpu", [True, False])
def test_tokens_are_read_while_the_next_forward_runs(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    """But a CPU works on a chunk of prompt while it launches it: beside one they are read before."""
    monkeypatch.setattr(scheduling, "on_gpu", lambda: gpu)
    model = HashModel()
    scheduler = make(model)
    decoding = Client(scheduler, prompt(1, 3), max_tokens=12)
    scheduler.step()
    reading = Client(scheduler, prompt(2, 4 * CHUNK - 4), max_tokens=1)
    run(scheduler)
    beside = [] if gpu else [1, 2, 3, 4]
    assert decoding.at == [*beside, *range(len(beside) + 2, 13), 12]
    assert reading.at == [6]
    # One token of each forward is the decoding sequence's, on a GPU besides the chunk.
    lengths = [[len(tokens) for _, tokens in shares] for shares in model.forwards]
    chunk = CHUNK if gpu else CHUNK - 1
    assert lengths == [[3], *[[1, chunk]] * 3, [1, 4 * CHUNK - 4 - 3 * chunk], *[[1]] * 7]


@pytest.mark.parametrize("places", [1, 2, 3])
def test_no_more_run_than_there_are_places_and_none_is_left_empty(places: int) -> None:
    scheduler = make(HashModel(), max_running=places)
    for i in range(5):
        Client(scheduler, prompt(i, 5), max_tokens=3)
    finished = 0
    while scheduler.step():
        assert len(scheduler.running) <= places
        if scheduler.waiting and scheduler.counters.finished == finished:
            assert len(scheduler.running) == places
        finished = scheduler.counters.finished
    assert finished == 5


# Lengths at which a sequence takes exactly what admission counts on, slabs growing in steps of 256.
PROMPT, OUTPUT = 200, 56


def second_of_two(scheduler: Scheduler, room: int, tokens: list[int], max_tokens: int) -> Client:
    """A request that arrives while another runs and `room` bytes are left, after one step."""
    Client(scheduler, prompt(1, PROMPT), max_tokens=OUTPUT)
    scheduler.step()
    scheduler.budget = scheduler.live_bytes + room
    second = Client(scheduler, tokens, max_tokens)
    scheduler.step()
    return second


@pytest.mark.parametrize("output", [OUTPUT, 256 + OUTPUT, EXPECTED_OUTPUT + OUTPUT, 100_000])
def test_a_sequence_is_let_in_when_its_prompt_and_expected_output_fit(output: int) -> None:
    need = cache_bytes(HashModel(), PROMPT + min(output, EXPECTED_OUTPUT), CHUNK)
    for room, running in ((need, 2), (need - 1, 1)):
        scheduler = make(HashModel())
        second = second_of_two(scheduler, room, prompt(2, PROMPT), output)
        assert len(scheduler.running) == running
        second.request.cancelled = True
        run(scheduler)
        assert scheduler.counters.preempted == 0


@pytest.mark.parametrize(
    ("n", "output", "held"), [(100, 20, 0), (PROMPT, OUTPUT, PROMPT - 1), (300, 90, 290)]
)
def test_a_sequence_that_is_let_in_stays(n: int, output: int, held: int) -> None:
    """Admission counts the memory that it really takes, also when most of its prompt is held already."""
    for tokens in range(n + output, n + output + 600, 100):
        scheduler = make(HashModel())
        if held:
            Client(scheduler, prompt(2, held), max_tokens=0)
            run(scheduler)
        room = HashModel().make_cache().nbytes_at(tokens, CHUNK)
        second = second_of_two(scheduler, room, prompt(2, n), output)
        run(scheduler)
        assert second.tokens == expected(prompt(2, n), output)
        assert scheduler.counters.preempted == 0


def test_a_sequence_that_runs_alone_is_let_in_whatever_it_needs() -> None:
    scheduler = make(HashModel(), budget=1)
    client = Client(scheduler, prompt(1, 30))
    run(scheduler)
    assert client.tokens == expected(prompt(1, 30), 4)


def test_nobody_overtakes_a_sequence_that_waits_for_memory() -> None:
    scheduler = make(HashModel())
    large = second_of_two(scheduler, 1, prompt(2, PROMPT), 5)
    small = Client(scheduler, prompt(3, 2), max_tokens=1)
    run(scheduler)
    assert large.at[0] < small.at[0]


@pytest.mark.parametrize("more", [WORTH_WAITING - 1, WORTH_WAITING, WORTH_WAITING + 9])
@pytest.mark.parametrize("held", [0, 40])
def test_a_request_waits_for_a_prefix_that_another_is_computing(more: int, held: int) -> None:
    """.. if what it saves is worth it, counted from what the store holds."""
    document = prompt(1, 400)
    scheduler = make(HashModel())
    if held:
        Client(scheduler, document[:held], max_tokens=1)
        run(scheduler)
    Client(scheduler, document, max_tokens=1)
    scheduler.step()
    read = held + CHUNK
    second = Client(scheduler, [*document[: read + more], *prompt(2, 5)])
    scheduler.step()
    assert len(scheduler.waiting) == (more >= WORTH_WAITING)
    run(scheduler)
    assert second.tokens == expected(second.request.prompt, 4)
    assert second.done.cached_tokens >= (read + more - WINDOW if more >= WORTH_WAITING else 0)


def test_a_request_overtakes_those_that_wait_for_a_prefix() -> None:
    document = prompt(1, 400)
    scheduler = make(HashModel())
    Client(scheduler, document, max_tokens=1)
    scheduler.step()
    waits = Client(scheduler, [*document, 7])
    other = Client(scheduler, prompt(2, 5))
    run(scheduler)
    assert other.at[0] < waits.at[0]


def test_nobody_waits_for_a_prompt_that_has_been_read() -> None:
    document = prompt(1, 40)
    scheduler = make(HashModel())
    Client(scheduler, document, max_tokens=50)
    for _ in range(4):
        scheduler.step()
    second = Client(scheduler, [*document, *prompt(2, 2 * WORTH_WAITING)], max_tokens=1)
    scheduler.step()
    assert len(scheduler.running) == 2
    run(scheduler)
    assert second.done.cached_tokens == len(document)


def test_work_in_the_background_yields_as_long_as_anything_else_is_there() -> None:
    scheduler = make(HashModel(), max_running=1)
    first = Client(scheduler, prompt(1, 5), max_tokens=3)
    quiet = Client(scheduler, prompt(2, 5), max_tokens=0, background=True)
    second = Client(scheduler, prompt(3, 5), max_tokens=3)
    while not second.end:
        assert not quiet.end and len(scheduler.waiting) >= 1
        scheduler.step()
    run(scheduler)
    assert first.done.finish_reason == second.done.finish_reason == quiet.done.finish_reason == "length"
    assert quiet.request.computed_tokens == 5


@pytest.mark.parametrize("waits", [False, True])
def test_work_in_the_background_is_no_part_of_the_counts(waits: bool) -> None:
    scheduler = make(HashModel())
    document = prompt(1, 4 * CHUNK)
    Client(scheduler, document, max_tokens=0, background=True)
    scheduler.step()
    asked = Client(scheduler, [*document, 7]) if waits else None
    run(scheduler)
    counters = scheduler.counters
    assert (counters.finished, counters.cancelled) == (int(waits), 0)
    assert counters.prompt_tokens == (len(document) + 1 if waits else 0)
    assert counters.cached_tokens == (asked.done.cached_tokens if asked else 0)
    again = Client(scheduler, [*document, 7], max_tokens=0, background=True)
    run(scheduler)
    assert again.done.cached_tokens == 0 and again.request.computed_tokens < len(document)
    assert counters.prompt_tokens == (len(document) + 1 if waits else 0)


def test_preparations_run_one_by_one_when_nothing_else_is_to_do() -> None:
    scheduler = make(HashModel())
    ends: list[object] = []

    def quiet(seed: int) -> Callable[[], Request]:
        def request() -> Request:
            assert not scheduler.running and not scheduler.waiting
            return Request(
                prompt(seed, 9), GREEDY, ends.append, max_tokens=0, stop_ids=frozenset(), background=True
            )

        return request

    scheduler.preparations.extend([quiet(1), lambda: None, quiet(2)])
    asked = Client(scheduler, prompt(3, 9))
    while not asked.end:
        scheduler.step()
        assert len(scheduler.preparations) == 3
    run(scheduler)
    assert len(ends) == 2 and not scheduler.preparations
    for seed in (1, 2):
        again = Client(scheduler, [*prompt(seed, 9), 7], max_tokens=1)
        run(scheduler)
        assert again.done.cached_tokens == 9


def test_an_idle_scheduler_says_so_and_a_busy_one_does_not() -> None:
    scheduler = make(HashModel())
    assert not scheduler.step() and not scheduler.step()
    client = Client(scheduler, prompt(1, 5), max_tokens=2)
    while not client.end:
        assert scheduler.step()
    assert not scheduler.step()
