"""Properties of the engine on a small random checkpoint (float32)."""

from __future__ import annotations

import asyncio
import gc
import queue
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.chat.generation import Generation
from mlx_gptoss.engine.request import TokensDone
from mlx_gptoss.engine.sampler import Sampler
from mlx_gptoss.engine.stats import EngineStats
from mlx_gptoss.engine.worker import Worker
from mlx_gptoss.errors import (
    BusyError,
    ContextLengthError,
    GptOssError,
    MemoryLimitError,
    RequestError,
    TokenizerError,
)
from mlx_gptoss.llm import LLM, load
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(layers=3, hidden=64, intermediate=64, experts=4, top_k=2, window=16, vocab=300)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("engine"), SHAPE)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with load(folder, kv_budget=64 * 2**20, prefill_chunk=32) as engine:
        yield engine


def prompt(seed: int, n: int) -> list[int]:
    return [random.Random(f"{seed} {i}").randrange(SHAPE.vocab - 1) for i in range(n)]


def when_quiet(llm: LLM) -> EngineStats:
    """The engine's counts once every request is over."""
    while (stats := llm.stats()).running or stats.waiting:
        pass
    return stats


def by_hand(llm: LLM, tokens: list[int], count: int) -> list[int]:
    """Greedy decoding with the bare model, one sequence, no engine around it."""

    def run() -> list[int]:
        runner = llm.engine.scheduler.runner
        cache, feed = runner.make_cache(), tokens
        out: list[int] = []
        while len(out) < count and out[-1:] != [SHAPE.vocab - 1]:
            logits = runner.forward(mx.array(feed), [(len(feed), cache)], [len(feed) - 1])
            assert logits is not None
            feed = np.array(mx.argmax(logits, axis=-1)).tolist()
            out += feed
        return out

    return llm.engine.worker.call(run)


def test_greedy_generation_is_the_argmax_of_the_logits(llm: LLM) -> None:
    tokens = prompt(1, 70)
    assert list(llm.generate(tokens, GREEDY)) == by_hand(llm, tokens, 12)


def test_requests_at_once_equal_each_alone(llm: LLM) -> None:
    prompts = [prompt(10 + i, 3 + 13 * i) for i in range(8)]
    streams = [llm.submit(p, GREEDY) for p in prompts]
    together = [[o.token_id for o in s] for s in streams]
    for p, got in zip(prompts, together, strict=True):
        assert got == by_hand(llm, p, 12)


def test_a_seed_gives_the_same_tokens_whatever_runs_beside(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=20)
    alone = list(llm.generate(prompt(20, 30), params))
    others = [llm.submit(prompt(21 + i, 40), SamplingParams(max_tokens=30)) for i in range(4)]
    assert list(llm.generate(prompt(20, 30), params)) == alone
    assert alone != list(llm.generate(prompt(20, 30), SamplingParams(seed=8, max_tokens=20)))
    for stream in others:
        stream.cancel()


def test_a_second_prompt_computes_only_what_is_new(llm: LLM) -> None:
    document = prompt(30, 400)
    first = llm.submit(document + prompt(31, 20), GREEDY)
    list(first)
    assert first.cached_tokens == 0
    second = llm.submit(document + prompt(32, 20), GREEDY)
    got = [o.token_id for o in second]
    assert got == by_hand(llm, document + prompt(32, 20), 12)
    # A document that ends in the middle of a message: at most a replay of the sliding layers, here 2 x 15.
    assert second.cached_tokens >= 400 - 2 * 15
    third = llm.submit(document + prompt(33, 20), GREEDY)
    list(third)
    assert third.cached_tokens == 400


def test_the_same_prompt_again_computes_one_token(llm: LLM) -> None:
    tokens = prompt(40, 100)
    first = list(llm.generate(tokens, GREEDY))
    again = llm.submit(tokens, GREEDY)
    assert [o.token_id for o in again] == first
    assert again.cached_tokens == 99


def test_requests_with_a_common_prefix_compute_it_once(llm: LLM) -> None:
    document = prompt(50, 500)
    before = llm.stats().computed_tokens
    streams = [llm.submit(document + prompt(51 + i, 10), GREEDY) for i in range(5)]
    for stream in streams:
        list(stream)
    assert llm.stats().computed_tokens - before < 500 + 5 * (10 + 12 + 30) + 30


def test_cancelling_frees_memory_and_says_so(llm: LLM) -> None:
    stream = llm.submit(prompt(60, 50), SamplingParams(temperature=0.0, stop_token_ids=()))
    next(stream)
    stream.cancel()
    list(stream)
    assert stream.finish_reason == "cancelled"
    assert llm.stats().running == 0 and llm.stats().live_kv_bytes == 0


