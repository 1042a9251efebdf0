"""From what a job generates to its answer, streamed or in one piece: the skeleton that all APIs share."""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from mlx_gptoss.harmony import Done, Reply
from mlx_gptoss.server.http.errors import ApiError, as_api_error
from mlx_gptoss.server.running import sse
from mlx_gptoss.server.running.jobs import Job

logger = logging.getLogger("mlx_gptoss.server")

Json = dict[str, Any]
OnReply = Callable[[int, Reply], object]


class Writer(ABC):
    """An answer in the words of one API: the events of its stream as it comes, and its body when it is whole.

    One writer serves both ways of answering, so both tell the same. An event may refer to the body, which
    grows: it has to be encoded before the next is asked for. end: what closes the stream after all events.
    heartbeat: what is sent while nothing comes.
    on_reply: told the index of a generation and what it came to, before the client hears of its end.
    """

    media_type = "text/event-stream"
    heartbeat = sse.HEARTBEAT
    end = b""
    on_reply: OnReply = staticmethod(lambda index, reply: None)

    @staticmethod
    def frame(event: Json) -> bytes:
        """An event on the wire."""
        return sse.event(event)

    def opening(self) -> Iterable[Json]:
        """The events before anything was generated."""
        return ()

    @abstractmethod
    def take(self, index: int, event: Any) -> Iterable[Json]:
        """The events that an event of a generation gives rise to."""

    def closing(self) -> Iterable[Json]:
        """The events after the last generation has ended."""
        return ()

    @abstractmethod
    def failure(self, error: ApiError) -> Iterable[Json]:
        """The events that end a stream which cannot be finished."""

    @abstractmethod
    def body(self) -> Json:
        """The answer in one piece."""


async def answer(job: Job, writer: Writer, request: Request, stream: bool | None) -> Response:
    """Answer with what a job generates. A client that goes away cancels it."""
    if stream:
        return sse.EventStream(_chunks(job, writer), job, writer.media_type)
    watcher = asyncio.create_task(sse.on_disconnect(request.receive, job.close))
    deque(writer.opening(), maxlen=0)
    try:
        async for batch in job.batches():
            for index, event in batch:
                deque(_taken(writer, index, event), maxlen=0)
    finally:
        watcher.cancel()
        job.close()
    return JSONResponse(writer.body())


async def _chunks(job: Job, writer: Writer) -> AsyncIterator[bytes]:
    if opening := b"".join(map(writer.frame, writer.opening())):
        yield opening
    try:
        async for batch in job.batches():
            if not batch:
                yield writer.heartbeat
                continue
            out = [writer.frame(made) for index, event in batch for made in _taken(writer, index, event)]
            if out:
                yield b"".join(out)
        if closing := b"".join(map(writer.frame, writer.closing())) + writer.end:
            yield closing
    except Exception as error:
        api = as_api_error(error)
        if api.code == "internal_error":
            logger.error("a stream failed: %s", type(error).__name__, exc_info=error)
        yield b"".join(map(writer.frame, writer.failure(api)))


def arguments_object(text: str) -> Json:
    """A call's arguments as an object; what a cut-off generation left of them is kept as text."""
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        return {"unparsed": text}
    return value if isinstance(value, dict) else {"value": value}


def _taken(writer: Writer, index: int, event: Any) -> Iterable[Json]:
    yield from writer.take(index, event)
    if isinstance(event, Done):
        writer.on_reply(index, event.reply)
