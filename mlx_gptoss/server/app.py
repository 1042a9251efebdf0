"""The ASGI application: routes of every API behind the gate, over one LLM."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.routing import APIRoute

from mlx_gptoss.server.anthropic import messages_routes as messages
from mlx_gptoss.server.gate import Gate
from mlx_gptoss.server.http import page
from mlx_gptoss.server.http.errors import install_handlers
from mlx_gptoss.server.openai import chat_routes as chat_completions
from mlx_gptoss.server.openai import completions_routes as completions
from mlx_gptoss.server.openai import models_routes as models
from mlx_gptoss.server.openai import responses_routes as responses
from mlx_gptoss.server.settings import ServerSettings
from mlx_gptoss.server.state import ServerState

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM


def create_app(engine: LLM | None = None, settings: ServerSettings | None = None) -> FastAPI:
    """The application for an engine. Without one it answers 503 until `app.state.server.engine` is set.

    The caller keeps the engine: it is not closed here.
    """
    state = ServerState(settings or ServerSettings())
    app = FastAPI(
        title="mlx_gptoss",
        version=version("mlx-gptoss"),
        description="OpenAI's and Anthropic's APIs over a local gpt-oss model.",
        docs_url=None,  # FastAPI's pages load scripts from other sites
        redoc_url=None,
    )
    app.state.server = state
    install_handlers(app)
    routers = [
        chat_completions.router(state),
        responses.router(state),
        completions.router(state),
        messages.router(state),
        models.router(state),
        page.router(),
    ]
    for router in routers:
        app.include_router(router)
    paths = [route.path for router in routers for route in router.routes if isinstance(route, APIRoute)]
    app.add_middleware(Gate, state=state, paths=["/openapi.json", *paths])
    state.attach(engine)
    return app
