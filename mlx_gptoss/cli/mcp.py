"""`--mcp`: the tools of MCP servers for the commands that take them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.cli.options import bundle
from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools import BUILTIN, builtin_tools

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_gptoss.mcp.tools import McpTool
    from mlx_gptoss.server.tools.toolbox import Toolbox

_mcp = click.option(
    "--mcp",
    "sources",
    multiple=True,
    metavar='FILE|URL|"COMMAND"',
    help="Tools of MCP servers: an mcp.json, a URL or a command line. May be given repeatedly.",
)


@dataclass(frozen=True)
class McpSources:
    """MCP servers for a chat. yes: tools that may change something are used without asking."""

    sources: tuple[str, ...]
    yes: bool

    def open(self, stack: ExitStack, console: Console | None) -> Sequence[McpTool]:
        """Their tools; `stack` closes them. What may change something asks at the console first; where there
        is none, it is refused. Raises ToolError.
        """
        if not self.sources:
            return ()
        from mlx_gptoss.cli.terminal.approve import approved, ask_in_terminal, refuse
        from mlx_gptoss.mcp.tools import mcp_tools

        _quiet()
        tools = stack.enter_context(mcp_tools(*self.sources))
        if self.yes:
            return tools
        return approved(tools, refuse if console is None else ask_in_terminal(console))


mcp_options = bundle(
    "servers",
    McpSources,
    _mcp,
    click.option("--yes", is_flag=True, help="Use MCP tools that may change something without asking."),
)


@dataclass(frozen=True)
class ServedOptions:
    """The tools that a server runs for its clients."""

    tools: tuple[str, ...]
    pages: Path | None
    sources: tuple[str, ...]
    remote_hosts: tuple[str, ...]
    yes: bool

    def open(self, stack: ExitStack) -> Toolbox:
        """The tools, connecting in the background; `stack` closes them. Raises ToolError."""
        from mlx_gptoss.server.tools.toolbox import Toolbox

        connections = None
        if self.sources or self.remote_hosts:
            _quiet()
            if self.sources:
                connections = _connect(self.sources)
                stack.callback(connections.close)
        makers: dict[str, Callable[[], Any]] = {name: partial(self._make, name) for name in self.tools}
        return Toolbox(makers, connections, remote_hosts=self.remote_hosts, trusting=self.yes)

    def _make(self, name: str) -> Any:
        return builtin_tools([name], folder=self.pages)[0]


def _connect(sources: Sequence[str]) -> Any:
    from mlx_gptoss.mcp.config import read_servers
    from mlx_gptoss.mcp.connection import Connections

    servers = read_servers(sources)
    if not servers:
        raise ToolError(f"{', '.join(sources)}: there are no MCP servers in it that are enabled", "mcp")
    connections = Connections(servers)
    connections.connect()
    return connections


served_options = bundle(
    "served",
    ServedOptions,
    click.option(
        "--tool",
        "tools",
        type=click.Choice(list(BUILTIN)),
        multiple=True,
        help="Run a built-in tool for clients that ask for it. May be given repeatedly.",
    ),
    click.option("--pages", type=click.Path(path_type=Path), help="Folder that the browser reads."),
    _mcp,
    click.option(
        "--mcp-remote",
        "remote_hosts",
        multiple=True,
        metavar="HOST[:PORT]",
        help="Let requests name MCP servers by a URL at this host. May be given repeatedly.",
    ),
    click.option(
        "--yes", is_flag=True, help="Let clients waive approval of MCP tools that may change something."
    ),
)


def _quiet() -> None:
    """What goes wrong with a server is told in one line of our own, without the packages' tracebacks."""
    logging.getLogger("mcp").setLevel(logging.CRITICAL)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
