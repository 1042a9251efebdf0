"""POST /v1/responses, streamed and not; GET and DELETE of stored ones."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.errors import ContextLengthError, RequestError, SchemaError, ToolError
from mlx_gptoss.grammar import ResponseFormat, ToolChoice
from mlx_gptoss.harmony import Conversation, Tool
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.http.openapi import ERRORS
from mlx_gptoss.server.memory.responses import StoredResponse
from mlx_gptoss.server.memory.turns import digest
from mlx_gptoss.server.openai.chat_request import naming, tool_fields
from mlx_gptoss.server.openai.responses_request import (
    InputItem,
    ResponsesRequest,
    add_items,
    drop_oldest,
    listed,
)
from mlx_gptoss.server.openai.responses_writer import ResponseWriter
from mlx_gptoss.server.running import sse
from mlx_gptoss.server.running.jobs import Job
from mlx_gptoss.server.running.streams import collect, log_failure
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.options import (
    ConversationBuilder,
    check_schema_size,
    check_tool_count,
    choose_tools,
    effort_of,
    function_tool,
    sampling_params,
)

LOGPROBS = "message.output_text.logprobs"
SCHEMA_FIELD = "text.format.schema"
SEALED_REASONING = "reasoning.encrypted_content"


@dataclass
class ResponsePlan:
    """A request, translated: what the engine is asked for, and what is kept afterwards. `fields` are the
    request's names for what the engine is asked for."""

    items: list[InputItem]
    conversation: Conversation
    preface: tuple[str, ...]
    params: SamplingParams
    tool_choice: ToolChoice
    fields: dict[str, str]
    schema: dict[str, Any] | None
    json_object: bool
    strict: bool
    truncate: bool


def plan(request: ResponsesRequest, state: ServerState) -> ResponsePlan:
    """Translate a request. Raises RequestError naming the field at fault."""
    request.refuse_unsupported()
    settings = state.settings
    builder = ConversationBuilder(state.turns)
    if request.previous_response_id:
        before = state.responses.get(request.previous_response_id, "previous_response_id")
        builder = ConversationBuilder(state.turns, before.history, before.preface)
    items = request.input
    if isinstance(items, str):
        items = [InputItem(role="user", content=items)]
    if len(items) > settings.max_messages:
        raise RequestError(
            f"input has {len(items):,} items and this server takes {settings.max_messages:,}", "input"
        )
    items = [
        InputItem.model_validate(state.responses.item(item.id, f"input[{index}].id"))
        if item.type == "item_reference"
        else item
        for index, item in enumerate(items)
    ]
    add_items(builder, items)
    if not builder.messages and not builder.preface and not request.instructions:
        raise RequestError("input is empty: send a text or a list of items", "input")
    tools, choice = choose_tools(request.tool_choice, _functions(request, state))
    schema, name, json_object = _text_format(request, state)
    effort = request.reasoning.effort if request.reasoning else None
    conversation = builder.build(
        instructions=request.instructions,
        tools=tools,
        effort=effort_of(effort, "reasoning.effort"),
        schema=schema,
        schema_name=name,
        today=state.today(),
    )
    wanted = request.text.format if request.text else None
    strict = wanted is not None and wanted.strict is True
    truncate = request.truncation == "auto"
    declared = [tool.get("name") if tool["type"] == "function" else None for tool in request.tools or ()]
    fields = {"schema": SCHEMA_FIELD, **tool_fields(tools, declared, "parameters"), "messages": "input"}
    return ResponsePlan(
        items,
        conversation,
        tuple(builder.preface),
        _params(request),
        choice,
        fields,
        schema,
        json_object,
        strict,
        truncate,
    )


def _functions(request: ResponsesRequest, state: ServerState) -> list[Tool]:
    """The function tools. Other types (web_search, namespace, custom, …) are accepted and not offered."""
    declared = request.tools or []
    check_tool_count(len(declared), state.settings)
    tools = []
    for index, tool in enumerate(declared):
        where = f"tools[{index}]"
        if not isinstance(tool.get("type"), str):
            raise ToolError(f"{where} has no type: expected 'function'", f"{where}.type")
        if tool["type"] != "function":
            continue
        name, parameters = tool.get("name"), tool.get("parameters")
        if not isinstance(name, str):
            raise ToolError(f"{where} has no name: give it one, such as 'get_weather'", f"{where}.name")
        if parameters is not None and not isinstance(parameters, dict):
            raise ToolError(f"{where}.parameters is no object: expected a JSON schema", f"{where}.parameters")
        if not isinstance(tool.get("description") or "", str):
            raise ToolError(f"{where}.description is no text", f"{where}.description")
        tools.append(function_tool(tool, state.settings, where))
    return tools


def _text_format(
    request: ResponsesRequest, state: ServerState
) -> tuple[dict[str, Any] | None, str | None, bool]:
    """(schema, its name, whether any JSON object is asked for)"""
    wanted = request.text.format if request.text else None
    if wanted is None or wanted.type == "text":
        return None, None, False
    if wanted.type == "json_object":
        return None, None, True
    if wanted.type != "json_schema":
        raise RequestError(
            f"text.format.type is {wanted.type[:40]!r}: expected text, json_object or json_schema",
            "text.format.type",
        )
    if wanted.schema_ is None:
        raise RequestError("text.format.schema is missing: give a JSON schema", SCHEMA_FIELD)
    check_schema_size(wanted.schema_, state.settings, SCHEMA_FIELD)
    return wanted.schema_, wanted.name, False


