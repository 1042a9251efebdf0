"""Many prompts at a time: as many under way as keep the batch full, and their replies as they end."""

from __future__ import annotations

import queue
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from typing import Any

from mlx_gptoss.chat.generation import Generation
from mlx_gptoss.chat.messages import Prompt
from mlx_gptoss.chat.turn import ends_only
from mlx_gptoss.engine.handoff import Handoff
from mlx_gptoss.engine.request import Cancellable, Sink
from mlx_gptoss.errors import BatchError, BusyError, GptOssError, RequestError
from mlx_gptoss.harmony import Done, Reply

# Starts the answer to a prompt.
Begin = Callable[[Prompt, Sink], Generation]


class _Prompts:
    """Numbers the prompts, and notes which of them failed."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
            raise RequestError(
                f"prompts is a {type(prompts).__name__}: expected a list of prompts", "prompts"
            )
        self._following = enumerate(prompts)
        self._back: tuple[int, Prompt] | None = None
        self._count = 0
        self._errors: dict[int, GptOssError] = {}

    def next(self) -> tuple[int, Prompt] | None:
        """The next prompt with its index, None after the last."""
        following, self._back = self._back or next(self._following, None), None
        if following is not None:
            self._count = following[0] + 1
        return following

    def refused(self, index: int, prompt: Prompt, error: GptOssError, running: bool) -> bool:
        """Note that a prompt could not be started; whether to wait for one that runs and try it again.

        Raises the error when it is not the prompt's own.
        """
        if isinstance(error, RequestError):
            self._errors[index] = error
            return False
        if not isinstance(error, BusyError) or not running:
            raise error
        self._back = index, prompt
        return True

    def ended(self, index: int, end: Done | Exception) -> Iterator[tuple[int, Reply]]:
        """The reply, if there is one."""
        if isinstance(end, Done):
            yield index, end.reply
        elif isinstance(end, GptOssError):
            self._errors[index] = end
        else:
            raise end

    def close(self) -> None:
        """After the last: raise BatchError if any failed."""
        if self._errors:
            raise BatchError(self._errors, self._count)


def replies_of(begin: Begin, prompts: Iterable[Prompt], limit: int) -> Iterator[tuple[int, Reply]]:
    """(index, reply) of every prompt in the order of their ends; leaving the iteration cancels what runs.

    limit: prompts under way at a time. After the last a BatchError tells of those that failed; what is no
    fault of a prompt (a closed engine) ends all of them.
    """
    asked = _Prompts(prompts)
    ends: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    running: dict[int, Cancellable] = {}

    def sink_of(index: int) -> Sink:
        return ends_only(lambda end: ends.put((index, end)))

    try:
        while True:
            while len(running) < limit and (following := asked.next()) is not None:
                index, prompt = following
                try:
                    running[index] = begin(prompt, sink_of(index))
                except GptOssError as error:
                    if asked.refused(index, prompt, error, bool(running)):
                        break
            if not running:
                break
            index, end = ends.get()
            del running[index]
            yield from asked.ended(index, end)
        asked.close()
    finally:
        for handle in running.values():
            handle.cancel()


async def areplies_of(
    begin: Begin, prompts: Iterable[Prompt], limit: int
) -> AsyncGenerator[tuple[int, Reply], None]:
    """Like `replies_of`, on the event loop; cancelling the task that waits cancels what runs."""
    asked = _Prompts(prompts)
    handoff = Handoff()
    running = handoff.handles
    try:
        while True:
            while len(running) < limit and (following := asked.next()) is not None:
                index, prompt = following
                try:
                    await handoff.begin(index, lambda sink, p=prompt: begin(p, ends_only(sink)))  # type: ignore[misc]
                except GptOssError as error:
                    if asked.refused(index, prompt, error, bool(running)):
                        break
            if not running:
                break
            await handoff.wait()
            for index, end in handoff.take():
                del running[index]
                for result in asked.ended(index, end):
                    yield result
        asked.close()
    finally:
        handoff.cancel()
