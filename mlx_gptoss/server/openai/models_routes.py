"""GET /v1/models and /v1/models/{model}: the one model that is loaded. GET /health and /metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.http.openapi import ERRORS
from mlx_gptoss.server.running.metrics import CONTENT_TYPE
from mlx_gptoss.server.state import ServerState


def router(state: ServerState) -> APIRouter:
    """The routes, bound to a server."""
    routes = APIRouter(tags=["Server"])
    created = int(time.time())

    def model() -> dict[str, Any]:
        engine = state.ready()
        return {
            "id": state.model_name,
            "object": "model",
            "created": created,
            "owned_by": "local",
            "max_model_len": engine.max_context,
        }

    @routes.get("/v1/models", responses=ERRORS)
    async def list_models() -> dict[str, Any]:
        """The models of this server: one."""
        return {"object": "list", "data": [model()]}

    @routes.get("/v1/models/{name:path}", responses=ERRORS)
    async def retrieve_model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        state.ready()
        if name != state.model_name:
            raise ApiError(
                404,
                f"There is no model {name[:100]!r} here: this server has {state.model_name!r}.",
                code="model_not_found",
                param="model",
            )
        return model()

    @routes.get("/health", responses={503: {"description": "The model is loading."}})
    async def health() -> Response:
        """Whether the model is there: 200 {"status": "ok"}, or 503 {"status": "loading"}."""
        if state.engine is None:
            return JSONResponse({"status": "loading"}, 503, headers={"Retry-After": "5"})
        return JSONResponse({"status": "ok", "model": state.model_name})

    @routes.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        # The engine answers between two steps, so asking it may take as long as a step.
        stats = await asyncio.to_thread(state.engine.stats) if state.engine is not None else None
        return Response(state.metrics.text(stats), media_type=CONTENT_TYPE)

    return routes
