"""A generation in the chat format: sampled tokens in, typed events out, a Reply at the end."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_gptoss.chat.stops import UntilStop
from mlx_gptoss.engine.request import Cancellable, Sink, TokenOutput, TokensDone
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.harmony import (
    Done,
    Event,
    MessageDone,
    Reply,
    ReplyBuilder,
    StreamParser,
    TextDelta,
    Usage,
)
from mlx_gptoss.harmony.events import FinishReason
from mlx_gptoss.sampling import PromptProgress, TokenLogprobs
from mlx_gptoss.tokenizer import Tokenizer


class Generation:
    """One assistant turn: an iterator of harmony events whose last is Done.

    With a `sink` the events go there instead, on the engine's thread; the last call is Done or a
    GptOssError. `reply` is there after the end.

    parse: reads the text of a whole reply. on_done: gets the reply before anybody hears of its end. What one
    of them raises ends the generation with a GptOssError instead.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        want_logprobs: bool = False,
        parse: Callable[[str], Any] | None = None,
        sink: Sink | None = None,
        on_done: Callable[[Reply], None] | None = None,
    ) -> None:
        self.reply: Reply | None = None
        self._tokenizer = tokenizer
        self._parser = StreamParser(tokenizer)
        self._builder = ReplyBuilder(want_logprobs)
        self._until = UntilStop(stop) if stop else None
        self._shown: list[str] = []
        self._parse = parse
        self._on_done = on_done
        self._logprobs: list[tuple[int, TokenLogprobs]] | None = [] if want_logprobs else None
        self._reasoning_tokens = 0
        self._items: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._send: Sink = sink or self._items.put
        self._stream: Cancellable | None = None
        self._cancelled = False
        self._over = False

    def attach(self, stream: Cancellable) -> None:
        """Tell it which token stream to cancel."""
        self._stream = stream
        if self._cancelled:
            stream.cancel()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the rendered prompt; 0 before the generation is queued."""
        return 0 if self._stream is None else self._stream.prompt_tokens

    def cancel(self) -> None:
        """End the generation within one step. The Done that follows says "cancelled"."""
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Event:
        if self._over:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, Exception):
            self._over = True
            raise item
        self._over = isinstance(item, Done)
        return item

    # --- on the engine's thread

    def take(self, item: PromptProgress | TokenOutput | TokensDone | Exception) -> None:
        """The sink of the token stream beneath."""
        if isinstance(item, TokenOutput):
            if self._until is None or not self._until.over:
                self._push(item)
        elif isinstance(item, TokensDone):
            self._finish(item)
        else:
            self._send(item)

    def _push(self, item: TokenOutput) -> None:
        if self._logprobs is not None and item.logprobs is not None:
            # Only what lies between the markup of a message can be text.
            if self._tokenizer.is_special(item.token_id):
                self._logprobs.clear()
            else:
                self._logprobs.append((item.token_id, item.logprobs))
        self._deliver(self._parser.push(item.token_id))
        if self._until is not None and self._until.over and self._stream is not None:
            self._stream.cancel()

    def _deliver(self, events: list[Event]) -> None:
        shown: list[Event] = []
        for event in events:
            if isinstance(event, TextDelta):
                changed = self._text(event)
                shown += [changed] if changed.text or changed.logprobs else []
            elif isinstance(event, MessageDone):
                message = event.message
                if message.channel == "analysis" and message.recipient is None:
                    self._reasoning_tokens += len(message.token_ids or ())
                if self._until is not None and message.channel == "final":
                    shown += self._end_text()
                    if self._until.over:
                        # The sampled tokens run on into the stop text: what is kept is what was shown.
                        event = MessageDone(replace(message, content="".join(self._shown), token_ids=None))
                shown.append(event)
            else:
                shown.append(event)
        self._builder.add(shown)
        for event in shown:
            self._send(event)

    def _text(self, event: TextDelta) -> TextDelta:
        logprobs = None
        if self._logprobs is not None:
            logprobs, self._logprobs = tuple(self._logprobs), []
        text = event.text if self._until is None else self._until.push(event.text)
        self._shown.append(text)
        return TextDelta(text, logprobs)

    def _end_text(self) -> list[Event]:
        assert self._until is not None
        rest = self._until.finish()
        self._shown.append(rest)
        return [TextDelta(rest)] if rest else []

    def _finish(self, done: TokensDone) -> None:
        self._deliver(self._parser.finish())
        stop_text = None if self._until is None else self._until.found
        reason: FinishReason = "stop" if stop_text else done.finish_reason
        if reason == "stop" and self._builder.tool_calls:
            reason = "tool_calls"
        usage = Usage(done.prompt_tokens, done.cached_tokens, done.completion_tokens, self._reasoning_tokens)
        parsed = None
        if self._parse is not None and reason == "stop":
            try:
                parsed = self._parse("".join(self._shown))
            except BaseException as error:  # a validator of the caller's may raise anything
                self._fail("the reply could not be read", error)
                return
        reply = self._builder.build(reason, usage, parsed, stop_text)
        if self._on_done is not None:
            try:
                self._on_done(reply)
            except BaseException as error:
                self._fail("what was to follow the reply failed", error)
                return
        self.reply = reply
        self._send(Done(reason, usage, reply))

    def _fail(self, what: str, error: BaseException) -> None:
        """End with an error: whoever waits must hear of it. What is not a GptOssError becomes its cause."""
        if not isinstance(error, GptOssError):
            failure = GptOssError(f"{what} ({type(error).__name__}: {error})")
            failure.__cause__ = error
            error = failure
        self._send(error)
