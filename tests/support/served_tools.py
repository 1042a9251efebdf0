"""Tools for a server of tests: a toy MCP server in this process, and a stand-in for `python`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_gptoss.harmony import PYTHON, ToolCall, ToolNamespace
from mlx_gptoss.mcp.config import read_servers
from mlx_gptoss.mcp.connection import Connections
from mlx_gptoss.server.tools.toolbox import Toolbox
from tests.support.toy_mcp import make_server


class Notebook:
    """In the place of the python tool: tells how often it was called. A cell that says "wait" waits."""

    def __init__(self) -> None:
        self.calls = 0
        self.closed = threading.Event()

    @property
    def namespace(self) -> ToolNamespace:
        return PYTHON

    def handle(self, call: ToolCall) -> str:
        self.calls += 1
        if "wait" in call.arguments:
            self.closed.wait(60)
        return f"cell {self.calls}: {call.arguments}"

    def close(self) -> None:
        self.closed.set()


class Maker:
    """Makes notebooks and keeps them."""

    def __init__(self) -> None:
        self.made: list[Notebook] = []

    def __call__(self) -> Notebook:
        self.made.append(Notebook())
        return self.made[-1]


@contextmanager
def served_tools(maker: Maker | None = None, *sources: Any, **options: Any) -> Iterator[Toolbox]:
    """A toolbox of `python` and the toy; `sources` are further MCP servers."""
    connections = Connections(read_servers([make_server(), *sources]), timeout=60)
    try:
        yield Toolbox({"python": maker or Maker()}, connections, **options)
    finally:
        connections.close()
