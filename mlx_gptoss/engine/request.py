"""One request as the scheduler sees it, and the handle its caller holds.

A Request is made on the caller's thread, checked there, and from then on belongs to the engine's thread.
"""

from __future__ import annotations

import logging
import queue
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mlx_gptoss.errors import GptOssError
from mlx_gptoss.sampling import PromptProgress, SamplingParams, TokenConstraint, TokenLogprobs

logger = logging.getLogger("mlx_gptoss.engine")

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenOutput:
    """One generated token; the token that ends a generation is delivered too."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class TokensDone:
    """The end of a token stream. Counts are of tokens; `cached_tokens` of the prompt were not computed."""

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


Sink = Callable[[Any], None]


class Cancellable(Protocol):
    """What those who only wait for a generation need of it."""

    @property
    def prompt_tokens(self) -> int: ...

    def cancel(self) -> None: ...


class Request:
    """What to generate and where to deliver it. `sink` and `progress` are called on the engine's thread.

    The sink gets TokenOutputs and at the end a TokensDone or an exception, exactly one of them; before the
    first token `progress` is told how much of the prompt is read.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        constraint: TokenConstraint | None = None,
        stop_text: Callable[[int], bool] | None = None,
        background: bool = False,
        progress: Callable[[PromptProgress], None] | None = None,
        adapter: int = 0,
    ) -> None:
        self.prompt = list(tokens)
        self.params = params
        self.max_tokens = max_tokens  # 0: only fill the prefix store
        self.stop_ids = stop_ids
        self.constraint = constraint
        self.stop_text = stop_text  # told each token; True when a stop text is complete
        self.background = background  # runs only while nothing else does
        self.progress = progress
        self.adapter = adapter  # the number of the adapter to run with, 0 for none
        self.cancelled = False  # set by any thread, read by the engine's
        self.ended = False
        self.cached_tokens = 0
        self.computed_tokens = 0
        self.completion_tokens = 0
        self.submitted = time.perf_counter()
        self.first_token: float | None = None
        self.finished: float | None = None
        self.finish_reason: FinishReason | None = None
        self._told = -1
        self._sink = sink

    def tell_progress(self, read_tokens: int) -> None:
        """Tell how much of the prompt has been read, if it was asked for and is more than was told."""
        if self.progress is not None and self.first_token is None and read_tokens > self._told:
            self._told = read_tokens
            self._send(PromptProgress(read_tokens, self.cached_tokens, len(self.prompt)), self.progress)

    def emit(self, output: TokenOutput) -> None:
        """Deliver a token; a sink that raises cancels its own request and harms no other."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.completion_tokens += 1
        self._send(output)

    def end(self, reason: FinishReason) -> None:
        """Deliver the end, once."""
        if not self.ended:
            self.ended = True
            self.finish_reason = reason
            self.finished = time.perf_counter()
            self._send(TokensDone(reason, len(self.prompt), self.cached_tokens, self.completion_tokens))

    def fail(self, error: Exception) -> None:
        """Deliver an error as the end, once. What is not a GptOssError becomes one, with its cause."""
        if self.ended:
            return
        self.ended = True
        self.finished = time.perf_counter()
        if not isinstance(error, GptOssError):
            logger.error("a request failed", exc_info=error)
            wrapped = GptOssError(f"the request failed inside the engine ({type(error).__name__}: {error})")
            wrapped.__cause__ = error
            error = wrapped
        self._send(error)

    def _send(self, item: Any, to: Sink | None = None) -> None:
        try:
            (to or self._sink)(item)
        except BaseException:  # SystemExit or CancelledError of a caller must not end the engine's thread
            logger.warning("a request's sink raised; the request is cancelled", exc_info=True)
            self.cancelled = True


class TokenStream:
    """The tokens of a submitted request, as an iterator of TokenOutput.

    The iterator ends at the generation's end and raises the GptOssError that ended it instead. With a sink
    there is nothing to iterate (`items` is None); the counts and times are there either way. A stream to
    iterate that is forgotten before the end cancels the generation.
    """

    def __init__(
        self, request: Request, items: queue.SimpleQueue[Any] | None, wake: Callable[[], None]
    ) -> None:
        self._request = request
        self._items = items
        self._wake = wake
        self._over = False
        if items is not None:
            weakref.finalize(self, _abandon, request, wake).atexit = False

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenOutput:
        if self._over or self._items is None:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, TokenOutput):
            return item
        self._over = True
        if isinstance(item, Exception):
            raise item
        raise StopIteration

    def cancel(self) -> None:
        """End the generation within one step and free its memory. Safe at any time, from any thread."""
        self._request.cancelled = True
        self._wake()

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it runs, and after an error."""
        return self._request.finish_reason

    @property
    def prompt_tokens(self) -> int:
        return len(self._request.prompt)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that needed no computation."""
        return self._request.cached_tokens

    @property
    def computed_tokens(self) -> int:
        """Tokens the model was run on for this request: prompt, replay, output and rejected drafts."""
        return self._request.computed_tokens

    @property
    def completion_tokens(self) -> int:
        return self._request.completion_tokens

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from submission; None before the first token."""
        first = self._request.first_token
        return None if first is None else first - self._request.submitted

    @property
    def decode_seconds(self) -> float | None:
        """Seconds from the first token to the end; None before the end."""
        first, last = self._request.first_token, self._request.finished
        return None if first is None or last is None else last - first


def _abandon(request: Request, wake: Callable[[], None]) -> None:
    """Cancel a request whose tokens nobody can read any more."""
    if not request.ended:
        request.cancelled = True
        wake()
