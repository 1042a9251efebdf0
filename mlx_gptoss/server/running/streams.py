"""Reading a job to its end for an answer that is not streamed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from fastapi import Request

from mlx_gptoss.server.http.errors import ApiError, as_api_error
from mlx_gptoss.server.running.jobs import Job
from mlx_gptoss.server.running.sse import on_disconnect

logger = logging.getLogger("mlx_gptoss.server")


async def collect(job: Job, request: Request, take: Callable[[int, Any], object]) -> None:
    """Give every event of a job to `take`. A client that goes away cancels it."""
    watcher = asyncio.create_task(on_disconnect(request.receive, job.close))
    try:
        async for batch in job.batches():
            for index, event in batch:
                take(index, event)
    finally:
        watcher.cancel()
        job.close()


def log_failure(error: BaseException) -> ApiError:
    """A failure in the middle of a stream, for the client; the unexpected goes to the log."""
    api = as_api_error(error)
    if api.code == "internal_error":
        logger.error("a stream failed: %s", type(error).__name__, exc_info=error)
    return api
