"""From harmony events to the output items and stream events of the Responses API."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Set
from typing import Any

from mlx_gptoss.harmony import events
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.openai.responses_hosted import HostedCall, Said, list_item
from mlx_gptoss.server.openai.responses_request import ResponsesRequest, seal
from mlx_gptoss.server.running.answer import Json, Writer
from mlx_gptoss.server.running.logprobs import AnswerScores
from mlx_gptoss.server.tools.toolbox import ServedTools
from mlx_gptoss.tokenizer import Tokenizer

SEALED_REASONING = "reasoning.encrypted_content"


# What a response repeats of its request as it was sent.
REPEATED = {
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "safety_identifier",
    "user",
}


def new_body(request: ResponsesRequest, model: str) -> Json:
    """The response object before anything was generated, with the request's settings repeated."""
    functions = {"description": None, "parameters": None, "strict": None}
    tools = [
        functions | tool if tool.get("type") == "function" else _told(tool) for tool in request.tools or ()
    ]
    text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
    sampling = request.model_dump(include={"temperature", "top_p"}, exclude_none=True)
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": {"effort": request.effort, "summary": request.summary},
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": tools,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0,
        "truncation": request.truncation or "disabled",
        "usage": None,
        **request.model_dump(include=REPEATED),
        **sampling,
    }


