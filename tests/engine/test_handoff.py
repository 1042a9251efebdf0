"""Properties of the way from the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from mlx_gptoss.engine.handoff import Handoff, Start
from mlx_gptoss.engine.request import Sink


class Handle:
    """A generation that says nothing by itself."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.prompt_tokens = 0
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


def keeping(made: list[Handle]) -> Start:
    """A start whose handles are added to `made`."""

    def start(sink: Sink) -> Handle:
        made.append(Handle(sink))
        return made[-1]

    return start


def on_a_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_items_come_in_order_whatever_threads_they_come_from() -> None:
    async def read() -> list[tuple[int, Any]]:
        handoff = Handoff()
        made: list[Handle] = []
        await handoff.begin(0, keeping(made))
        await handoff.begin(7, keeping(made))
        threads = [on_a_thread(lambda h=h: [h.sink(n) for n in range(1000)]) for h in made]
        got: list[tuple[int, Any]] = []
        while len(got) < 2000:
            assert await handoff.wait(10)
            got += handoff.take(64)
        for thread in threads:
            thread.join()
        assert handoff.take() == []
        return got

    got = asyncio.run(read())
    assert [n for i, n in got if i == 0] == [n for i, n in got if i == 7] == list(range(1000))


def test_many_items_wake_the_loop_once_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    async def count() -> int:
        handoff = Handoff()
        loop = asyncio.get_running_loop()
        wakes = 0
        plain = loop.call_soon_threadsafe

        def counted(*args: Any, **more: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return plain(*args, **more)

        made: list[Handle] = []
        await handoff.begin(0, keeping(made))
        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        for n in range(1000):  # while the loop is held up
            made[0].sink(n)
        assert await handoff.wait(10) and len(handoff.take()) == 1000
        return wakes

    assert asyncio.run(count()) == 1


def test_a_wait_ends_on_time_and_when_it_is_told_to() -> None:
    async def wait() -> None:
        handoff = Handoff()
        assert not await handoff.wait(0)
        asyncio.get_running_loop().call_soon(handoff.wake)
        assert not await handoff.wait(10)

    asyncio.run(asyncio.wait_for(wait(), 5))


def test_what_is_begun_after_its_reader_gave_up_is_cancelled() -> None:
    begun, release = threading.Event(), threading.Event()
    made: list[Handle] = []

    def start(sink: Sink) -> Handle:
        begun.set()
        assert release.wait(10)
        made.append(Handle(sink))
        return made[0]

    async def give_up() -> None:
        handoff = Handoff()
        task = asyncio.create_task(handoff.begin(0, start))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        handoff.cancel()
        release.set()

    asyncio.run(give_up())  # which waits for the loop's threads
    assert made[0].cancelled.is_set()


def test_a_generation_whose_loop_was_closed_is_cancelled() -> None:
    made: list[Handle] = []

    async def leave(start: Start) -> None:
        await Handoff().begin(0, start)

    asyncio.run(leave(keeping(made)))
    assert not made[0].cancelled.is_set()
    made[0].sink("a token")
    assert made[0].cancelled.is_set()


def test_what_a_start_raises_reaches_the_one_who_begins_it() -> None:
    def start(sink: Sink) -> Handle:
        raise ValueError("no room")

    async def begin() -> None:
        handoff = Handoff()
        with pytest.raises(ValueError, match="no room"):
            await handoff.begin(0, start)
        assert handoff.handles == {}

    asyncio.run(begin())
