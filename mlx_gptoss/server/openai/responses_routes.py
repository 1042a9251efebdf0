"""POST /v1/responses; GET and DELETE of stored ones."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from fastapi.responses import Response

from mlx_gptoss.errors import ContextLengthError, RequestError
from mlx_gptoss.harmony import Reply, render
from mlx_gptoss.server.http.api import ApiRouter, caller_of
from mlx_gptoss.server.memory.responses import StoredResponse
from mlx_gptoss.server.openai.responses_items import InputItem
from mlx_gptoss.server.openai.responses_request import (
    ResponsesRequest,
    drop_oldest,
    input_items,
    listed,
    translate,
)
from mlx_gptoss.server.openai.responses_writer import ResponseWriter
from mlx_gptoss.server.running.answer import answer
from mlx_gptoss.server.running.jobs import Job
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.tools.toolbox import ServedTools
from mlx_gptoss.server.translate.turn import TurnRequest


def router(state: ServerState) -> ApiRouter:
    """The routes, bound to a server."""
    routes = ApiRouter("/v1/responses", "OpenAI")

    @routes.post("", response_model=None)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input; the answer can be gone on from by its id."""
        llm = await state.ready()
        caller = caller_of(request)
        items = input_items(body, state, caller)
        served = await state.open_tools(body.tools or ())
        asked = translate(body, items, state, caller, served)
        writer = ResponseWriter(
            body,
            state.model_name,
            llm.tokenizer,
            structured=asked.options.response_format is not None,
            scored=asked.options.params.logprobs is not None,
            served=served,
            approved=asked.approved,
            listed=_listed_servers(body, items, state, caller),
        )
        asked, job = await _start(asked, state, served, body)

        def keep(_: int, reply: Reply) -> None:
            state.turns.remember_reply(caller, reply, writer.answer, asked.conversation)
            if writer.response["store"]:
                history = (*asked.conversation.messages, *reply.messages)
                shown = [listed(item) for item in items]
                kept = StoredResponse.of(writer.response, shown, history, asked.preface)
                state.responses.put(caller, kept)

        writer.on_reply = keep
        return await answer(job, writer, request, body.stream)

    @routes.post("/input_tokens")
    async def count_input_tokens(body: ResponsesRequest, request: Request) -> dict[str, Any]:
        """How many tokens an input has when it is rendered, up to a few contexts."""
        caller = caller_of(request)
        asked = translate(body, input_items(body, state, caller), state, caller)
        return {"object": "response.input_tokens", "input_tokens": await state.count(asked.conversation)}

    @routes.get("/{response_id}")
    async def retrieve_response(request: Request, response_id: str, stream: bool = False) -> dict[str, Any]:
        """A stored response."""
        if stream:
            raise RequestError("stream is not supported for stored responses: get it in one piece", "stream")
        return state.responses.get(caller_of(request), response_id).body

    @routes.delete("/{response_id}")
    async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
        """Forget a stored response."""
        state.responses.delete(caller_of(request), response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @routes.get("/{response_id}/input_items")
    async def list_input_items(
        request: Request,
        response_id: str,
        order: Literal["asc", "desc"] = "desc",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> dict[str, Any]:
        """What a stored response answered, a page at a time, the latest item first."""
        items = state.responses.get(caller_of(request), response_id).input_items
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


def _listed_servers(
    body: ResponsesRequest, items: list[InputItem], state: ServerState, caller: str
) -> set[str]:
    """The MCP servers whose tools the client was told in this conversation."""
    listed = {item.server_label or "" for item in items if item.type == "mcp_list_tools"}
    if body.previous_response_id:
        before = state.responses.get(caller, body.previous_response_id).body["output"]
        listed |= {item["server_label"] for item in before if item["type"] == "mcp_list_tools"}
    return listed


async def _start(
    asked: TurnRequest, state: ServerState, served: ServedTools | None, body: ResponsesRequest
) -> tuple[TurnRequest, Job]:
    """Start the turn; to truncate is to leave out as many of the oldest turns as do not fit."""
    while True:
        try:
            return asked, await state.start(asked, 1, served, body.max_tool_calls)
        except ContextLengthError as error:
            conversation = asked.conversation
            if body.truncation != "auto":
                raise
            tokens = error.prompt_tokens
            if error.at_least:
                tokenizer = (await state.ready()).tokenizer
                tokens = len(await asyncio.to_thread(render, conversation, tokenizer))
            # One token too many counts as well: room for the answer's first is needed.
            kept = drop_oldest(conversation.messages, max(1, tokens - error.max_context), tokens)
            if kept is None:
                raise
            asked = replace(asked, conversation=replace(conversation, messages=kept))