def test_a_stream_that_is_dropped_is_cancelled(llm: LLM) -> None:
    before = llm.stats()
    params = SamplingParams(temperature=0.0, stop_token_ids=())
    for _ in llm.submit(prompt(61, 50), params):
        break
    llm.submit(prompt(62, 50), params)
    stats = when_quiet(llm)
    assert stats.cancelled - before.cancelled == 2


def test_a_sink_is_served_without_its_stream(llm: LLM) -> None:
    got: queue.SimpleQueue[object] = queue.SimpleQueue()
    llm.submit(prompt(63, 10), GREEDY, sink=got.put)
    items = [got.get(timeout=5) for _ in range(13)]
    assert isinstance(items[-1], TokensDone) and items[-1].finish_reason == "length"


def test_events_that_are_dropped_are_cancelled(text_folder: Path) -> None:
    with load(text_folder, kv_budget=8 * 2**20) as llm:
        llm.stream("hello", stop_token_ids=())  # before the first event
        for _ in llm.stream("hello", stop_token_ids=()):
            break
        stats = when_quiet(llm)
    assert stats.cancelled == 2


def test_a_bad_constraint_harms_only_its_own_request(llm: LLM) -> None:
    class Broken:
        def allowed(self) -> np.ndarray | None:
            raise ValueError("broken")

        def accept(self, token_id: int) -> None: ...

    good = llm.submit(prompt(70, 40), GREEDY)
    bad = llm.submit(prompt(71, 40), GREEDY, constraint=Broken())
    with pytest.raises(GptOssError, match="broken"):
        list(bad)
    assert [o.token_id for o in good] == by_hand(llm, prompt(70, 40), 12)


def test_requests_without_a_seed_share_no_global_state(llm: LLM) -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        drawn.append(list(llm.generate(prompt(22, 10), SamplingParams(max_tokens=12))))
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.2}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}]
)
def test_what_a_sampler_remembers_does_not_grow(tmp_path: Path, penalty: dict[str, float]) -> None:
    sampler = Sampler(SamplingParams(**penalty), SHAPE.vocab, np.arange(3))  # type: ignore[arg-type]
    logits = mx.random.normal((SHAPE.vocab,), key=mx.random.key(0))

    def graph(draws: int) -> int:
        """Length of the graph that is not computed yet, as text."""
        for _ in range(draws):
            mx.eval(sampler.sample(logits))
        mx.export_to_dot(str(tmp_path / "graph"), *[a for a in sampler.state if a is not None])
        return len((tmp_path / "graph").read_text())

    assert abs(graph(30) - graph(30)) < 100


