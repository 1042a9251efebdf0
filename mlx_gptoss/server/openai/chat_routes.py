"""POST /v1/chat/completions: OpenAI's chat API."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from mlx_gptoss.harmony import Reply
from mlx_gptoss.server.http.api import ApiRouter, caller_of
from mlx_gptoss.server.openai.chat_executed import Executed
from mlx_gptoss.server.openai.chat_request import ChatRequest, translate
from mlx_gptoss.server.openai.chat_writer import ChatWriter
from mlx_gptoss.server.running.answer import answer
from mlx_gptoss.server.state import ServerState


def router(state: ServerState) -> ApiRouter:
    """The route, bound to a server."""
    routes = ApiRouter("/v1/chat/completions", "OpenAI")

    @routes.post("", response_model=None)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        llm = await state.ready()
        served = await state.open_tools([tool.model_dump() for tool in body.tools or ()])
        asked = translate(body, state, caller_of(request), served)
        structured = asked.options.response_format is not None
        executed = Executed(served, asked.approved) if served is not None else None
        writer = ChatWriter(body, state.model_name, llm.tokenizer, structured=structured, executed=executed)

        def remember(index: int, reply: Reply) -> None:
            text = writer.choices[index].text
            state.turns.remember_reply(caller_of(request), reply, text, asked.conversation)

        writer.on_reply = remember
        return await answer(await state.start(asked, body.n or 1, served), writer, request, body.stream)

    return routes
