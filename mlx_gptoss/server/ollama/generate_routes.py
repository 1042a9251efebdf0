"""POST /api/generate: Ollama's API for one prompt."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from mlx_gptoss.server.http.api import ApiRouter, caller_of
from mlx_gptoss.server.ollama.generate_request import GenerateRequest, raw_tokens, translate
from mlx_gptoss.server.ollama.request import NAMES, settle
from mlx_gptoss.server.ollama.writer import GenerateWriter, RawWriter, ollama_error, settled
from mlx_gptoss.server.running.answer import answer
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.request import naming

if TYPE_CHECKING:
    from mlx_gptoss.engine.request import Cancellable, Sink
    from mlx_gptoss.llm import LLM


def router(state: ServerState) -> ApiRouter:
    """The route, bound to a server."""
    routes = ApiRouter("/api/generate", "Ollama", ollama_error, always_json=True)

    @routes.post("", response_model=None)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Answer a prompt, or go on from a raw one; without a prompt, load the model or let go of it."""
        body.check()
        llm, waited = await settle(body, state, asks=bool(body.prompt))
        if llm is None or not body.prompt:
            return JSONResponse(settled(body.model, {"response": ""}, loaded=llm is not None))
        if body.raw:
            return await _continue(body, request, state, llm, waited)
        asked = translate(body, state, caller_of(request))
        structured = asked.options.response_format is not None
        writer = GenerateWriter(body, llm.tokenizer, waited, structured=structured)
        return await answer(await state.start(asked), writer, request, body.stream is not False)

    return routes


async def _continue(
    body: GenerateRequest, request: Request, state: ServerState, llm: LLM, waited: float
) -> Response:
    """Go on from a raw prompt."""
    params = body.params()
    tokens = await asyncio.to_thread(raw_tokens, body.prompt, llm.tokenizer, llm.max_context)
    writer = RawWriter(body, llm.tokenizer, waited, params.stop)
    llm = await state.ready()

    def submit(sink: Sink) -> Cancellable:
        with naming(NAMES | {"messages": "prompt", "token_ids": "prompt"}):
            return llm.submit(tokens, params, sink=sink)

    job = await state.jobs.start(submit)
    return await answer(job, writer, request, body.stream is not False)
