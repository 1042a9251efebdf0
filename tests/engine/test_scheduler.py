"""Properties of the scheduler, stepped by hand (no thread, no clock)."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import mlx.core as mx
import pytest

from mlx_gptoss.checkpoint.reader import load_model
from mlx_gptoss.engine.request import Request, TokenOutput, TokensDone
from mlx_gptoss.engine.runner import LocalRunner
from mlx_gptoss.engine.speculate import ModelDrafter
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.sequence_cache import SequenceCache
from mlx_gptoss.sampling import PromptProgress, SamplingParams
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape
from tests.support.scheduling import CHUNK, GREEDY, Client, make, prompt, run

SHAPE = Shape(layers=2, hidden=64, intermediate=64, experts=4, top_k=2, window=16, vocab=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(write_checkpoint(tmp_path_factory.mktemp("scheduler"), SHAPE))


def alone(model: Model, tokens: list[int], max_tokens: int = 4, params: SamplingParams = GREEDY) -> list[int]:
    client = Client(scheduler := make(model), tokens, max_tokens, params)
    run(scheduler)
    return client.tokens


def test_a_short_request_waits_two_chunks_of_a_long_prefill_at_most(model: Model) -> None:
    scheduler = make(model)
    long = Client(scheduler, prompt(1, 40 * CHUNK))
    for _ in range(3):
        scheduler.step()
    arrived = scheduler.counters.forwards
    short = Client(scheduler, prompt(2, CHUNK // 2))
    run(scheduler)
    # Its token is computed by the next forward, and read while the one after that runs.
    assert short.at[0] - arrived <= 2
    assert isinstance(long.end, TokensDone) and long.tokens == alone(model, prompt(1, 40 * CHUNK))


def test_running_streams_get_a_token_at_every_forward_beside_a_prefill(model: Model) -> None:
    scheduler = make(model)
    stream = Client(scheduler, prompt(3, 4), max_tokens=30)
    for _ in range(4):
        scheduler.step()
    Client(scheduler, prompt(4, 20 * CHUNK))
    run(scheduler)
    # One token a forward; it is read just before or just after the next forward is launched.
    assert len(stream.at) == 30 and stream.at[-1] - stream.at[0] <= 30
    assert max(b - a for a, b in zip(stream.at, stream.at[1:], strict=False)) <= 2


def test_prompts_share_the_chunk_and_nobody_starves(model: Model) -> None:
    scheduler = make(model)
    clients = [Client(scheduler, prompt(10 + i, 50), max_tokens=10) for i in range(4)]
    run(scheduler)
    starts, ends = [c.at[0] for c in clients], [c.at[-1] for c in clients]
    assert max(starts) - min(starts) <= 2 and max(ends) - min(ends) <= 2
    for i, client in enumerate(clients):
        assert client.tokens == alone(model, prompt(10 + i, 50), 10)


def test_places_are_given_in_order_of_arrival(model: Model) -> None:
    scheduler = make(model, max_running=2)
    clients = [Client(scheduler, prompt(20 + i, 8)) for i in range(5)]
    scheduler.step()
    assert len(scheduler.running) == 2 and len(scheduler.waiting) == 3
    run(scheduler)
    starts = [c.at[0] for c in clients]
    assert starts == sorted(starts)


def test_cancelling_frees_memory_at_the_next_step(model: Model) -> None:
    scheduler = make(model)
    running = Client(scheduler, prompt(30, 10), max_tokens=500)
    other = Client(scheduler, prompt(31, 10), max_tokens=10)
    for _ in range(4):
        scheduler.step()
    running.request.cancelled = True
    before = scheduler.live_bytes
    scheduler.step()
    assert isinstance(running.end, TokensDone) and running.end.finish_reason == "cancelled"
    assert scheduler.live_bytes < before
    run(scheduler)
    assert other.tokens == alone(model, prompt(31, 10), 10)
    assert scheduler.live_bytes == 0


def test_a_prefix_of_a_running_request_is_not_mixed_with_another_branch(model: Model) -> None:
    """The store knows a branch that leaves early, a running request the longer common prefix."""
    scheduler = make(model)
    document = prompt(70, 500)
    Client(scheduler, document[:60] + prompt(71, 3), max_tokens=1)
    run(scheduler)
    Client(scheduler, document + prompt(72, 5), max_tokens=30)
    while scheduler.counters.forwards < 45:
        scheduler.step()
    assert len(scheduler.running) == 1
    third = Client(scheduler, document[:75] + prompt(73, 5))
    run(scheduler)
    assert isinstance(third.end, TokensDone) and third.end.cached_tokens == 75 - 15
    assert third.tokens == alone(model, document[:75] + prompt(73, 5))


class Poisoned:
    """A model that cannot stand one token."""

    def __init__(self, model: Model, token: int) -> None:
        self.model, self.token = model, token
        self.config, self.dtype = model.config, model.dtype

    def __call__(self, tokens: mx.array, *rest: Any, **more: Any) -> Any:
        if self.token in tokens.tolist():  # type: ignore[operator]
            raise RuntimeError("poison")
        return self.model(tokens, *rest, **more)


def test_a_request_that_breaks_the_forward_breaks_it_for_itself_only(model: Model) -> None:
    scheduler = make(Poisoned(model, 299))
    good = [Client(scheduler, prompt(40 + i, 20), max_tokens=6) for i in range(3)]
    bad = Client(scheduler, [1, 2, 299])
    late = Client(scheduler, prompt(44, 20), max_tokens=6)
    run(scheduler)
    assert isinstance(bad.end, GptOssError) and "poison" in str(bad.end)
    for client, seed in zip([*good, late], (40, 41, 42, 44), strict=True):
        assert client.tokens == alone(model, prompt(seed, 20), 6)
    assert scheduler.counters.failed == 1


def test_requests_that_start_again_are_not_overtaken(model: Model) -> None:
    scheduler = make(Poisoned(model, 299))
    good = [Client(scheduler, prompt(45 + i, 20), max_tokens=6) for i in range(2)]
    Client(scheduler, [1, 2, 299])
    later = []
    for i in range(40):
        scheduler.step()
        later.append(Client(scheduler, prompt(100 + i, 4), max_tokens=6))
    run(scheduler)
    assert max(c.at[0] for c in good) < min(c.at[0] for c in later)


class FailsOnce:
    """A model whose n-th forward fails."""

    def __init__(self, model: Model, n: int) -> None:
        self.model, self.left = model, n
        self.config, self.dtype = model.config, model.dtype

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("a bad moment")
        return self.model(*args, **more)


@pytest.mark.parametrize("n", [3, 4, 7])
def test_a_failed_forward_changes_no_tokens(model: Model, n: int) -> None:
    asked = [
        GREEDY,
        SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(seed=11),
        SamplingParams(seed=12, presence_penalty=0.5),
    ]
    scheduler = make(FailsOnce(model, n))
    clients = [Client(scheduler, prompt(80 + i, 4), 12, params) for i, params in enumerate(asked)]
    run(scheduler)
    assert scheduler.counters.failed == 0
    for i, (client, params) in enumerate(zip(clients, asked, strict=True)):
        assert client.tokens == alone(model, prompt(80 + i, 4), 12, params)


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_cannot_be_kept_ends_all_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    scheduler = make(model)
    client = Client(scheduler, prompt(90, 10), max_tokens=4)
    with monkeypatch.context() as patched:
        patched.setattr(SequenceCache, "export", lambda *args, **more: 1 / 0)
        scheduler.step()
        client.request.cancelled = cancelled
        run(scheduler)
    assert isinstance(client.end, TokensDone)
    assert client.end.finish_reason == ("cancelled" if cancelled else "length")
    assert scheduler.live_bytes == scheduler.store.nbytes == 0
    # The half of it that was written down misleads nobody.
    again = Client(scheduler, prompt(90, 10), max_tokens=4)
    run(scheduler)
    assert again.tokens == alone(model, prompt(90, 10))


def test_a_sink_may_raise_anything(model: Model) -> None:
    scheduler = make(model)

    def sink(item: Any) -> None:
        raise SystemExit

    scheduler.add(Request(prompt(91, 5), GREEDY, sink, max_tokens=50, stop_ids=frozenset()))
    other = Client(scheduler, prompt(92, 5), max_tokens=6)
    run(scheduler)
    assert other.tokens == alone(model, prompt(92, 5), 6)
    assert scheduler.counters.cancelled == 1


def test_memory_stays_within_the_budget(model: Model) -> None:
    budget = int(2.2 * LocalRunner(model).cache_bytes(500, 1))
    scheduler = make(model, budget=budget)
    clients = [Client(scheduler, prompt(50 + i, 300), max_tokens=30) for i in range(4)]
    peak = 0
    while scheduler.step():
        peak = max(peak, scheduler.live_bytes + scheduler.store.nbytes)
    assert peak <= budget
    for i, client in enumerate(clients):
        assert client.tokens == alone(model, prompt(50 + i, 300), 30)


def test_a_waiting_or_closed_scheduler_holds_no_draft_caches(model: Model) -> None:
    held: weakref.WeakSet[ModelDrafter] = weakref.WeakSet()

    def drafter() -> ModelDrafter:
        held.add(made := ModelDrafter(LocalRunner(model), CHUNK))
        return made

    # Not all of them fit, once they grow.
    budget = int(2.2 * LocalRunner(model).cache_bytes(1000, 1))
    scheduler = make(model, budget=budget, drafters=drafter)
    factory = weakref.ref(drafter)
    del drafter
    clients = [Client(scheduler, prompt(93 + i, 300), max_tokens=250) for i in range(3)]
    while not scheduler.counters.preempted:
        assert scheduler.step()
    gc.collect()
    assert len(held) == len(scheduler.running)
    scheduler.close()
    gc.collect()
    assert not held and factory() is None
    assert all(isinstance(c.end, GptOssError) for c in clients)


def test_background_requests_give_way(model: Model) -> None:
    scheduler = make(model)
    quiet = Client(scheduler, prompt(60, 10 * CHUNK), max_tokens=0, background=True)
    for _ in range(4):
        scheduler.step()
    asked = Client(scheduler, prompt(60, 10 * CHUNK))
    run(scheduler)
    assert isinstance(quiet.end, TokensDone) and quiet.end.finish_reason == "cancelled"
    # What had been read in the background was not read again.
    assert isinstance(asked.end, TokensDone) and asked.end.cached_tokens >= 2 * CHUNK
    assert asked.tokens == alone(model, prompt(60, 10 * CHUNK))


def test_those_who_ask_are_told_how_far_their_prompt_is_read(model: Model) -> None:
    scheduler = make(model, chunk=128)
    tokens = prompt(60, 3000)
    for cached in (0, len(tokens) - 1):
        told: list[Any] = []
        asked = Request(tokens, GREEDY, told.append, max_tokens=2, stop_ids=frozenset(), progress=told.append)
        scheduler.add(asked)
        silent = Client(scheduler, prompt(61, 700))
        run(scheduler)
        progress = [item for item in told if isinstance(item, PromptProgress)]
        assert told[: len(progress)] == progress, "before the first token"
        assert [type(item) for item in told[len(progress) :]] == [TokenOutput, TokenOutput, TokensDone]
        read = [item.read_tokens for item in progress]
        assert read[0] == cached and read == sorted(set(read)) and read[-1] < len(tokens)
        assert len(read) >= (5 if not cached else 1), "every 512 tokens or more often"
        assert all((item.cached_tokens, item.prompt_tokens) == (cached, len(tokens)) for item in progress)
        assert silent.done.finish_reason == "length"
