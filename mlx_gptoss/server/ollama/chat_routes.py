"""POST /api/chat: Ollama's chat API."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from mlx_gptoss.harmony import Reply
from mlx_gptoss.server.http.api import ApiRouter, caller_of
from mlx_gptoss.server.ollama.chat_request import ChatRequest, translate
from mlx_gptoss.server.ollama.request import settle
from mlx_gptoss.server.ollama.writer import ChatWriter, ollama_error, settled
from mlx_gptoss.server.running.answer import answer
from mlx_gptoss.server.state import ServerState


def router(state: ServerState) -> ApiRouter:
    """The route, bound to a server."""
    routes = ApiRouter("/api/chat", "Ollama", ollama_error, always_json=True)

    @routes.post("", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; without messages, load the model or let go of it."""
        llm, waited = await settle(body, state, asks=bool(body.messages))
        if llm is None or not body.messages:
            message = {"message": {"role": "assistant", "content": ""}}
            return JSONResponse(settled(body.model, message, loaded=llm is not None))
        asked = translate(body, state, caller_of(request))
        structured = asked.options.response_format is not None
        writer = ChatWriter(body, llm.tokenizer, waited, structured=structured)

        def remember(_: int, reply: Reply) -> None:
            state.turns.remember_reply(caller_of(request), reply, writer.text, asked.conversation)

        writer.on_reply = remember
        return await answer(await state.start(asked), writer, request, body.stream is not False)

    return routes
