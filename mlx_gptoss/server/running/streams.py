"""Reading several jobs as one stream, and reading jobs to their end for an answer that is not streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request

from mlx_gptoss.server.running.jobs import Job
from mlx_gptoss.server.running.sse import on_disconnect


async def merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, list[Any]]]:
    """(job's index, batch) as they come. A failure of one job ends them all."""
    if len(jobs) == 1:
        async for batch in jobs[0].batches():
            yield 0, batch
        return
    queue: asyncio.Queue[tuple[int, list[Any] | BaseException | None]] = asyncio.Queue(maxsize=len(jobs))

    async def pump(index: int, job: Job) -> None:
        try:
            async for batch in job.batches():
                await queue.put((index, batch))
        except Exception as error:  # raised below, on the reader's side
            await queue.put((index, error))
        else:
            await queue.put((index, None))

    tasks = [asyncio.create_task(pump(index, job)) for index, job in enumerate(jobs)]
    try:
        running = len(jobs)
        while running:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()


async def collect(jobs: Sequence[Job], request: Request, take: Callable[[int, Any], object]) -> None:
    """Give every event of the jobs to `take`. A client that goes away cancels them."""

    def close() -> None:
        for job in jobs:
            job.close()

    watcher = asyncio.create_task(on_disconnect(request.receive, close))
    try:
        async for index, batch in merged(jobs):
            for event in batch:
                take(index, event)
    finally:
        watcher.cancel()
        close()
