"""Properties of a request and of the stream that its caller holds."""

from __future__ import annotations

import gc
import queue
from typing import Any

import pytest

from mlx_gptoss.engine.request import Request, TokenOutput, TokensDone, TokenStream
from mlx_gptoss.errors import GptOssError, RequestError
from mlx_gptoss.sampling import SamplingParams


def make(sink: Any = None) -> tuple[Request, TokenStream, list[str]]:
    """A request of three prompt tokens, the stream of it, and a list that grows at every wake."""
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    request = Request([1, 2, 3], SamplingParams(), sink or items.put, max_tokens=9, stop_ids=frozenset())
    woken: list[str] = []
    return request, TokenStream(request, None if sink else items, lambda: woken.append("woken")), woken


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr("mlx_gptoss.engine.request.time.perf_counter", lambda: now[0])
    return now


def test_a_stream_gives_its_tokens_and_then_ends_for_good() -> None:
    request, stream, _ = make()
    for token in (5, 6):
        request.emit(TokenOutput(token))
    request.end("length")
    assert iter(stream) is stream and [output.token_id for output in stream] == [5, 6]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(stream)
    assert stream.finish_reason == "length"
    assert (stream.prompt_tokens, stream.completion_tokens) == (3, 2)


def test_the_first_end_is_the_only_one() -> None:
    ends: list[Any] = []
    request, stream, _ = make(ends.append)
    request.cached_tokens = 2
    request.emit(TokenOutput(5))
    request.end("stop")
    request.end("cancelled")
    request.fail(ValueError("late"))
    assert ends == [TokenOutput(5), TokensDone("stop", 3, 2, 1)] and stream.finish_reason == "stop"
    ends.clear()
    request, stream, _ = make(ends.append)
    request.fail(RequestError("wrong", "top_k"))
    request.fail(ValueError("late"))
    request.end("stop")
    assert len(ends) == 1 and isinstance(ends[0], RequestError) and stream.finish_reason is None


def test_an_error_ends_the_stream_and_keeps_its_cause() -> None:
    request, stream, _ = make()
    request.emit(TokenOutput(5))
    request.fail(cause := ValueError("inside"))
    assert next(stream).token_id == 5
    with pytest.raises(GptOssError, match=r"ValueError: inside") as caught:
        next(stream)
    assert caught.value.__cause__ is cause
    with pytest.raises(StopIteration):
        next(stream)


def test_times_are_told_once_they_are_known(clock: list[float]) -> None:
    request, stream, _ = make()
    assert stream.time_to_first_token is None and stream.decode_seconds is None
    clock[0] = 103.0
    request.emit(TokenOutput(5))
    assert stream.time_to_first_token == 3.0 and stream.decode_seconds is None
    clock[0] = 107.0
    request.emit(TokenOutput(5))
    clock[0] = 108.0
    request.end("stop")
    assert stream.time_to_first_token == 3.0 and stream.decode_seconds == 5.0


def test_a_request_without_a_token_decoded_for_no_time(clock: list[float]) -> None:
    for cancelled in (True, False):
        request, stream, _ = make()
        clock[0] += 1.0
        if cancelled:
            request.end("cancelled")
        else:
            request.fail(ValueError("no"))
        assert stream.time_to_first_token is None and stream.decode_seconds is None


def test_with_a_sink_there_is_nothing_to_iterate() -> None:
    got: list[Any] = []
    request, stream, woken = make(got.append)
    assert list(stream) == []
    del stream
    gc.collect()
    assert not request.cancelled and not woken


def test_a_stream_that_is_forgotten_before_its_end_is_cancelled() -> None:
    for ended in (False, True):
        request, stream, woken = make()
        if ended:
            request.end("stop")
        del stream
        gc.collect()
        assert request.cancelled is not ended and len(woken) == (not ended)


def test_cancelling_wakes_the_engine() -> None:
    request, stream, woken = make()
    assert not request.cancelled and not request.ended
    stream.cancel()
    assert request.cancelled and woken == ["woken"]


def test_a_sink_that_raises_cancels_its_request_and_nothing_else() -> None:
    def sink(item: Any) -> None:
        raise KeyboardInterrupt

    request, stream, _ = make(sink)
    request.emit(TokenOutput(5))
    assert request.cancelled and not request.ended
    request.end("cancelled")
    assert request.ended and stream.completion_tokens == 1
