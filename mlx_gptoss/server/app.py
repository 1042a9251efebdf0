"""The ASGI application: routes of every API behind the gate, over one LLM."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.routing import Route

from mlx_gptoss.server import models_routes, status_routes, tokenizer_routes
from mlx_gptoss.server.anthropic import messages_routes
from mlx_gptoss.server.gate import Gate
from mlx_gptoss.server.http.errors import install_handlers
from mlx_gptoss.server.lmstudio import models_routes as lmstudio_models
from mlx_gptoss.server.ollama import chat_routes as ollama_chat
from mlx_gptoss.server.ollama import generate_routes as ollama_generate
from mlx_gptoss.server.ollama import models_routes as ollama_models
from mlx_gptoss.server.openai import chat_routes, completions_routes, responses_routes, tools_routes
from mlx_gptoss.server.page import routes as page
from mlx_gptoss.server.settings import ServerSettings
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.tools.toolbox import Toolbox

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM

# The first whose prefix a path has, gives its errors their shape.
APIS = (
    chat_routes,
    responses_routes,
    completions_routes,
    messages_routes,
    models_routes,
    tools_routes,
    lmstudio_models,
    ollama_chat,
    ollama_generate,
    ollama_models,
)


def create_app(
    llm: LLM | None = None, settings: ServerSettings | None = None, toolbox: Toolbox | None = None
) -> FastAPI:
    """The application for an LLM. Without one it answers 503 until `app.state.server.attach` gives it one.

    toolbox: tools that it runs for requests that name them. The caller keeps both: they are not closed here.
    """
    state = ServerState(settings or ServerSettings(), toolbox)
    app = FastAPI(
        title="mlx_gptoss",
        version=version("gptoss-mlx"),
        description="OpenAI's, Anthropic's and Ollama's APIs over a local gpt-oss model.",
        docs_url=None,  # FastAPI's pages load scripts from other sites
        redoc_url=None,
    )
    app.state.server = state
    apis = [api.router(state) for api in APIS]
    routers = [*apis, status_routes.router(state), tokenizer_routes.router(state), page.router()]
    for router in routers:
        app.include_router(router)
    routes = [route for group in (app, *routers) for route in group.routes if isinstance(route, Route)]
    install_handlers(app, sorted({route.path for route in routes if route.include_in_schema}))
    app.add_middleware(Gate, state=state, routes=routes, apis=apis)
    state.attach(llm)
    return app