def test_a_constraint_forces_tokens(llm: LLM) -> None:
    class Forced:
        def __init__(self, tokens: list[int]) -> None:
            self.tokens = tokens

        def allowed(self) -> np.ndarray | None:
            if not self.tokens:
                return None
            bits = np.zeros(-(-SHAPE.vocab // 32), np.uint32)
            bits[self.tokens[0] // 32] = 1 << (self.tokens[0] % 32)
            return bits

        def accept(self, token_id: int) -> None:
            self.tokens = self.tokens[1:]

    out = list(llm.generate(prompt(80, 10), GREEDY, constraint=Forced([5, 6, 7])))
    assert out[:3] == [5, 6, 7]
    assert out[3:] == by_hand(llm, [*prompt(80, 10), 5, 6, 7], 9)


def test_a_sink_gets_tokens_and_one_end(llm: LLM) -> None:
    got: list[object] = []
    over = threading.Event()

    def sink(item: object) -> None:
        got.append(item)
        if isinstance(item, TokensDone | Exception):
            over.set()

    llm.submit(prompt(90, 10), GREEDY, sink=sink)
    assert over.wait(20)
    end = got[-1]
    assert isinstance(end, TokensDone) and end.finish_reason == "length" and end.completion_tokens == 12
    assert len(got) == 13


def test_a_sink_that_raises_cancels_its_own_request(llm: LLM) -> None:
    def sink(item: object) -> None:
        raise OSError("gone")

    stream = llm.submit(prompt(91, 10), SamplingParams(stop_token_ids=(), temperature=0.0), sink=sink)
    other = llm.submit(prompt(92, 10), GREEDY)
    assert len(list(other)) == 12
    while llm.stats().running:
        pass
    assert stream.finish_reason == "cancelled"


def test_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    tokens = prompt(100, 20)
    outputs = list(llm.submit(tokens, SamplingParams(temperature=0.0, max_tokens=3, logprobs=2)))
    rows = llm.logits(tokens + [o.token_id for o in outputs])[19:22].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    for row, output in zip(rows, outputs, strict=True):
        assert output.logprobs is not None
        assert abs(output.logprobs.logprob - row[output.token_id]) < 1e-4
        assert [i for i, _ in output.logprobs.top] == np.argsort(-row)[:2].tolist()


@pytest.mark.parametrize("length", [1, 2, 32, 33, 90])
def test_scores_are_those_of_the_logits(llm: LLM, length: int) -> None:
    tokens = prompt(101, length)
    rows = llm.logits(tokens).astype(np.float64)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    scores = llm.score(tokens, 3)
    assert len(scores) == length - 1
    for row, token, found in zip(rows[:-1], tokens[1:], scores, strict=True):
        assert abs(found.logprob - row[token]) < 1e-4
        assert [i for i, _ in found.top] == np.argsort(-row)[:3].tolist()
        assert all(abs(value - row[i]) < 1e-4 for i, value in found.top)
    assert [s.logprob for s in llm.score(tokens)] == [s.logprob for s in scores]


def test_what_was_computed_for_scores_is_kept_when_asked(llm: LLM) -> None:
    for seed, keep in ((104, False), (105, True)):
        tokens = prompt(seed, 70)
        llm.score(tokens, keep=keep)
        stream = llm.submit(tokens, GREEDY)
        found = [o.token_id for o in stream]
        assert stream.cached_tokens == (69 if keep else 0)
        assert found[0] == int(llm.logits(tokens)[-1].argmax())


def test_scoring_ends_when_it_is_told_to_and_runs_beside_requests(llm: LLM) -> None:
    for chunks in (0, 1, 2):
        answers = iter([False] * chunks + [True])
        assert len(llm.score(prompt(102, 90), cancelled=lambda: next(answers))) == 32 * chunks  # noqa: B023
    params = SamplingParams(stop_token_ids=(), temperature=0.0, max_tokens=40)
    alone = [o.token_id for o in llm.submit(prompt(103, 10), params)]
    stream = llm.submit(prompt(103, 10), params)
    scores = llm.score(prompt(102, 90))
    assert [o.token_id for o in stream] == alone and len(scores) == 89
    with pytest.raises(RequestError, match="logprobs is 301"):
        llm.score([1, 2], 301)
    with pytest.raises(ContextLengthError):
        llm.score([1] * (llm.max_context + 1))


def test_wrong_requests_are_told_before_they_run(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.submit([])
    with pytest.raises(RequestError, match=r"token_ids\[1\] is 300"):
        llm.submit([1, 300])
    with pytest.raises(RequestError, match=r"token_ids\[0\] is -1"):
        llm.logits([-1])
    with pytest.raises(ContextLengthError) as caught:
        llm.submit([1] * llm.max_context)
    assert caught.value.max_context == llm.max_context
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        llm.submit([1], SamplingParams(stop=("x",)))
    with pytest.raises(TokenizerError):
        _ = llm.tokenizer


def test_what_the_vocabulary_does_not_hold_is_told_before_it_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="logprobs is 301"):
        llm.submit([1], SamplingParams(logprobs=SHAPE.vocab + 1))


def test_a_request_that_cannot_be_queued_ends_with_the_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(request: object) -> None:
        raise IndexError("no such place")

    got: queue.SimpleQueue[object] = queue.SimpleQueue()
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.scheduler, "add", add)
        llm.submit([1], GREEDY, sink=got.put)
        end = got.get(timeout=5)
    assert isinstance(end, GptOssError) and "no such place" in str(end)


def test_a_check_of_the_reply_that_raises_is_the_end(text_folder: Path) -> None:
    def parse(text: str) -> None:
        raise KeyError("colour")

    got: list[object] = []
    generation = Generation(Tokenizer.from_folder(text_folder), parse=parse, sink=got.append)
    generation.take(TokensDone("stop", 1, 0, 0))
    end = got[-1]
    assert isinstance(end, GptOssError) and isinstance(end.__cause__, KeyError) and "colour" in str(end)


def test_a_job_that_was_accepted_runs_although_the_worker_closes() -> None:
    worker = Worker("closing")
    jobs = worker._jobs

    class Slow:
        """The queue, with someone closing the worker just before a job is put."""

        get = staticmethod(jobs.get)

        def put(self, job: Callable[[], object] | None) -> None:
            if job == done.set:
                closer.start()
                closer.join(0.2)
            jobs.put(job)

    done = threading.Event()
    closer = threading.Thread(target=worker.close)
    worker._jobs = Slow()  # type: ignore[assignment]
    worker.post(done.set)
    assert done.wait(5)
    closer.join(5)
    assert "closing" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError])
