"""Properties of what requests get: their own tokens and ends, whatever runs, fails or guesses beside them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.engine import scheduler as scheduling
from mlx_gptoss.engine.request import TokensDone
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.engine.speculate import AFTER, Speculation
from mlx_gptoss.errors import GptOssError, MemoryLimitError
from mlx_gptoss.sampling import SamplingParams
from tests.support.hash_model import VOCAB, HashModel, expected, logits_of
from tests.support.hash_model import prompt_of as prompt
from tests.support.scheduling import CHUNK, GREEDY, Client, make, run


class Even:
    """A constraint: even tokens only; may raise at its n-th token."""

    def __init__(self, raises: str = "", n: int = 0) -> None:
        self.accepted: list[int] = []
        self._raises, self._n = raises, n

    def allowed(self) -> np.ndarray:
        self._check("allowed")
        bits = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
        bits[0:VOCAB:2] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token_id: int) -> None:
        self._check("accept")
        self.accepted.append(token_id)

    def _check(self, where: str) -> None:
        if where == self._raises and len(self.accepted) == self._n:
            raise ValueError("a bad constraint")


PARAMS = {
    "greedy": GREEDY,
    "scored": SamplingParams(temperature=0.0, logprobs=3),
    "sampled": SamplingParams(seed=7, top_p=0.9, frequency_penalty=0.3),
    "both": SamplingParams(seed=8, logprobs=0),
}


def kinds(scheduler: Scheduler, n: int = 12) -> list[Client]:
    """A request of every kind of sampling, with and without a constraint."""
    clients = []
    for i, params in enumerate(PARAMS.values()):
        clients.append(Client(scheduler, prompt(2 * i, 5), n, params))
        clients.append(Client(scheduler, prompt(2 * i + 1, 5), n, params, constraint=Even()))
    return clients


@pytest.fixture(scope="module")
def alone() -> list[Client]:
    """The same requests, each with a scheduler of its own."""
    clients = []
    for i in range(2 * len(PARAMS)):
        client = kinds(scheduler := make(HashModel()))[i]
        for r in list(scheduler.waiting):
            if r.request is not client.request:
                scheduler.waiting.remove(r)
        run(scheduler)
        clients.append(client)
    return clients


def test_requests_of_every_kind_share_forwards_and_get_what_they_get_alone(alone: list[Client]) -> None:
    model = HashModel()
    scheduler = make(model, max_running=9)
    clients = kinds(scheduler)
    Client(scheduler, prompt(50, 6 * CHUNK), max_tokens=1)
    run(scheduler)
    assert max(map(len, model.forwards)) == 9
    for client, other in zip(clients, alone, strict=True):
        assert client.outputs == other.outputs and len(client.outputs) == 12


def test_log_probabilities_are_those_of_what_was_allowed(alone: list[Client]) -> None:
    for client in alone:
        constraint, top = client.request.constraint, client.request.params.logprobs
        timeline = list(client.request.prompt)
        for output in client.outputs:
            logits = logits_of(timeline).astype(np.float64)
            if constraint is not None:
                assert output.token_id % 2 == 0
                logits[1::2] = -np.inf
            logprobs = logits - np.log(np.exp(logits).sum())
            timeline.append(output.token_id)
            if top is None:
                assert output.logprobs is None
                continue
            assert output.logprobs is not None
            assert abs(output.logprobs.logprob - logprobs[output.token_id]) < 1e-4
            ids = [i for i, _ in output.logprobs.top]
            assert ids == np.argsort(-logprobs)[:top].tolist()
        assert not isinstance(constraint, Even) or constraint.accepted == client.tokens


@pytest.mark.parametrize("where", ["allowed", "accept"])
@pytest.mark.parametrize("n", [0, 2])
def test_a_constraint_that_fails_ends_its_own_request_only(where: str, n: int) -> None:
    scheduler = make(HashModel())
    before = Client(scheduler, prompt(1, 5), 12)
    bad = Client(scheduler, prompt(2, 5), 12, constraint=Even(where, n))
    after = Client(scheduler, prompt(3, 5), 12)
    run(scheduler)
    assert isinstance(bad.end, GptOssError) and "a bad constraint" in str(bad.end) and not bad.after_end
    assert len(bad.tokens) == n
    for client, seed in ((before, 1), (after, 3)):
        assert client.tokens == expected(prompt(seed, 5), 12)
        assert client.request.computed_tokens == 5 + 11  # nothing was read again
    assert scheduler.counters.failed == 1 and scheduler.counters.preempted == 0 and not scheduler.live_bytes


def test_a_constraint_is_not_asked_for_what_would_follow_the_end() -> None:
    """The forward that was launched before the end was read has logits for one more token."""
    scheduler = make(HashModel())
    free = Client(scheduler, prompt(2, 5), 3, constraint=Even())
    run(scheduler)
    stop = frozenset(free.tokens[-1:])
    client = Client(scheduler, prompt(2, 5), 9, stop_ids=stop, constraint=Even("allowed", 3))
    run(scheduler)
    assert client.tokens == free.tokens and client.done.finish_reason == "stop"
    assert (scheduler.counters.finished, scheduler.counters.failed) == (2, 0)


@pytest.mark.parametrize("drafted", [False, True])
def test_the_first_end_counts_and_nothing_follows_it(drafted: bool) -> None:
    want = expected(prompt(1, 5), 10)
    drafters = (lambda: Guesser(prompt(1, 5), 1.0)) if drafted else None

    def end(**options: Any) -> tuple[Client, str]:
        scheduler = make(HashModel(), drafters=drafters)
        client = Client(scheduler, prompt(1, 5), **{"max_tokens": 10, **options})
        run(scheduler)
        # What is kept of the timeline is sound, and all of it but a last token that was not computed.
        timeline = [*prompt(1, 5), *client.tokens]
        assert scheduler.store.common(np.array(timeline, np.int32)) >= len(timeline) - 1
        again = Client(scheduler, timeline, max_tokens=3)
        run(scheduler)
        assert again.tokens == expected(timeline, 3)
        return client, client.done.finish_reason

    def third(tokens: list[int]) -> Callable[[int], bool]:
        return lambda token: tokens.append(token) or len(tokens) == 3  # type: ignore[func-returns-value]

    for n in range(1, 10):
        client, reason = end(max_tokens=n)
        assert (client.tokens, reason) == (want[:n], "length")
        stop = frozenset([want[n], want[-1]])
        client, reason = end(stop_ids=stop)
        assert (client.tokens, reason) == (want[: min(map(want.index, stop)) + 1], "stop")
    told: list[int] = []
    client, reason = end(stop_text=third(told))
    assert told == client.tokens == want[:3] and reason == "stop"
    # A stop counts for more than the limit that falls on the same token.
    assert end(max_tokens=3, stop_text=third([]))[1] == "stop"


@pytest.mark.parametrize("drafted", [False, True])
def test_a_client_that_cancels_at_a_token_gets_no_more(drafted: bool) -> None:
    drafters = (lambda: Guesser(prompt(1, 5), 1.0)) if drafted else None
    scheduler = make(HashModel(), drafters=drafters)

    class CancelsAtThird(Client):
        def take(self, item: Any) -> None:
            super().take(item)
            self.request.cancelled = len(self.tokens) == 3

    client = CancelsAtThird(scheduler, prompt(1, 5), 50)
    run(scheduler)
    assert client.tokens == expected(prompt(1, 5), 3) and client.done.finish_reason == "cancelled"


class Breaks(HashModel):
    """A model whose n-th forward fails, and every one with the token `poison`."""

    def __init__(self, n: int = -1, poison: int = -1, error: Exception | None = None) -> None:
        super().__init__()
        self._left, self._poison, self._error = n, poison, error or RuntimeError("a bad moment")

    def __call__(self, tokens: mx.array, *rest: Any, **more: Any) -> Any:
        self._left -= 1
        if self._left == 0 or self._poison in np.array(tokens).tolist():
            raise self._error
        return super().__call__(tokens, *rest, **more)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 14))
def test_a_failed_forward_changes_nothing_of_what_anybody_gets(alone: list[Client], n: int) -> None:
    model = Breaks(n)
    scheduler = make(model)
    clients = kinds(scheduler)
    run(scheduler)
    for client, other in zip(clients, alone, strict=True):
        assert client.outputs == other.outputs
    assert (scheduler.counters.failed, scheduler.counters.finished) == (0, len(clients))
    # Each starts again alone.
    assert all(len(shares) == 1 for shares in model.forwards[n - 1 :])


@pytest.mark.parametrize("drafted", [False, True])
def test_others_join_a_sequence_that_started_again_once_it_has_a_token(drafted: bool) -> None:
    drafters = (lambda: Guesser(prompt(1, 5), 0.0)) if drafted else None
    scheduler = make(Breaks(3), drafters=drafters)
    first, second = (Client(scheduler, prompt(i, 5), max_tokens=20) for i in range(2))
    while not first.end:
        scheduler.step()
    late = [Client(scheduler, prompt(2 + i, 5)) for i in range(2)]
    run(scheduler)
    assert late[0].at[0] < second.at[4] and late[1].at[0] - late[0].at[0] <= 1


@pytest.mark.parametrize("gpu", [True, False])
def test_what_had_to_be_read_again_is_not_counted_as_cached(
    monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    """Also when the first token had been drawn, and nobody had it yet."""
    monkeypatch.setattr(scheduling, "on_gpu", lambda: gpu)
    model = Breaks(8)
    scheduler = make(model)
    document = prompt(1, 6 * CHUNK)
    Client(scheduler, document, max_tokens=0)
    run(scheduler)
    clients = [Client(scheduler, [*document, i]) for i in range(2)]
    scheduler.step()
    assert [c.request.cached_tokens for c in clients] == [len(document)] * 2
    run(scheduler)
    assert len(model.forwards[:7]) == 7 and not any(c.done.cached_tokens for c in clients[:1])
    assert scheduler.counters.cached_tokens == sum(c.done.cached_tokens for c in clients)
    assert [c.tokens for c in clients] == [expected([*document, i], 4) for i in range(2)]


def test_what_a_failed_forward_may_have_spoilt_is_forgotten() -> None:
    scheduler = make(Breaks(8))
    Client(scheduler, prompt(9, 40), max_tokens=1)
    run(scheduler)
    assert scheduler.store.nbytes
    for i in range(2):
        Client(scheduler, prompt(i, 5), max_tokens=30)
    while scheduler.store.nbytes:
        assert scheduler.step()
    assert len(scheduler.running) + len(scheduler.waiting) == 2
    run(scheduler)
    assert scheduler.counters.finished == 3 and scheduler.counters.failed == 0


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RuntimeError("poison"), GptOssError, "RuntimeError: poison"),
        (MemoryError("no"), MemoryLimitError, "out of memory: lower --kv-budget"),
        (RuntimeError("[metal] Unable to ALLOCATE 5 bytes"), MemoryLimitError, "out of memory"),
    ],
)
def test_a_forward_that_fails_for_one_request_says_why(
    error: Exception, kind: type[Exception], text: str
) -> None:
    scheduler = make(Breaks(poison=77, error=error))
    bad = Client(scheduler, [1, 77], max_tokens=3)
    run(scheduler)
    assert type(bad.end) is kind and text in str(bad.end) and scheduler.counters.failed == 1


def test_a_request_whose_caches_cannot_be_made_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(HashModel())
    first = Client(scheduler, prompt(1, 5), max_tokens=12)
    scheduler.step()
    with monkeypatch.context() as patched:
        patched.setattr(scheduler.runner, "make_cache", lambda adapter: 1 / 0)
        bad = Client(scheduler, prompt(2, 5))
        scheduler.step()
    assert isinstance(bad.end, GptOssError)
    run(scheduler)
    assert first.tokens == expected(prompt(1, 5), 12) and scheduler.counters.failed == 1


def test_what_fails_before_anything_runs_fails_the_first_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would meet the error again for ever."""
    scheduler = make(HashModel())
    clients = [Client(scheduler, prompt(i, 5)) for i in range(3)]
    with monkeypatch.context() as patched:
        patched.setattr(scheduler.runner, "cache_bytes", lambda *sizes: 1 / 0)
        assert scheduler.step()
    assert [isinstance(c.end, GptOssError) for c in clients] == [True, False, False]
    run(scheduler)
    assert [isinstance(c.end, TokensDone) for c in clients] == [False, True, True]
    with monkeypatch.context() as patched:  # and with nobody there it is no reason to stop
        patched.setattr(scheduler.store, "save", lambda: 1 / 0)
        assert scheduler.step()


