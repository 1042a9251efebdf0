"""GET /v1/models and /v1/models/{name}: the one model that is loaded."""

from __future__ import annotations

import time
from typing import Any

from mlx_gptoss.server.http.api import ApiRouter
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.state import ServerState


def router(state: ServerState) -> ApiRouter:
    """The routes, bound to a server."""
    routes = ApiRouter("/v1/models", "OpenAI")
    created = int(time.time())

    def model() -> dict[str, Any]:
        return {
            "id": state.model_name,
            "object": "model",
            "created": created,
            "owned_by": "local",
            "max_model_len": state.ready().max_context,
        }

    @routes.get("")
    async def list_models() -> dict[str, Any]:
        """The models of this server: one."""
        return {"object": "list", "data": [model()]}

    @routes.get("/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        found = model()
        if name != found["id"]:
            raise ApiError(
                404,
                f"There is no model {name[:100]!r} here: this server has {found['id']!r}.",
                code="model_not_found",
                param="model",
            )
        return found

    return routes
