"""Properties of the engine on a small random checkpoint (float32)."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.engine import Engine, load
from mlx_gptoss.errors import (
    BusyError,
    ContextLengthError,
    GptOssError,
    MemoryLimitError,
    RequestError,
    TokenizerError,
)
from mlx_gptoss.model import Segment
from mlx_gptoss.request import TokensDone
from mlx_gptoss.sampling import SamplingParams
from tests.checkpoints import write_checkpoint
from tests.random_weights import Shape

SHAPE = Shape(layers=3, hidden=64, intermediate=64, experts=4, top_k=2, window=16, vocab=300)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("engine"), SHAPE)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Engine]:
    with load(folder, kv_budget=64 * 2**20, prefill_chunk=32) as engine:
        yield engine


def prompt(seed: int, n: int) -> list[int]:
    return [random.Random(f"{seed} {i}").randrange(SHAPE.vocab - 1) for i in range(n)]


def by_hand(llm: Engine, tokens: list[int], count: int) -> list[int]:
    """Greedy decoding with the bare model, one sequence, no engine around it."""

    def run() -> list[int]:
        model = llm._model
        assert model is not None
        cache, feed = model.make_cache(), tokens
        out: list[int] = []
        while len(out) < count and out[-1:] != [SHAPE.vocab - 1]:
            logits = model(mx.array(feed), [Segment(len(feed), cache)], [len(feed) - 1])
            assert logits is not None
            feed = np.array(mx.argmax(logits, axis=-1)).tolist()
            out += feed
        return out

    return llm._worker.call(run)


def test_greedy_generation_is_the_argmax_of_the_logits(llm: Engine) -> None:
    tokens = prompt(1, 70)
    assert list(llm.generate(tokens, GREEDY)) == by_hand(llm, tokens, 12)


def test_requests_at_once_equal_each_alone(llm: Engine) -> None:
    prompts = [prompt(10 + i, 3 + 13 * i) for i in range(8)]
    streams = [llm.submit(p, GREEDY) for p in prompts]
    together = [[o.token_id for o in s] for s in streams]
    for p, got in zip(prompts, together, strict=True):
        assert got == by_hand(llm, p, 12)


def test_a_seed_gives_the_same_tokens_whatever_runs_beside(llm: Engine) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=20)
    alone = list(llm.generate(prompt(20, 30), params))
    others = [llm.submit(prompt(21 + i, 40), SamplingParams(max_tokens=30)) for i in range(4)]
    assert list(llm.generate(prompt(20, 30), params)) == alone
    assert alone != list(llm.generate(prompt(20, 30), SamplingParams(seed=8, max_tokens=20)))
    for stream in others:
        stream.cancel()


def test_a_second_prompt_computes_only_what_is_new(llm: Engine) -> None:
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


def test_the_same_prompt_again_computes_one_token(llm: Engine) -> None:
    tokens = prompt(40, 100)
    first = list(llm.generate(tokens, GREEDY))
    again = llm.submit(tokens, GREEDY)
    assert [o.token_id for o in again] == first
    assert again.cached_tokens == 99


def test_requests_with_a_common_prefix_compute_it_once(llm: Engine) -> None:
    document = prompt(50, 500)
    before = llm.stats().computed_tokens
    streams = [llm.submit(document + prompt(51 + i, 10), GREEDY) for i in range(5)]
    for stream in streams:
        list(stream)
    assert llm.stats().computed_tokens - before < 500 + 5 * (10 + 12 + 30) + 30


def test_cancelling_frees_memory_and_says_so(llm: Engine) -> None:
    stream = llm.submit(prompt(60, 50), SamplingParams(temperature=0.0, stop_token_ids=()))
    next(stream)
    stream.cancel()
    list(stream)
    assert stream.finish_reason == "cancelled"
    assert llm.stats().running == 0 and llm.stats().live_kv_bytes == 0


def test_a_bad_constraint_harms_only_its_own_request(llm: Engine) -> None:
    class Broken:
        def allowed(self) -> np.ndarray | None:
            raise ValueError("broken")

        def accept(self, token_id: int) -> None: ...

    good = llm.submit(prompt(70, 40), GREEDY)
    bad = llm.submit(prompt(71, 40), GREEDY, constraint=Broken())
    with pytest.raises(GptOssError, match="broken"):
        list(bad)
    assert [o.token_id for o in good] == by_hand(llm, prompt(70, 40), 12)


def test_a_constraint_forces_tokens(llm: Engine) -> None:
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


def test_a_sink_gets_tokens_and_one_end(llm: Engine) -> None:
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


def test_a_sink_that_raises_cancels_its_own_request(llm: Engine) -> None:
    def sink(item: object) -> None:
        raise OSError("gone")

    stream = llm.submit(prompt(91, 10), SamplingParams(stop_token_ids=(), temperature=0.0), sink=sink)
    other = llm.submit(prompt(92, 10), GREEDY)
    assert len(list(other)) == 12
    while llm.stats().running:
        pass
    assert stream.finish_reason == "cancelled"


def test_logprobs_are_those_of_the_logits(llm: Engine) -> None:
    tokens = prompt(100, 20)
    outputs = list(llm.submit(tokens, SamplingParams(temperature=0.0, max_tokens=3, logprobs=2)))
    rows = llm.logits(tokens + [o.token_id for o in outputs])[19:22].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    for row, output in zip(rows, outputs, strict=True):
        assert output.logprobs is not None
        assert abs(output.logprobs.logprob - row[output.token_id]) < 1e-4
        assert [i for i, _ in output.logprobs.top] == np.argsort(-row)[:2].tolist()


def test_wrong_requests_are_told_before_they_run(llm: Engine) -> None:
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


def test_a_full_queue_is_busy(folder: Path) -> None:
    with load(folder, kv_budget=8 * 2**20, max_running=1, max_waiting=2) as llm:
        streams = []
        with pytest.raises(BusyError):
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
    thread = llm._worker._thread
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


def test_load_refuses_unknown_options(folder: Path) -> None:
    with pytest.raises(RequestError, match="no option 'kv_buget'"):
        mlx_gptoss.load(folder, kv_buget=1)
    with pytest.raises(RequestError, match="prefill_chunk is 0"):
        mlx_gptoss.load(folder, prefill_chunk=0)
