"""From harmony events to the output items and stream events of the Responses API.

The same writer serves both ways of answering: a stream sends the events as they come, and an answer in one
piece takes the response body when they have ended. So both always tell the same.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mlx_gptoss.harmony import (
    Done,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
)
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.openai.chat_routes import AnswerScores
from mlx_gptoss.server.openai.responses_request import seal

if TYPE_CHECKING:
    from mlx_gptoss.tokenizer import Tokenizer

Event = dict[str, Any]


class ResponseWriter:
    """Builds one response. `body` is the response object; it grows with every event taken.

    Events refer to the body and its items, so each has to be encoded before the next is taken.
    """

    def __init__(
        self,
        body: dict[str, Any],
        *,
        tokenizer: Tokenizer | None = None,
        structured: bool = False,
        sealed: bool = False,
    ) -> None:
        """tokenizer: to spell log-probabilities, when asked for. structured: a format was asked for, so a
        preamble counts as reasoning. sealed: reasoning items carry `encrypted_content`."""
        self.body = body
        self.answer = ""
        self.done: Done | None = None
        self._scores = AnswerScores(tokenizer) if tokenizer is not None else None
        self._structured = structured
        self._sealed = sealed
        self._sequence = 0
        self._item: dict[str, Any] | None = None
        self._kind = ""
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def opening(self) -> Iterator[Event]:
        """The first events, before anything was generated."""
        yield self._event("response.created", response=self.body)
        yield self._event("response.in_progress", response=self.body)

    def take(self, event: Any) -> Iterator[Event]:
        """The stream events that a harmony event gives rise to."""
        match event:
            case ReasoningDelta():
                yield from self._reasoning(event.text)
            case PreambleDelta() if self._structured:
                yield from self._reasoning(event.text)
            case PreambleDelta():
                yield from self._text("commentary", event.text, [])
            case TextDelta():
                entries = self._scores.take(event) if self._scores is not None else []
                if event.text or entries:
                    yield from self._text("final_answer", event.text, entries)
            case ToolCallDelta(arguments=""):
                yield from self._close()
                yield from self._open_call(event)
            case ToolCallDelta():
                self._pieces.append(event.arguments)
                yield self._part_event(
                    "response.function_call_arguments.delta", in_part=False, delta=event.arguments
                )
            case MessageDone(ended=False):
                yield from self._close("incomplete")
            case ToolCall() | MessageDone():
                yield from self._close()
            case Done():
                yield from self._finish(event)

    def fail(self, error: ApiError) -> Iterator[Event]:
        """The end of a response that cannot be finished."""
        yield from self._close("incomplete")
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.body |= {"status": "failed", "error": {"code": code, "message": error.message}}
        yield self._event("error", code=error.code, message=error.message, param=error.param)
        yield self._event("response.failed", response=self.body)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _part_event(self, kind: str, *, in_part: bool = True, **fields: Any) -> Event:
        assert self._item is not None
        place: dict[str, Any] = {"item_id": self._item["id"], "output_index": len(self.body["output"]) - 1}
        if in_part:
            place["content_index"] = 0
        return self._event(kind, **place, **fields)

    def _item_event(self, kind: str) -> Event:
        return self._event(kind, output_index=len(self.body["output"]) - 1, item=self._item)

    def _open(self, kind: str, item: dict[str, Any]) -> Iterator[Event]:
        self._kind, self._item, self._pieces, self._logprobs = kind, item, [], []
        self.body["output"].append(item)
        yield self._item_event("response.output_item.added")

    def _open_call(self, event: ToolCallDelta) -> Iterator[Event]:
        item = {
            "id": _new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": event.call_id,
            "name": event.name,
            "arguments": "",
        }
        yield from self._open("call", item)

    def _reasoning(self, text: str) -> Iterator[Event]:
        if self._kind != "reasoning":
            yield from self._close()
            item = {
                "id": _new_id("rs"),
                "type": "reasoning",
                "summary": [],
                "content": [],
                "status": "in_progress",
            }
            yield from self._open("reasoning", item)
            yield self._part_event("response.content_part.added", part=_reasoning_part(""))
        self._pieces.append(text)
        yield self._part_event("response.reasoning_text.delta", delta=text)

    def _text(self, phase: str, text: str, entries: list[dict[str, Any]]) -> Iterator[Event]:
        if self._kind != phase:
            yield from self._close()
            item = {
                "id": _new_id("msg"),
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "phase": phase,
                "content": [],
            }
            yield from self._open(phase, item)
            yield self._part_event("response.content_part.added", part=_text_part("", []))
        self._logprobs += entries
        self._pieces.append(text)
        yield self._part_event("response.output_text.delta", delta=text, logprobs=entries)

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """End the open item, if there is one."""
        if self._item is None:
            return
        text = "".join(self._pieces)
        self._item["status"] = status
        if self._kind == "call":
            self._item["arguments"] = text
            yield self._part_event(
                "response.function_call_arguments.done",
                in_part=False,
                name=self._item["name"],
                arguments=text,
            )
        elif self._kind == "reasoning":
            self._item["content"] = [_reasoning_part(text)]
            if self._sealed:
                self._item["encrypted_content"] = seal(text)
            yield self._part_event("response.reasoning_text.done", text=text)
            yield self._part_event("response.content_part.done", part=_reasoning_part(text))
        else:
            if self._kind == "final_answer":
                self.answer += text
            self._item["content"] = [_text_part(text, self._logprobs)]
            yield self._part_event("response.output_text.done", text=text, logprobs=self._logprobs)
            yield self._part_event("response.content_part.done", part=_text_part(text, self._logprobs))
        yield self._item_event("response.output_item.done")
        self._item, self._kind = None, ""

    def _finish(self, done: Done) -> Iterator[Event]:
        self.done = done
        incomplete = done.finish_reason in ("length", "cancelled")
        yield from self._close("incomplete" if incomplete else "completed")
        usage = done.usage
        self.body["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if incomplete:
            self.body |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
            yield self._event("response.incomplete", response=self.body)
        else:
            self.body |= {"status": "completed", "completed_at": int(time.time())}
            yield self._event("response.completed", response=self.body)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _reasoning_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