class Guesser:
    """A drafter that knows the future of one prompt, and tells it right with some probability."""

    behind = False
    nbytes = 1234

    def __init__(self, start: list[int], right: float, params: SamplingParams = GREEDY) -> None:
        scheduler = make(HashModel())
        client = Client(scheduler, start, 80, params)
        run(scheduler)
        self._timeline = [*start, *client.tokens]
        self._rng = random.Random(1)
        self._right = right
        self.asked: list[tuple[int, int]] = []
        self.told: list[list[int]] = []

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        future = self._timeline[len(tokens) :][:limit]
        told = [
            t if self._rng.random() < self._right else (t + self._rng.choice([-1, 1])) % VOCAB for t in future
        ]
        self.asked.append((len(tokens), limit))
        self.told.append(told)
        return told


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(PARAMS)), st.floats(0, 1), st.integers(1, 6), st.integers(1, 30))
def test_guesses_change_no_output_and_are_counted(kind: str, right: float, draft: int, n: int) -> None:
    params = PARAMS[kind]
    plain = Client(scheduler := make(HashModel()), prompt(1, 9), n, params)
    run(scheduler)
    guesser = Guesser(prompt(1, 9), right, params)
    model = HashModel()
    scheduler = make(model, drafters=lambda: guesser, draft_tokens=draft)
    client = Client(scheduler, prompt(1, 9), n, params)
    while scheduler.step():
        held = scheduler.live_bytes - sum(r.live.committed for r in scheduler.running)
        assert held == (guesser.nbytes if scheduler.running else 0)
    assert client.outputs == plain.outputs

    # No more is guessed than is wanted after the token that is sure.
    assert all(0 < limit <= min(draft, n - (at - 9) - 1) for at, limit in guesser.asked)
    tokens, accepted, forwards = client.tokens, 0, 1
    for (at, _), told in zip(guesser.asked, guesser.told, strict=True):
        same = 0
        while same < len(told) and told[same] == tokens[at - 9 + same]:
            same += 1
        accepted += same
    counters = scheduler.counters
    assert counters.drafted_tokens == sum(map(len, guesser.told))
    assert counters.accepted_tokens == accepted
    assert counters.forwards == n - accepted >= forwards
    assert counters.computed_tokens == 9 + n - 1 + counters.drafted_tokens - accepted
    assert client.request.computed_tokens == counters.computed_tokens and counters.generated_tokens == n


