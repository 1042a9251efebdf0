"""Jobs: generations as the event loop sees them.

A Job is the generations of one request: their events, counted as they pass, and their end on time. Jobs
bounds how many generations run or wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlx_gptoss.engine.handoff import Handoff, Start
from mlx_gptoss.engine.request import TokensDone
from mlx_gptoss.errors import BusyError
from mlx_gptoss.harmony import Done
from mlx_gptoss.sampling import PromptProgress
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.running.metrics import Metrics
from mlx_gptoss.server.settings import ServerSettings

Batch = list[tuple[int, Any]]  # events, each with the index of its generation
MAX_BATCH = 256  # events written at a time, so that no job keeps the loop from the others


class Job:
    """The generations of one request. `batches()` yields what they produced since the last look, and ends."""

    def __init__(self, jobs: Jobs, count: int) -> None:
        self.count = count
        self._jobs = jobs
        self._handoff = Handoff()
        self._running = set(range(count))
        self._silent = set(range(count))  # those that have produced nothing yet
        self._failure: BaseException | None = None
        self._closed = False
        self._started = time.monotonic()
        limit = jobs.settings.request_timeout
        too_long = ApiError(504, f"The answer took longer than {limit:g} s.", code="timeout")
        self.deadline = self._started + limit
        self._alarm = asyncio.get_running_loop().call_later(limit, self.stop, too_long)

    async def begin(self, starts: Sequence[Start]) -> None:
        """Start the generations, off the event loop."""
        for index, start in enumerate(starts):
            await self._handoff.begin(index, start, self._jobs.starters)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the (first) prompt."""
        return self._handoff.handles[0].prompt_tokens

    async def batches(self) -> AsyncIterator[Batch]:
        """Events in order, several at a time; an empty list when nothing came for a heartbeat.

        Raises what the engine delivered as an exception, or ApiError when time ran out or the server stops.
        """
        while self._running or self._failure is not None:
            if self._failure is not None:
                raise self._failure
            if batch := self._passed(self._handoff.take(MAX_BATCH)):
                yield batch
            elif self._failure is None:
                there = await self._handoff.wait(self._jobs.settings.heartbeat)
                if not there and self._failure is None:
                    yield []

    def _passed(self, events: Iterable[tuple[int, Any]]) -> Batch:
        """The events up to an exception, which becomes the failure."""
        batch: Batch = []
        for index, event in events:
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
            self._handoff.cancel()
            self._handoff.wake()

    def close(self) -> None:
        """Cancel what still runs, and free the job's place. Safe to call again."""
        if not self._closed:
            self._closed = True
            left = sum(index in self._handoff.handles for index in self._running)
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