def _params(request: ResponsesRequest) -> SamplingParams:
    scored = request.top_logprobs is not None or LOGPROBS in (request.include or ())
    return sampling_params(
        {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_tokens": request.max_output_tokens,
            "logprobs": (request.top_logprobs or 0) if scored else None,
        },
        {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"},
    )


def new_body(request: ResponsesRequest, model: str) -> dict[str, Any]:
    """The response object before anything was generated, with the request's settings repeated."""
    effort = request.reasoning.effort if request.reasoning else None
    wanted = request.text.format if request.text else None
    text: dict[str, Any] = {
        "format": wanted.model_dump(by_alias=True, exclude_none=True) if wanted else {"type": "text"}
    }
    if request.text and request.text.verbosity:
        text["verbosity"] = request.text.verbosity
    functions = {"description": None, "parameters": None, "strict": None}
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": effort or "medium", "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": text,
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": [
            functions | tool if tool.get("type") == "function" else tool for tool in request.tools or ()
        ],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    }


async def start(asked: ResponsePlan, state: ServerState) -> Job:
    """Start the generation; with truncation "auto", without as many of the oldest turns as do not fit."""
    engine = state.ready()
    while True:
        try:
            with naming(asked.fields):
                return await state.jobs.start(
                    lambda sink: engine.start(
                        asked.conversation,
                        TurnOptions(
                            asked.params,
                            ResponseFormat.of(schema=asked.schema, json_object=asked.json_object),
                            asked.tool_choice,
                            strict_tools=False,
                        ),
                        sink=sink,
                    )
                )
        except SchemaError as error:
            if asked.strict or asked.schema is None or error.field != SCHEMA_FIELD:
                raise
            # The prompt shows the schema, and without `strict` no more than an object was promised.
            asked.schema, asked.json_object = None, True
        except ContextLengthError as error:
            excess, messages = error.prompt_tokens - error.max_context, asked.conversation.messages
            # One token too many counts as well: room for the answer's first is needed.
            kept = drop_oldest(messages, max(1, excess), error.prompt_tokens) if asked.truncate else None
            if kept is None:
                raise
            asked.conversation = replace(asked.conversation, messages=kept)


def finish(asked: ResponsePlan, writer: ResponseWriter, state: ServerState) -> None:
    """Keep what later requests may refer to."""
    if writer.done is None:
        return
    produced = writer.done.reply.messages
    if writer.body["status"] == "completed":
        state.turns.remember(produced, writer.answer, digest(asked.conversation))
    if writer.body["store"]:
        history = (*asked.conversation.messages, *produced)
        items = [listed(item) for item in asked.items]
        state.responses.put(StoredResponse(writer.body, items, history, asked.preface))


def router(state: ServerState) -> APIRouter:
    """The routes, bound to a server."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/responses", responses=ERRORS, response_model=None)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input; the answer can be gone on from by its id."""
        engine = state.ready()
        asked = plan(body, state)
        scored = asked.params.logprobs is not None
        writer = ResponseWriter(
            new_body(body, state.model_name),
            tokenizer=engine.tokenizer if scored else None,
            structured=asked.schema is not None or asked.json_object,
            sealed=SEALED_REASONING in (body.include or ()),
        )
        job = await start(asked, state)
        if body.stream:
            return sse.EventStream(_stream(asked, writer, job, state), job)
        await collect(job, request, lambda _, event: list(writer.take(event)))
        finish(asked, writer, state)
        return JSONResponse(writer.body)

    @routes.get("/v1/responses/{response_id}", responses=ERRORS)
    async def retrieve_response(response_id: str, stream: bool = False) -> dict[str, Any]:
        """A stored response."""
        if stream:
            raise RequestError("stream is not supported for stored responses: get it in one piece", "stream")
        return state.responses.get(response_id).body

    @routes.delete("/v1/responses/{response_id}", responses=ERRORS)
    async def delete_response(response_id: str) -> dict[str, Any]:
        """Forget a stored response."""
        state.responses.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @routes.get("/v1/responses/{response_id}/input_items", responses=ERRORS)
    async def list_input_items(
        response_id: str,
        order: Literal["asc", "desc"] = "desc",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> dict[str, Any]:
        """What a stored response answered, a page at a time, the latest item first."""
        items = state.responses.get(response_id).input_items
        if order == "desc":
            items = items[::-1]
        if after is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise RequestError(f"after is {after[:80]!r}, and there is no such item", "after")
            items = items[ids.index(after) + 1 :]
        page = items[:limit]
        first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
        more = len(items) > len(page)
        return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more}

    return routes


async def _stream(
    asked: ResponsePlan, writer: ResponseWriter, job: Job, state: ServerState
) -> AsyncIterator[bytes]:
    yield b"".join(map(sse.event, writer.opening()))
    try:
        async for batch in job.batches():
            if not batch:
                yield sse.HEARTBEAT
                continue
            out = [sse.event(event) for _, source in batch for event in writer.take(source)]
            finish(asked, writer, state)
            if out:
                yield b"".join(out)
    except Exception as error:
        yield b"".join(map(sse.event, writer.fail(log_failure(error))))
