"""The HTTP server: OpenAI's and Anthropic's APIs, a chat page and metrics over one loaded LLM.

`create_app(engine, settings)` builds the ASGI application; `run.serve` runs it with uvicorn. One module per
API; each translates its protocol to a harmony Conversation, and harmony events back to its protocol.
"""

from mlx_gptoss.server.app import create_app
from mlx_gptoss.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
