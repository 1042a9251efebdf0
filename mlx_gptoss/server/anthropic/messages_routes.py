"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, streamed and not."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.grammar import ResponseFormat
from mlx_gptoss.harmony import (
    Conversation,
    Done,
    PreambleDelta,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    render,
)
from mlx_gptoss.server.anthropic.messages_request import (
    CountTokensRequest,
    MessagesRequest,
    conversation_of,
    shows_thinking,
)
from mlx_gptoss.server.http.errors import error_body
from mlx_gptoss.server.http.openapi import ERRORS
from mlx_gptoss.server.memory.turns import digest
from mlx_gptoss.server.openai.chat_request import naming
from mlx_gptoss.server.running import sse
from mlx_gptoss.server.running.jobs import Job
from mlx_gptoss.server.running.streams import collect, log_failure
from mlx_gptoss.server.state import ServerState

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "cancelled": "end_turn"}
PATH = "/v1/messages"


class MessageWriter:
    """Builds one message: `body` grows with every harmony event taken, and each becomes stream events."""

    def __init__(self, model: str, show_thinking: bool) -> None:
        self.body: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        self.answer = ""
        self.done: Done | None = None
        self._show_thinking = show_thinking
        self._kind = ""
        self._pieces: list[str] = []

    def opening(self, prompt_tokens: int) -> dict[str, Any]:
        """The first event. How much of the prompt was cached is only known at the end."""
        self.body["usage"]["input_tokens"] = prompt_tokens
        return {"type": "message_start", "message": self.body}

    def take(self, event: Any) -> Iterator[dict[str, Any]]:
        """The stream events that a harmony event gives rise to."""
        match event:
            case ReasoningDelta() if self._show_thinking:
                yield from self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": event.text}, event.text)
            case TextDelta() | PreambleDelta():
                kind = "text" if isinstance(event, TextDelta) else "preamble"
                yield from self._open(kind, {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": event.text}, event.text)
            case ToolCallDelta(arguments=""):
                yield from self._close()
                block = {"type": "tool_use", "id": event.call_id, "name": event.name, "input": {}}
                yield from self._open("tool_use", block)
            case ToolCallDelta():
                yield self._delta(
                    {"type": "input_json_delta", "partial_json": event.arguments}, event.arguments
                )
            case ToolCall():
                yield from self._close()
            case Done():
                yield from self._finish(event)

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._kind == kind:
            return
        yield from self._close()
        self._kind, self._pieces = kind, []
        self.body["content"].append(block)
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any], text: str) -> dict[str, Any]:
        self._pieces.append(text)
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.body["content"]) - 1

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the open block, if there is one."""
        if not self._kind:
            return
        block, text = self.body["content"][-1], "".join(self._pieces)
        if self._kind == "thinking":
            # Nothing is verified by it here; clients expect one, and send it back.
            block |= {"thinking": text, "signature": hashlib.sha256(text.encode()).hexdigest()}
            delta = {"type": "signature_delta", "signature": block["signature"]}
            yield {"type": "content_block_delta", "index": self._index, "delta": delta}
        elif self._kind == "tool_use":
            block["input"] = parse_arguments(text)
        else:
            block["text"] = text
            self.answer += text
        self._kind = ""
        yield {"type": "content_block_stop", "index": self._index}

    def _finish(self, done: Done) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self.done = done
        usage = done.usage
        self.body["stop_reason"] = STOP_REASONS[done.finish_reason]
        if done.reply.stop_text is not None:
            self.body["stop_reason"] = "stop_sequence"
            self.body["stop_sequence"] = done.reply.stop_text
        self.body["usage"] = {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }
        delta = {"stop_reason": self.body["stop_reason"], "stop_sequence": self.body["stop_sequence"]}
        yield {"type": "message_delta", "delta": delta, "usage": self.body["usage"]}
        yield {"type": "message_stop"}


def parse_arguments(text: str) -> dict[str, Any]:
    """A call's arguments as an object; what a cut-off generation left of them is kept as text."""
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        return {"unparsed": text}
    return value if isinstance(value, dict) else {"value": value}


def remember(state: ServerState, writer: MessageWriter, conversation: Conversation) -> None:
    """Keep the sampled tokens of a finished answer for when its text comes back as history."""
    if writer.done is not None and writer.done.finish_reason in ("stop", "tool_calls"):
        state.turns.remember(writer.done.reply.messages, writer.answer, digest(conversation))


def router(state: ServerState) -> APIRouter:
    """The routes, bound to a server."""
    routes = APIRouter(tags=["Anthropic"])

    @routes.post(PATH, responses=ERRORS, response_model=None)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation."""
        engine = state.ready()
        conversation, choice = conversation_of(body, state)
        budget = body.thinking.budget_tokens if body.thinking else None
        params = body.params()
        with naming(body.fields(conversation.tools)):
            job = await state.jobs.start(
                lambda sink: engine.start(
                    conversation,
                    TurnOptions(
                        params,
                        ResponseFormat.of(schema=conversation.response_schema),
                        choice,
                        strict_tools=False,
                        reasoning_budget=budget,
                    ),
                    sink=sink,
                )
            )
        writer = MessageWriter(state.model_name, shows_thinking(body))
        if body.stream:
            return sse.EventStream(_stream(writer, conversation, job, state), job)
        await collect(job, request, lambda _, event: list(writer.take(event)))
        remember(state, writer, conversation)
        return JSONResponse(writer.body)

    @routes.post(PATH + "/count_tokens", responses=ERRORS)
    async def count_tokens(body: CountTokensRequest) -> dict[str, int]:
        """How many tokens a conversation has when it is rendered."""
        tokenizer = state.ready().tokenizer
        conversation, _ = conversation_of(body, state)
        return {"input_tokens": len(await asyncio.to_thread(render, conversation, tokenizer))}

    return routes


async def _stream(
    writer: MessageWriter, conversation: Conversation, job: Job, state: ServerState
) -> AsyncIterator[bytes]:
    yield sse.event(writer.opening(job.prompt_tokens))
    try:
        async for batch in job.batches():
            if not batch:
                yield sse.event({"type": "ping"})
                continue
            out = [sse.event(event) for _, source in batch for event in writer.take(source)]
            remember(state, writer, conversation)
            if out:
                yield b"".join(out)
    except Exception as error:
        yield sse.event(error_body(log_failure(error), PATH))