def test_no_job_ends_the_thread(error: type[BaseException]) -> None:
    def job() -> None:
        raise error

    worker = Worker("raising")
    worker.post(job)
    done = threading.Event()
    worker.post(done.set)
    assert done.wait(5)
    worker.close()


def test_a_full_queue_is_busy(folder: Path) -> None:
    with load(folder, kv_budget=8 * 2**20, max_running=1, max_waiting=2) as llm:
        streams = []
        with pytest.raises(BusyError):  # noqa: PT012
            for i in range(200):
                streams.append(llm.submit(prompt(i, 30), SamplingParams(stop_token_ids=(), max_tokens=200)))
        for stream in streams:
            stream.cancel()
            list(stream)


def test_a_budget_too_small_is_refused_with_numbers(folder: Path) -> None:
    with pytest.raises(MemoryLimitError, match="context of 64 tokens needs") as caught:
        load(folder, kv_budget=100_000)
    assert caught.value.available == 100_000 and caught.value.needed
    with pytest.raises(MemoryLimitError, match="the weights leave"):
        load(folder, kv_budget=10**15)


@pytest.mark.parametrize("kv_budget", [640_000, 700_000, 1_000_000, 1_400_000])
def test_the_longest_context_stays_within_the_budget(folder: Path, kv_budget: int) -> None:
    """Wherever the caches grow last on the way there."""
    with load(folder, kv_budget=kv_budget, prefill_chunk=64) as llm:
        scheduler, peak = llm.engine.scheduler, 0

        def watch(item: object) -> None:
            nonlocal peak
            peak = max(peak, scheduler.live_bytes)
            got.put(item)

        longest = llm.max_context
        for start in {1, longest // 2, max(1, (longest - 1) // 256 * 256 - 1), longest - 4}:
            got: queue.SimpleQueue[object] = queue.SimpleQueue()
            params = SamplingParams(temperature=0.0, stop_token_ids=(), max_tokens=6)
            llm.submit(prompt(start, start), params, sink=watch)
            while not isinstance(end := got.get(timeout=20), TokensDone):
                assert not isinstance(end, Exception)
    assert peak <= kv_budget


def test_a_small_budget_serves_everyone_in_turn(folder: Path) -> None:
    """Sequences that grow past the budget give way and come back, and their answers are the same."""
    with load(folder, kv_budget=2 * 2**20, prefill_chunk=64) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=())
        prompts = [prompt(200 + i, 480) for i in range(4)]
        streams = [llm.submit(p, params) for p in prompts]
        together = [[o.token_id for o in s] for s in streams]
        stats = llm.stats()
        assert stats.live_kv_bytes + stats.prefix_bytes <= stats.kv_budget
        alone = [list(llm.generate(p, params)) for p in prompts]
    assert together == alone
    assert stats.preempted > 0


def test_an_engine_that_is_dropped_ends_its_thread(folder: Path) -> None:
    llm = load(folder, kv_budget=8 * 2**20)
    thread = llm.engine.worker.call(threading.current_thread)
    list(llm.generate(prompt(1, 5), GREEDY))
    del llm
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_a_closed_engine_says_so(folder: Path) -> None:
    llm = load(folder, kv_budget=8 * 2**20)
    stream = llm.submit(prompt(1, 5), SamplingParams(stop_token_ids=(), temperature=0.0))
    next(stream)
    llm.close()
    with pytest.raises(GptOssError, match="closed"):
        list(stream)
    with pytest.raises(GptOssError, match="closed"):
        llm.submit([1])
    llm.close()


def test_logits_are_computed_for_as_many_tokens_as_the_context_holds(folder: Path) -> None:
    with load(folder, kv_budget=8 * 2**20, max_context=64) as llm:
        assert llm.engine.logits(prompt(1, 64)).shape[-1] == SHAPE.vocab
        with pytest.raises(ContextLengthError):
            llm.engine.logits(prompt(1, 65))


def test_load_refuses_kernels_that_are_asked_for_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTOSS_KERNELS", "1")
    with pytest.raises(RequestError, match="GPTOSS_KERNELS is '1': expected off, on or verify"):
        mlx_gptoss.load(folder)


def test_load_refuses_unknown_options(folder: Path) -> None:
    with pytest.raises(RequestError, match="no option 'kv_buget'"):
        mlx_gptoss.load(folder, kv_buget=1)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="prefill_chunk is 0"):
        mlx_gptoss.load(folder, prefill_chunk=0)
