"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

import asyncio

from fastapi import Request
from fastapi.responses import Response

from mlx_gptoss.harmony import Reply, render
from mlx_gptoss.server.anthropic.messages_request import (
    CountTokensRequest,
    MessagesRequest,
    read,
    shows_thinking,
    translate,
)
from mlx_gptoss.server.anthropic.messages_writer import MessageWriter, anthropic_error
from mlx_gptoss.server.http.api import ApiRouter, caller_of
from mlx_gptoss.server.running.answer import answer
from mlx_gptoss.server.state import ServerState

COUNTED_CONTEXTS = 8  # a client counts to learn how much too long its conversation is


def router(state: ServerState) -> ApiRouter:
    """The routes, bound to a server."""
    routes = ApiRouter("/v1/messages", "Anthropic", anthropic_error)

    @routes.post("", response_model=None)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation."""
        state.ready()
        asked = translate(body, state, caller_of(request))
        job = await state.start(asked)
        writer = MessageWriter(state.model_name, job.prompt_tokens, show_thinking=shows_thinking(body))

        def remember(_: int, reply: Reply) -> None:
            state.turns.remember_reply(caller_of(request), reply, writer.answer, asked.conversation)

        writer.on_reply = remember
        return await answer(job, writer, request, body.stream)

    @routes.post("/count_tokens")
    async def count_tokens(body: CountTokensRequest, request: Request) -> dict[str, int]:
        """How many tokens a conversation has when it is rendered, up to a few contexts."""
        llm = state.ready()
        conversation = read(body, state, caller_of(request)).conversation()
        limit = COUNTED_CONTEXTS * llm.max_context
        tokens = await asyncio.to_thread(render, conversation, llm.tokenizer, limit=limit)
        return {"input_tokens": len(tokens)}

    return routes
