"""GET /v1/models and /v1/models/{name}: the model that is served, in OpenAI's and Anthropic's shapes."""

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

    def names() -> list[str]:
        return [state.model_name, *(f"{state.model_name}:{name}" for name in state.facts().adapters)]

    def openai_model(name: str) -> dict[str, Any]:
        model = {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "local",
            "max_model_len": state.facts().max_context,
            "loaded": state.llm is not None,
        }
        return model if name == state.model_name else model | {"parent": state.model_name}

    def anthropic_model(name: str) -> dict[str, Any]:
        context = state.facts().max_context
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": datetime.datetime.fromtimestamp(created, datetime.UTC).isoformat(),
            "lifecycle": "active",
            "max_input_tokens": context,
            "max_tokens": context,
        }

    @routes.get("")
    async def list_models(request: Request) -> dict[str, Any]:
        """The model, and with each adapter. In Anthropic's shape for who sends anthropic-version."""
        if ANTHROPIC_HEADER in request.headers:
            models = [anthropic_model(name) for name in names()]
            return {"data": models, "has_more": False, "first_id": names()[0], "last_id": names()[-1]}
        return {"object": "list", "data": [openai_model(name) for name in names()]}

    @routes.get("/{name:path}")
    async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
        """The model, by its name."""
        if name not in names():
            raise ApiError(
                404,
                f"There is no model {name[:100]!r} here: this server has {', '.join(map(repr, names()))}.",
                code="model_not_found",
                param="model",
            )
        return anthropic_model(name) if ANTHROPIC_HEADER in request.headers else openai_model(name)

    return routes
