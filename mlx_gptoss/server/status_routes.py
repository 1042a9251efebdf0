"""GET /health and /metrics: what the server itself is doing."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from mlx_gptoss.server.running.metrics import CONTENT_TYPE
from mlx_gptoss.server.state import ServerState


def router(state: ServerState) -> APIRouter:
    """The routes, bound to a server."""
    routes = APIRouter(tags=["Server"])

    @routes.get("/health", responses={503: {"description": "The model is loading."}})
    async def health() -> Response:
        """Whether the model is there: 200 {"status": "ok"}, or 503 {"status": "loading"}.

        "loaded" is false while an idle model is unloaded: the next request loads it.
        """
        if not state.model_name:
            return JSONResponse({"status": "loading"}, 503, headers={"Retry-After": "5"})
        loaded = state.llm is not None
        return JSONResponse({"status": "ok", "model": state.model_name, "loaded": loaded})

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        # The engine answers between two steps, so asking it may take as long as a step.
        llm = state.llm
        stats = await asyncio.to_thread(llm.stats) if llm is not None else None
        return Response(state.metrics.text(stats), media_type=CONTENT_TYPE)

    return routes
