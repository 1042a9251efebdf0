"""GET /v1/models and /v1/models/{name}: the one model that is served, in OpenAI's and Anthropic's shapes."""

from __future__ import annotations

import datetime
import time
from typing import Any

from fastapi import Request

from mlx_gptoss.server.http.api import ApiRouter
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.state import ServerState

ANTHROPIC_HEADER = "anthropic-version"  # Anthropic's clients send it with every request


def router(state: ServerState) -> ApiRouter:
    """The routes, bound to a server."""
    routes = ApiRouter("/v1/models", "OpenAI")
    created = int(time.time())

    def openai_model() -> dict[str, Any]:
        return {
            "id": state.model_name,
            "object": "model",
            "created": created,
            "owned_by": "local",
            "max_model_len": state.facts().max_context,
            "loaded": state.llm is not None,
        }

    def anthropic_model() -> dict[str, Any]:
        context = state.facts().max_context
        return {
            "type": "model",
            "id": state.model_name,
            "display_name": state.model_name,
            "created_at": datetime.datetime.fromtimestamp(created, datetime.UTC).isoformat(),
            "lifecycle": "active",
            "max_input_tokens": context,
            "max_tokens": context,
        }

    @routes.get("")
    async def list_models(request: Request) -> dict[str, Any]:
        """The models of this server: one. In Anthropic's shape for who sends anthropic-version."""
        if ANTHROPIC_HEADER in request.headers:
            model = anthropic_model()
            return {"data": [model], "has_more": False, "first_id": model["id"], "last_id": model["id"]}
        return {"object": "list", "data": [openai_model()]}

    @routes.get("/{name:path}")
    async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
        """The model, by its name."""
        model = anthropic_model() if ANTHROPIC_HEADER in request.headers else openai_model()
        if name != model["id"]:
            raise ApiError(
                404,
                f"There is no model {name[:100]!r} here: this server has {model['id']!r}.",
                code="model_not_found",
                param="model",
            )
        return model

    return routes
