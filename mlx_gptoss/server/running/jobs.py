"""Jobs: generations as the event loop sees them.

The engine calls a sink on its own thread; a Job carries the events of one request's generations over to the
event loop, several at a time when they come faster than they are written. Jobs bounds how many generations
run or wait, and ends them on time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlx_gptoss.chat.generation import Cancellable
from mlx_gptoss.engine.request import PromptProgress, Sink, TokensDone
from mlx_gptoss.errors import BusyError
from mlx_gptoss.harmony import Done
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.running.metrics import Metrics
from mlx_gptoss.server.settings import ServerSettings

Start = Callable[[Sink], Cancellable]
Batch = list[tuple[int, Any]]  # events, each with the index of its generation
MAX_BATCH = 256  # events written at a time, so that no job keeps the loop from the others


class Job:
    """The generations of one request. `batches()` yields what they produced since the last look, and ends."""

    def __init__(self, jobs: Jobs, count: int) -> None:
        self.count = count
        self._jobs = jobs
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._waking = False
        self._handles: list[Cancellable] = []
        self._running = set(range(count))
        self._silent = set(range(count))  # those that have produced nothing yet
        self._failure: BaseException | None = None
        self._closed = False
        self._started = time.monotonic()
        limit = jobs.settings.request_timeout
        too_long = ApiError(504, f"The answer took longer than {limit:g} s.", code="timeout")
        self.deadline = self._started + limit
        self._alarm = self._loop.call_later(limit, self.stop, too_long)

    async def begin(self, starts: Sequence[Start]) -> None:
        """Start the generations off the event loop: rendering a long conversation takes time."""

        def begin_one(index: int, start: Start) -> None:
            self._handles.append(start(lambda event: self._hand_over(index, event)))
            if self._closed:  # nobody waited for it
                self._handles[-1].cancel()

        for index, start in enumerate(starts):
            await self._loop.run_in_executor(self._jobs.starters, begin_one, index, start)

    def _hand_over(self, index: int, event: Any) -> None:
        """Take an event of a generation; called on the engine's thread."""
        self._events.append((index, event))
        if not self._waking:
            self._waking = True
            try:
                self._loop.call_soon_threadsafe(self._notify)
            except RuntimeError:  # the loop was closed under us: nobody is left to read
                self._cancel()

    def _notify(self) -> None:
        # The flag falls before the queue is read, so an event appended in between wakes the reader again.
        self._waking = False
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the (first) prompt."""
        return self._handles[0].prompt_tokens

    async def batches(self) -> AsyncIterator[Batch]:
        """Events in order, several at a time; an empty list when nothing came for a heartbeat.

        Raises what the engine delivered as an exception, or ApiError when time ran out or the server stops.
        """
        while self._running or self._failure is not None:
            if self._failure is not None:
                raise self._failure
            if self._events:
                if batch := self._take():
                    yield batch
                continue
            self._waiter = self._loop.create_future()
            heartbeat = self._loop.call_later(self._jobs.settings.heartbeat, self._wake)
            await self._waiter
            heartbeat.cancel()
            if not self._events and self._failure is None:
                yield []

    def _take(self) -> Batch:
        """The next events, up to the end or an exception, which becomes the failure."""
        batch: Batch = []
        while self._events and len(batch) < MAX_BATCH:
            index, event = self._events.popleft()
            if isinstance(event, BaseException):
                self._failure = event
                self._running.remove(index)
                self._jobs.metrics.generations.labels("error").inc()
                break
            self._observe(index, event)
            batch.append((index, event))
        return batch

    def _observe(self, index: int, event: Any) -> None:
        """Count what an event tells, and note the end of its generation."""
        metrics = self._jobs.metrics
        if index in self._silent and not isinstance(event, PromptProgress):
            self._silent.remove(index)
            metrics.first_event.observe(time.monotonic() - self._started)
        if isinstance(event, (Done, TokensDone)):
            self._running.remove(index)
            metrics.generations.labels(event.finish_reason).inc()
            metrics.duration.observe(time.monotonic() - self._started)
            usage = event.usage if isinstance(event, Done) else event
            metrics.prompt_tokens.inc(usage.prompt_tokens)
            metrics.cached_tokens.inc(usage.cached_tokens)
            metrics.completion_tokens.inc(usage.completion_tokens)
            if isinstance(event, Done):
                metrics.reasoning_tokens.inc(event.usage.reasoning_tokens)

    def stop(self, failure: ApiError) -> None:
        """Cancel what still runs and give its reader this failure."""
        if self._running:
            self._failure = self._failure or failure
            self._cancel()
            self._wake()

    def _cancel(self) -> None:
        for handle in self._handles:
            handle.cancel()

    def close(self) -> None:
        """Cancel what still runs, and free the job's place. Safe to call again."""
        if not self._closed:
            self._closed = True
            left = sum(index < len(self._handles) for index in self._running)
            self._jobs.metrics.generations.labels("disconnected").inc(left)
            self._alarm.cancel()
            self.stop(ApiError(499, "The client closed the request."))
            self._jobs.release(self)


class Jobs:
    """All generations of one server."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self._jobs: set[Job] = set()
        self._draining = False
        # A thread for each: schemas are tried one after the other, and plain requests do not wait for them.
        self.starters = ThreadPoolExecutor(settings.max_active, "start")
        metrics.gauge("gptoss_active_generations", "Generations running or waiting.", lambda: self.active)

    @property
    def active(self) -> int:
        """Generations running or waiting."""
        return sum(job.count for job in self._jobs)

    async def start(self, *starts: Start) -> Job:
        """Start the generations of one request, or none of them.

        Raises BusyError when there is no room, or whatever the engine raises at once.
        """
        if self._draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        if self.active + len(starts) > self.settings.max_active:
            self.metrics.rejected.inc(len(starts))
            raise BusyError(
                f"{self.active} generations are running or waiting, the most this server takes: try again",
                retry_after=2,
            )
        job = Job(self, len(starts))
        self._jobs.add(job)
        try:
            await job.begin(starts)
        except BaseException:
            job.close()
            raise
        return job

    def release(self, job: Job) -> None:
        """Forget a closed job."""
        self._jobs.discard(job)

    def drain(self) -> None:
        """Take no new generations."""
        self._draining = True

    def stop_all(self) -> None:
        """End every generation: its client is told that the server stops."""
        self.drain()
        for job in list(self._jobs):
            job.stop(ApiError(503, "The server is shutting down.", code="shutting_down"))