class ResponseWriter(Writer):
    """One response. structured: a format was asked for, so a preamble counts as reasoning. served: the
    server's own tools; approved: the ids of calls that were asked for before; listed: servers whose tools the
    client knows.

    `response` is the response object; it grows with every event taken. `answer` is its text.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        model: str,
        tokenizer: Tokenizer,
        *,
        structured: bool,
        scored: bool,
        served: ServedTools | None = None,
        approved: Set[str] = frozenset(),
        listed: Set[str] = frozenset(),
    ) -> None:
        self._served = served
        self._approved = approved
        self._listed = listed
        self._call: HostedCall | None = None
        self.response = new_body(request, model)
        self.answer = ""
        self._scores = AnswerScores(tokenizer) if scored else None
        self._structured = structured
        self._sealed = request.includes(SEALED_REASONING)
        self._summarises = request.summary is not None
        self._sequence = 0
        self._item: Json | None = None
        self._kind = ""
        self._pieces: list[str] = []
        self._logprobs: list[Json] = []

    def body(self) -> Json:
        """The response object."""
        return self.response

    def opening(self) -> Iterator[Json]:
        """The response has begun."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)
        yield from self._list_tools()

    def _list_tools(self) -> Iterator[Json]:
        for listing in self._served.listings if self._served is not None else ():
            if listing.label not in self._listed or listing.error is not None:
                yield from self._open("listing", item := list_item(listing))
                yield self._item_event("mcp_list_tools.in_progress")
                status = "failed" if item["error"] else "completed"
                yield self._item_event(f"mcp_list_tools.{status}")
                yield from self._close(status)

    def take(self, index: int, event: Any) -> Iterator[Json]:
        """The stream events that a harmony event gives rise to."""
        match event:
            case events.PreambleDelta(text) if not self._structured:
                yield from self._more("commentary", text, logprobs=[])
            case events.ReasoningDelta(text) | events.PreambleDelta(text):
                yield from self._more("reasoning", text)
            case events.TextDelta(text, scored):
                entries = self._scores.entries(text, scored) if self._scores is not None else []
                if text or entries:
                    yield from self._more("final_answer", text, logprobs=entries)
            case events.ToolCallDelta(_, call_id, name, "") if self._served and self._served.find(name):
                yield from self._begin_hosted(call_id, name)
            case events.ToolCallDelta(arguments=more) if self._call is not None:
                yield from self._say(self._call.more(more))
            case events.ToolCall() if self._call is not None:
                yield from self._run_hosted(event)
            case events.MessageDone(message) if self._call is not None and message.role != "tool":
                pass  # the result is to come
            case events.MessageDone(message) if self._call is not None:
                status, said = self._call.end(message)
                yield from self._say(said)
                yield from self._close(status)
            case events.ToolCallDelta(_, call_id, name, ""):
                call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                yield from self._open("call", {"id": _new_id("fc"), **call})
            case events.ToolCallDelta(arguments=more):
                self._pieces.append(more)
                yield self._item_event("function_call_arguments.delta", delta=more)
            case events.MessageDone(ended=False):
                yield from self._close("incomplete")
            case events.ToolCall() | events.MessageDone():
                yield from self._close()
            case events.Done():
                yield from self._finish(event)

    def _begin_hosted(self, call_id: str, name: str) -> Iterator[Json]:
        tool = self._served.find(name) if self._served is not None else None
        assert tool is not None
        approved = call_id in self._approved
        asks = not tool.unasked and not approved
        call = HostedCall(tool, call_id, name, asks=asks, approved=approved)
        if not call.waits:
            yield from self._open("hosted", call.item)
            yield from self._say(call.begin())
        self._call = call

    def _run_hosted(self, event: events.ToolCall) -> Iterator[Json]:
        call = self._call
        assert call is not None
        call.complete(event)
        if call.waits:
            yield from self._open("hosted", call.item)
            yield from self._say(call.begin())
            self._call = call
        yield from self._say(call.run())
        if call.asks:
            yield from self._close()

    def _say(self, said: Iterator[Said]) -> Iterator[Json]:
        """Events about the open item."""
        for kind, fields in said:
            yield self._item_event(kind, **fields)

    def failure(self, error: ApiError) -> Iterator[Json]:
        """The error, and the response as far as it came."""
        yield from self._close("incomplete")
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        yield self._event("error", code=error.code, message=error.message, param=error.param)
        yield self._event("response.failed", response=self.response)

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _item_event(self, kind: str, **fields: Any) -> Json:
        """An event about the open item."""
        assert self._item is not None
        place = {"item_id": self._item["id"], "output_index": len(self.response["output"]) - 1}
        return self._event(f"response.{kind}", **place, **fields)

    @property
    def _is_summary(self) -> bool:
        """Whether the open item's text is told as a summary."""
        return self._kind == "reasoning" and self._summarises

    def _text_event(self, what: str, **fields: Any) -> Json:
        """An event about the text of the open item."""
        if self._is_summary:
            return self._item_event(f"reasoning_summary_text.{what}", summary_index=0, **fields)
        return self._item_event(f"{self._text_kind}.{what}", content_index=0, **fields)

    def _part_event(self, what: str, text: str) -> Json:
        """An event about the only part of the open item."""
        if self._is_summary:
            part = {"type": "summary_text", "text": text}
            return self._item_event(f"reasoning_summary_part.{what}", summary_index=0, part=part)
        return self._item_event(f"content_part.{what}", content_index=0, part=self._part(text))

    def _whole_item(self, kind: str) -> Json:
        return self._event(f"response.{kind}", output_index=len(self.response["output"]) - 1, item=self._item)

    def _open(self, kind: str, item: Json) -> Iterator[Json]:
        yield from self._close()
        self._kind, self._item, self._pieces, self._logprobs = kind, item, [], []
        item["status"] = "in_progress"
        self.response["output"].append(item)
        yield self._whole_item("output_item.added")

    def _more(self, kind: str, text: str, **scores: list[Json]) -> Iterator[Json]:
        """More of an item that is text: reasoning, or a message of a phase."""
        if self._kind != kind:
            if kind == "reasoning":
                item = {"id": _new_id("rs"), "type": "reasoning", "summary": [], "content": []}
            else:
                item = {"id": _new_id("msg"), "type": "message", "role": "assistant", "phase": kind}
            yield from self._open(kind, item | {"content": []})
            yield self._part_event("added", "")
        self._pieces.append(text)
        self._logprobs += scores.get("logprobs", ())
        yield self._text_event("delta", delta=text, **scores)

    @property
    def _text_kind(self) -> str:
        return "reasoning_text" if self._kind == "reasoning" else "output_text"

    def _part(self, text: str) -> Json:
        """The only part of the open item's content."""
        scores = {} if self._kind == "reasoning" else {"annotations": [], "logprobs": self._logprobs}
        return {"type": self._text_kind, "text": text, **scores}

    def _close(self, status: str = "completed") -> Iterator[Json]:
        """End the open item, if there is one."""
        self._call = None
        if self._item is None:
            return
        text = "".join(self._pieces)
        self._item["status"] = status
        if self._kind in ("hosted", "listing"):
            pass  # it is complete as it is
        elif self._kind == "call":
            self._item["arguments"] = text
            done = {"name": self._item["name"], "arguments": text}
            yield self._item_event("function_call_arguments.done", **done)
        else:
            scores = {} if self._kind == "reasoning" else {"logprobs": self._logprobs}
            self._item["content"] = [self._part(text)]
            if self._is_summary:
                self._item["summary"] = [{"type": "summary_text", "text": text}]
            if self._kind == "reasoning" and self._sealed:
                self._item["encrypted_content"] = seal(text)
            if self._kind == "final_answer":
                self.answer += text
            yield self._text_event("done", text=text, **scores)
            yield self._part_event("done", text)
        yield self._whole_item("output_item.done")
        self._item, self._kind = None, ""

    def _finish(self, done: events.Done) -> Iterator[Json]:
        incomplete = done.finish_reason in ("length", "cancelled")
        yield from self._close("incomplete" if incomplete else "completed")
        usage = done.usage
        self.response["usage"] = {
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
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
            yield self._event("response.incomplete", response=self.response)
        else:
            self.response |= {"status": "completed", "completed_at": int(time.time())}
            yield self._event("response.completed", response=self.response)


def _told(tool: Json) -> Json:
    """A tool without what only its MCP server is to know."""
    return {key: value for key, value in tool.items() if key not in ("headers", "authorization")}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
