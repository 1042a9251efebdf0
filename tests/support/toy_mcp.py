"""An MCP server for tests.

    python -m tests.support.toy_mcp [--http] [--stubborn]

Over its standard input and output, or with --http over streamable HTTP on a free port, which it prints.
--stubborn: it does not end when its input does, nor when it is asked to.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.types import ImageContent, TextContent, ToolAnnotations

READ_ONLY = ToolAnnotations(read_only_hint=True)
POPULATION = {"Paris": 2_100_000, "Rome": 2_800_000}


def make_server(name: str = "toy") -> MCPServer:
    """The toy's tools."""
    server = MCPServer(name, instructions="A toy.")

    @server.tool(annotations=READ_ONLY)
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    @server.tool(annotations=READ_ONLY)
    def get_population(city: str) -> int:
        """How many people live in a city."""
        return POPULATION[city]

    @server.tool()
    def note(text: str) -> str:
        """Write something down."""
        return f"noted: {text}"

    @server.tool()
    def pid() -> int:
        """The number of this process."""
        return os.getpid()

    @server.tool()
    def variable(name: str) -> str:
        """A variable of the environment."""
        return os.environ.get(name, "unset")

    @server.tool()
    async def hang() -> str:
        """Never answers."""
        import anyio

        await anyio.sleep_forever()
        return "never"

    @server.tool()
    def die() -> str:
        """Ends the process."""
        os._exit(3)

    @server.tool()
    def large(characters: int) -> str:
        """A long text."""
        return "x" * characters

    @server.tool()
    def picture() -> list[Any]:
        """A picture with a title."""
        return [
            TextContent(type="text", text="a title"),
            ImageContent(type="image", data="AAAA", mime_type="image/png"),
        ]

    @server.tool()
    def header(name: str, ctx: Context[Any, Any]) -> str:
        """A header of the request."""
        request = ctx.request_context.request
        return str(request.headers.get(name, "none")) if request is not None else "no request"

    return server


def make_many(count: int) -> MCPServer:
    """A server of many tools."""
    server = MCPServer("many")
    for index in range(count):
        server.add_tool(lambda: "done", name=f"tool_{index}", description=f"Tool number {index}.")
    return server


def main() -> None:
    if "--stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=time.sleep, args=(600,)).start()  # keeps the process
    if "--http" in sys.argv:
        listening = socket.create_server(("127.0.0.1", 0))  # before its address is told
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/mcp", flush=True)
        app = make_server().streamable_http_app()
        uvicorn.Server(uvicorn.Config(app, log_level="error")).run([listening])
    else:
        make_server().run()


if __name__ == "__main__":
    main()
