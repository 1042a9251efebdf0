"""GET /v1/tools: the tools that this server runs for requests that name them."""

from __future__ import annotations

import asyncio
from typing import Any

from mlx_gptoss.server.http.api import ApiRouter
from mlx_gptoss.server.state import ServerState

# The type by which both OpenAI APIs are asked for a built-in tool.
TYPES = {"python": "code_interpreter", "browser": "web_search"}


def router(state: ServerState) -> ApiRouter:
    """The route, bound to a server."""
    routes = ApiRouter("/v1/tools", "OpenAI")

    @routes.get("")
    async def list_tools() -> dict[str, Any]:
        """What `tools` of a request may name: built-in tools by `type`, MCP servers by `server_label`.

        `error` tells why a server is not there.
        """
        toolbox = state.toolbox
        builtin = [{"type": TYPES[name], "name": name} for name in toolbox.builtin]
        listings = await asyncio.gather(
            *(asyncio.to_thread(toolbox.listing, label) for label in toolbox.labels)
        )
        servers = [
            {
                "type": "mcp",
                "server_label": listing.label,
                "tools": [
                    {"name": tool.name, "description": tool.description, "read_only": tool.read_only}
                    for tool in listing.tools
                ],
                "error": listing.error,
            }
            for listing in listings
        ]
        return {"object": "list", "data": [*builtin, *servers]}

    return routes