def test_wrong_guesses_are_given_up_once() -> None:
    guesser = Guesser(prompt(1, 9), 0.0)
    scheduler = make(HashModel(), drafters=lambda: guesser, draft_tokens=4)
    client = Client(scheduler, prompt(1, 9), 60)
    run(scheduler)
    assert client.tokens == expected(prompt(1, 9), 60)
    counters = scheduler.counters
    assert counters.drafts_given_up == 1 and counters.accepted_tokens == 0
    assert AFTER <= counters.drafted_tokens < AFTER + 4


def test_constrained_and_background_requests_are_not_guessed_at() -> None:
    made: list[Guesser] = []

    def drafters() -> Guesser:
        made.append(Guesser(prompt(1, 9), 1.0))
        return made[-1]

    scheduler = make(HashModel(), drafters=drafters)
    Client(scheduler, prompt(1, 9), constraint=Even())
    run(scheduler)
    Client(scheduler, prompt(2, 9), max_tokens=0, background=True)
    run(scheduler)
    assert not made
    Client(scheduler, prompt(1, 9))
    run(scheduler)
    assert len(made) == 1 and made[0].told


def test_guessing_goes_beside_prompts_and_requests_without_it() -> None:
    """One of them guesses, one has a constraint, one is read: the rows of a forward are told apart."""
    scheduler = make(HashModel(), drafters=lambda: Guesser(prompt(1, 9), 0.7))
    guessed = Client(scheduler, prompt(1, 9), 40)
    even = Client(scheduler, prompt(2, 9), 40, constraint=Even())
    scheduler.step()
    read = Client(scheduler, prompt(3, 10 * CHUNK), 5)
    run(scheduler)
    assert guessed.tokens == expected(prompt(1, 9), 40)
    assert read.tokens == expected(prompt(3, 10 * CHUNK), 5)
    alone = Client(scheduler := make(HashModel()), prompt(2, 9), 40, constraint=Even())
    run(scheduler)
    assert even.tokens == alone.tokens


@pytest.mark.parametrize("silent", [False, True])
def test_a_round_is_judged_by_the_time_of_its_forward(monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    """Only those of a sure token and its guesses count: what else is read costs time of its own."""
    recorded: list[tuple[int, int, float]] = []
    record = Speculation.record

    def watched(speculation: Speculation, proposed: int, accepted: int, seconds: float) -> bool:
        recorded.append((proposed, accepted, seconds))
        return record(speculation, proposed, accepted, seconds)

    monkeypatch.setattr(Speculation, "record", watched)
    clock = iter(range(10**6))
    monkeypatch.setattr("mlx_gptoss.engine.scheduler.time.perf_counter", lambda: float(next(clock)))
    guesser = Guesser(prompt(1, 9), 1.0)
    if silent:  # rounds without a guess are timed as well, to compare
        monkeypatch.setattr(guesser, "propose", lambda tokens, limit: [])
    scheduler = make(HashModel(), drafters=lambda: guesser, draft_tokens=4)
    Client(scheduler, prompt(1, 9), 21)
    run(scheduler)
    assert [r[:2] for r in recorded] == ([(0, 0)] * 20 if silent else [(4, 4)] * 4)
    assert all(0 < seconds < 9 for *_, seconds in recorded)
