"""From the engine's thread to an event loop: generations as a coroutine sees them.

The engine calls sinks on its own thread. A Handoff carries what they get over to an event loop, several items
at a time when they come faster than they are read; no generation has a thread of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from mlx_gptoss.engine.request import Cancellable, Sink

Start = Callable[[Sink], Cancellable]


class Handoff:
    """The generations of one coroutine, made on its event loop.

    handles: those begun, by the index they were given, until they are forgotten.
    """

    def __init__(self) -> None:
        self.handles: dict[int, Cancellable] = {}
        self._loop = asyncio.get_running_loop()
        self._items: deque[tuple[int, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._waking = False
        self._cancelled = False

    async def begin(self, index: int, start: Start, executor: Executor | None = None) -> None:
        """Start a generation off the event loop: rendering a long prompt or compiling a grammar takes time.

        executor: where (default: the loop's own, whose threads are few). Raises what `start` raises.
        """
        await self._loop.run_in_executor(executor, self._begin, index, start)

    def take(self, limit: int | None = None) -> list[tuple[int, Any]]:
        """What the sinks got since the last look, `limit` items at most, each with its generation's index."""
        count = len(self._items) if limit is None else min(limit, len(self._items))
        return [self._items.popleft() for _ in range(count)]

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait until there are items, but no longer than `seconds` or the next `wake`; whether there are."""
        if not self._items:
            self._waiter = self._loop.create_future()
            alarm = None if seconds is None else self._loop.call_later(seconds, self.wake)
            try:
                await self._waiter
            finally:
                if alarm is not None:
                    alarm.cancel()
        return bool(self._items)

    def wake(self) -> None:
        """End the wait."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Cancel what runs, and what is only being started. Safe to call again, from any thread."""
        self._cancelled = True
        for handle in list(self.handles.values()):
            handle.cancel()

    # --- on other threads

    def _begin(self, index: int, start: Start) -> None:
        handle = start(lambda item: self._put(index, item))
        self.handles[index] = handle
        if self._cancelled:  # nobody waited for it
            handle.cancel()

    def _put(self, index: int, item: Any) -> None:
        self._items.append((index, item))
        if not self._waking:
            self._waking = True
            try:
                self._loop.call_soon_threadsafe(self._notify)
            except RuntimeError:  # the loop was closed under us: nobody is left to read
                self.cancel()

    def _notify(self) -> None:
        # The flag falls before the items are read, so that one appended in between wakes the reader again.
        self._waking = False
        self.wake()
