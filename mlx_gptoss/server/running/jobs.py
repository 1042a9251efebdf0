"""Jobs: generations as the event loop sees them.

The engine calls a sink on its own thread; a Job carries those events over to the event loop, several at a
time when they come faster than they are written. Jobs bounds how many run or wait, and ends them on time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from mlx_gptoss.errors import BusyError
from mlx_gptoss.server.http.errors import ApiError, as_api_error
from mlx_gptoss.server.running.metrics import Metrics
from mlx_gptoss.server.settings import ServerSettings

logger = logging.getLogger("mlx_gptoss.server")
Sink = Callable[[Any], None]
MAX_BATCH = 256  # events written at a time, so that no job keeps the loop from the others


class Handle(Protocol):
    """What the engine returns for a started generation."""

    @property
    def prompt_tokens(self) -> int: ...

    def cancel(self) -> None: ...


class Job:
    """One generation. `batches()` yields what it produced since the last look, then ends.

    This is done for every token, so the reader waits on a bare future; one timer a job watches the clock.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._loop = asyncio.get_running_loop()
        self._events: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._waking = False
        self._quiet = False
        self._handle: Handle | None = None
        self._failure: ApiError | None = None
        self._error: BaseException | None = None
        self._closed = False
        self.finished = False
        self.started = self._heard = time.monotonic()
        self.deadline = self.started + jobs.settings.request_timeout
        self._clock = self._loop.call_later(self._until_next_look(), self._look_at_clock)

    def sink(self, event: Any) -> None:
        """Take an event; called on the engine's thread."""
        self._events.append(event)
        if not self._waking:
            self._waking = True
            try:
                self._loop.call_soon_threadsafe(self._notify)
            except RuntimeError:  # the loop was closed under us: nobody is left to read
                if self._handle is not None:
                    self._handle.cancel()

    def _notify(self) -> None:
        # The flag falls before the queue is read, so an event appended in between wakes the reader again.
        self._waking = False
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _until_next_look(self) -> float:
        now = time.monotonic()
        return max(0.0, min(self._heard + self._jobs.settings.heartbeat, self.deadline) - now)

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        if now >= self.deadline:
            limit = self._jobs.settings.request_timeout
            self.stop(ApiError(504, f"The answer took longer than {limit:g} s.", code="timeout"))
            return
        if now - self._heard >= self._jobs.settings.heartbeat:
            self._heard, self._quiet = now, True
            self._wake()
        self._clock = self._loop.call_later(self._until_next_look(), self._look_at_clock)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, known as soon as the job has begun."""
        return 0 if self._handle is None else self._handle.prompt_tokens

    async def begin(self, start: Callable[[Sink], Handle]) -> None:
        """Start the generation off the event loop: rendering a long conversation takes time."""
        self._handle = await asyncio.to_thread(start, self.sink)
        if self._closed:
            self._handle.cancel()

    async def batches(self) -> AsyncIterator[list[Any]]:
        """Lists of events, in order; an empty list when nothing came for a heartbeat.

        Raises what the engine delivered as an exception, or ApiError when time ran out or the server stops.
        """
        while not self.finished:
            if self._failure is not None:
                raise self._failure
            if not self._events:
                self._waiter = self._loop.create_future()
                await self._waiter
                if self._quiet and not self._events and self._failure is None:
                    self._quiet = False
                    yield []
                continue
            batch = self._take()
            if batch:
                self._heard, self._quiet = time.monotonic(), False
                self._jobs.observe(self, batch)
                yield batch
            if self._error is not None:
                raise self._error

    def _take(self) -> list[Any]:
        """The next events, up to the end or an exception."""
        batch: list[Any] = []
        while self._events and len(batch) < MAX_BATCH and not self.finished:
            event = self._events.popleft()
            if isinstance(event, BaseException):
                self.finished, self._error = True, event
                self._jobs.metrics.generations.labels("error").inc()
                break
            batch.append(event)
            self.finished = hasattr(event, "finish_reason")
        return batch

    def stop(self, failure: ApiError) -> None:
        """Cancel the generation and give its reader this failure."""
        self._failure = failure
        self._wake()
        self._cancel()

    def _cancel(self) -> None:
        if self._handle is not None and not self.finished:
            self._handle.cancel()

    def close(self) -> None:
        """Cancel what still runs, and free the job's place. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        if self._handle is not None and not self.finished:
            self._handle.cancel()
            self._jobs.metrics.generations.labels("disconnected").inc()
        self._failure = self._failure or ApiError(499, "The client closed the request.")
        self._clock.cancel()
        self._wake()
        self._jobs.release(self)


class Jobs:
    """All generations of one server."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self._active: set[Job] = set()
        self._seen_first: set[Job] = set()
        self._draining = False
        metrics.gauge(
            "gptoss_active_generations", "Generations running or waiting.", lambda: len(self._active)
        )

    async def start(self, *starts: Callable[[Sink], Handle]) -> list[Job]:
        """Start generations together, or none of them.

        Raises BusyError when there is no room, or whatever the engine raises at once.
        """
        if self._draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        if len(self._active) + len(starts) > self.settings.max_active:
            self.metrics.rejected.inc(len(starts))
            raise BusyError(
                f"{len(self._active)} generations are running or waiting, the most this server takes: "
                "try again",
                retry_after=2,
            )
        jobs = [Job(self) for _ in starts]
        self._active.update(jobs)
        try:
            for job, start in zip(jobs, starts, strict=True):
                await job.begin(start)
        except BaseException:
            for job in jobs:
                job.close()
            raise
        return jobs

    def observe(self, job: Job, batch: list[Any]) -> None:
        """Count what a batch tells."""
        if job not in self._seen_first:
            self._seen_first.add(job)
            self.metrics.first_event.observe(time.monotonic() - job.started)
        done = batch[-1]
        if hasattr(done, "finish_reason"):
            self.metrics.generations.labels(done.finish_reason).inc()
            self.metrics.duration.observe(time.monotonic() - job.started)
            usage = getattr(done, "usage", done)  # the end of raw tokens holds the counts itself
            self.metrics.prompt_tokens.inc(usage.prompt_tokens)
            self.metrics.cached_tokens.inc(usage.cached_tokens)
            self.metrics.completion_tokens.inc(usage.completion_tokens)
            self.metrics.reasoning_tokens.inc(getattr(usage, "reasoning_tokens", 0))

    def release(self, job: Job) -> None:
        """Forget a closed job."""
        self._active.discard(job)
        self._seen_first.discard(job)

    def drain(self) -> None:
        """Take no new generations."""
        self._draining = True

    def stop_all(self) -> None:
        """End every generation: its client is told that the server stops."""
        self.drain()
        for job in list(self._active):
            job.stop(ApiError(503, "The server is shutting down.", code="shutting_down"))


def log_failure(error: BaseException) -> ApiError:
    """A failure in the middle of a stream, for the client; the unexpected goes to the log."""
    api = as_api_error(error)
    if api.code == "internal_error":
        logger.error("a stream failed: %s", type(error).__name__, exc_info=error)
    return api
