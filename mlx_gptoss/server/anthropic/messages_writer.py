"""From harmony events to the content blocks and stream events of Anthropic's API, and its errors."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from typing import Any

from mlx_gptoss.harmony import events
from mlx_gptoss.server.http.errors import ApiError, openai_error
from mlx_gptoss.server.running import sse
from mlx_gptoss.server.running.answer import Json, Writer, arguments_object

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "cancelled": "end_turn"}

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: ApiError) -> Json:
    """The body of an error in Anthropic's shape, with its types; OpenAI's other fields are in it, too."""
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    body = openai_error(error, ERROR_TYPES.get(error.status, other))
    if error.details is not None:
        body["error"]["details"] = error.details
    return {"type": "error", **body}


class MessageWriter(Writer):
    """One message: `message` is the response, which grows with every harmony event, `answer` its text."""

    heartbeat = sse.event({"type": "ping"})

    def __init__(self, model: str, prompt_tokens: int, *, show_thinking: bool) -> None:
        self.message: Json = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # How much of the prompt was cached is only known at the end.
            "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
        }
        self.answer = ""
        self._show_thinking = show_thinking
        self._kind = ""
        self._pieces: list[str] = []

    def body(self) -> Json:
        """The message."""
        return self.message

    def opening(self) -> Iterator[Json]:
        """The message has begun."""
        yield {"type": "message_start", "message": self.message}

    def failure(self, error: ApiError) -> Iterator[Json]:
        """The error as an event."""
        yield anthropic_error(error)

    def take(self, index: int, event: Any) -> Iterator[Json]:
        """The stream events that a harmony event gives rise to."""
        match event:
            case events.ReasoningDelta(text) if self._show_thinking:
                yield from self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta(text, type="thinking_delta", thinking=text)
            case events.TextDelta(text) | events.PreambleDelta(text):
                yield from self._open(type(event).__name__, {"type": "text", "text": ""})
                yield self._delta(text, type="text_delta", text=text)
            case events.ToolCallDelta(_, call_id, name, ""):
                yield from self._close()
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                yield from self._open("tool_use", block)
            case events.ToolCallDelta(arguments=more):
                yield self._delta(more, type="input_json_delta", partial_json=more)
            case events.ToolCall():
                yield from self._close()
            case events.Done():
                yield from self._close()
                yield from self._finish(event)

    def _open(self, kind: str, block: Json) -> Iterator[Json]:
        if self._kind == kind:
            return
        yield from self._close()
        self._kind, self._pieces = kind, []
        self.message["content"].append(block)
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, piece: str, **delta: str) -> Json:
        self._pieces.append(piece)
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.message["content"]) - 1

    def _close(self) -> Iterator[Json]:
        """End the open block, if there is one."""
        if not self._kind:
            return
        block, text = self.message["content"][-1], "".join(self._pieces)
        if self._kind == "thinking":
            # Nothing is verified by it here; clients expect one, and send it back.
            block |= {"thinking": text, "signature": hashlib.sha256(text.encode()).hexdigest()}
            delta = {"type": "signature_delta", "signature": block["signature"]}
            yield {"type": "content_block_delta", "index": self._index, "delta": delta}
        elif self._kind == "tool_use":
            block["input"] = arguments_object(text)
        else:
            block["text"] = text
            self.answer += text
        self._kind = ""
        yield {"type": "content_block_stop", "index": self._index}

    def _finish(self, done: events.Done) -> Iterator[Json]:
        usage, stopped = done.usage, done.reply.stop_text
        reason = STOP_REASONS[done.finish_reason] if stopped is None else "stop_sequence"
        delta = {"stop_reason": reason, "stop_sequence": stopped}
        counts = {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }
        self.message |= {**delta, "usage": counts}
        yield {"type": "message_delta", "delta": delta, "usage": counts}
        yield {"type": "message_stop"}
