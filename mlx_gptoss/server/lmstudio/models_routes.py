"""GET /api/v0/models and /api/v0/models/{name}: LM Studio's details of the one model that is served."""

from __future__ import annotations

from typing import Any

from mlx_gptoss.server.http.api import ApiRouter
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.state import ServerState


def router(state: ServerState) -> ApiRouter:
    """The routes, bound to a server."""
    routes = ApiRouter("/api/v0/models", "LM Studio")

    def model() -> dict[str, Any]:
        facts, loaded = state.facts(), state.llm is not None
        found = {
            "id": state.model_name,
            "object": "model",
            "type": "llm",
            "publisher": facts.publisher,
            "arch": "gpt_oss",
            "compatibility_type": "mlx",
            "quantization": facts.quantization,
            "state": "loaded" if loaded else "not-loaded",
            "max_context_length": facts.config.max_position,
            "capabilities": ["tool_use"],
        }
        return found | {"loaded_context_length": facts.max_context} if loaded else found

    @routes.get("")
    def list_models() -> dict[str, Any]:
        """The models of this server: one."""
        return {"object": "list", "data": [model()]}

    @routes.get("/{name:path}")
    def retrieve_model(name: str) -> dict[str, Any]:
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
