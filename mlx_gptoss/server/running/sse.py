"""Server-sent events: how a stream is framed, written, and ended when its client goes away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

if TYPE_CHECKING:
    from mlx_gptoss.server.running.jobs import Job

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"
LAST_WORDS = 5.0  # seconds after a job's deadline in which its failure may still be written

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


# Line ends to Unicode, at which some clients cut an event; JSON lets them stand as they are.
_LINE_ENDS = {"\x85": r"\u0085", "\u2028": r"\u2028", "\u2029": r"\u2029"}


def dumps(value: Any) -> str:
    """Compact JSON on one line. Lone surrogates, which no encoder takes, cannot occur in what a tokenizer
    decodes.
    """
    text = _encode(value)
    for character, escape in _LINE_ENDS.items():
        text = text.replace(character, escape)
    return text


def data(value: Any) -> bytes:
    """An unnamed event, as OpenAI's chat completions stream them."""
    return f"data: {dumps(value)}\n\n".encode()


def event(value: dict[str, Any]) -> bytes:
    """An event named by its own `type`, as the Responses API and Anthropic stream them."""
    return f"event: {value['type']}\ndata: {dumps(value)}\n\n".encode()


class EventStream(StreamingResponse):
    """Writes the chunks that a job gives rise to as they come, and closes the job whatever ends the stream.

    StreamingResponse alone would leave a generator that was never started unclosed when the client goes away
    early; here the generations behind the stream are always released.
    """

    def __init__(self, chunks: AsyncIterator[bytes], job: Job, media_type: str) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type=media_type)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(on_disconnect(receive, self._job.close))
        # The job ends itself on time; a client that reads nothing more would still hold up `send`.
        left = self._job.deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0) + LAST_WORDS):
                await self.stream_response(send)
        except TimeoutError:
            return  # without a last chunk: the server closes the connection
        finally:
            watcher.cancel()
            self._job.close()


async def on_disconnect(receive: Receive, action: Callable[[], None]) -> None:
    """Wait until the client goes away, then act. The body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
    action()
