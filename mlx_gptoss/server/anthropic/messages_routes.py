"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from mlx_gptoss.errors import ContextLengthError
from mlx_gptoss.harmony import Conversation, Reply
from mlx_gptoss.server.anthropic.messages_request import (
    CountTokensRequest,
    MessagesRequest,
    read,
    shows_thinking,
    translate,
)
from mlx_gptoss.server.anthropic.messages_writer import MessageWriter, anthropic_error
from mlx_gptoss.server.http.api import ApiRouter, caller_of
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.running.answer import answer
from mlx_gptoss.server.state import ServerState


def router(state: ServerState) -> ApiRouter:
    """The routes, bound to a server."""
    routes = ApiRouter("/v1/messages", "Anthropic", anthropic_error)

    @routes.post("", response_model=None)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation."""
        await state.ready()
        asked = translate(body, state, caller_of(request))
        try:
            job = await state.start(asked)
        except ContextLengthError as error:
            raise await _too_long(error, asked.conversation, state) from None
        writer = MessageWriter(state.model_name, job.prompt_tokens, show_thinking=shows_thinking(body))

        def remember(_: int, reply: Reply) -> None:
            state.turns.remember_reply(caller_of(request), reply, writer.answer, asked.conversation)

        writer.on_reply = remember
        return await answer(job, writer, request, body.stream)

    @routes.post("/count_tokens")
    async def count_tokens(body: CountTokensRequest, request: Request) -> dict[str, int]:
        """How many tokens a conversation has when it is rendered, up to a few contexts."""
        conversation = read(body, state, caller_of(request)).conversation()
        return {"input_tokens": await state.count(conversation)}

    return routes


async def _too_long(error: ContextLengthError, conversation: Conversation, state: ServerState) -> ApiError:
    """The error in Anthropic's words, from which clients read how much they have to leave out."""
    tokens, limit = error.prompt_tokens, error.max_context
    if error.at_least:
        try:
            tokens = await state.count(conversation)
        except ContextLengthError as far_too_long:
            tokens = far_too_long.prompt_tokens
    message = f"prompt is too long: {tokens} tokens > {limit} maximum"
    return ApiError(400, message, code="context_length_exceeded", param=error.field)
