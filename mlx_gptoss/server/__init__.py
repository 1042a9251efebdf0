"""The HTTP server: OpenAI's and Anthropic's APIs, a chat page and metrics over one loaded LLM.

`create_app(llm, settings)` builds the ASGI application; `run.serve` runs it with uvicorn. Each API is three
modules: X_request (its fields, and their translation to a turn), X_writer (events to its bodies and its
stream) and X_routes.
"""

from mlx_gptoss.server.app import create_app
from mlx_gptoss.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
