"""POST /v1/completions: raw text or token ids in, raw text out."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import Request
from fastapi.responses import Response

from mlx_gptoss.engine.request import Cancellable, Sink
from mlx_gptoss.errors import ContextLengthError
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.http.api import ApiRouter
from mlx_gptoss.server.openai.completions_request import CompletionRequest, read_prompts, sampling_of
from mlx_gptoss.server.openai.completions_writer import CompletionWriter
from mlx_gptoss.server.openai.prompt_run import PromptRun
from mlx_gptoss.server.running.answer import answer
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.options import at_most
from mlx_gptoss.server.translate.request import naming
from mlx_gptoss.server.translate.sampling_fields import of_choices


def router(state: ServerState) -> ApiRouter:
    """The route, bound to a server."""
    routes = ApiRouter("/v1/completions", "OpenAI")

    @routes.post("", response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Go on from a prompt."""
        llm = await state.ready()
        params = sampling_of(body)
        prompts = await asyncio.to_thread(read_prompts, body.prompt, llm.tokenizer, llm.max_context)
        count = body.n or 1
        at_most(state.settings.max_choices, count * len(prompts), "choices over all prompts", "n")
        writer = CompletionWriter(body, state.model_name, llm.tokenizer, list(prompts.values()), params.stop)
        llm = await state.ready()
        adapter = state.adapter_of(body.model)

        def submit(where: str, tokens: list[int], seeded: SamplingParams, sink: Sink) -> Cancellable:
            with naming({"messages": where, "token_ids": where}):
                if not body.scores_prompt and body.max_tokens != 0:
                    return llm.submit(tokens, seeded, sink=sink, adapter=adapter)
                if len(tokens) > llm.max_context - (body.max_tokens != 0):
                    raise ContextLengthError(len(tokens), llm.max_context)
            top = seeded.logprobs if body.scores_prompt else None
            run = PromptRun(llm, tokens, top, None if body.max_tokens == 0 else seeded, sink)
            return run.start(state.jobs.starters)

        starts = [
            partial(submit, where, tokens, seeded)
            for where, tokens in prompts.items()
            for seeded in of_choices(params, count)
        ]
        return await answer(await state.jobs.start(*starts), writer, request, body.stream)

    return routes
