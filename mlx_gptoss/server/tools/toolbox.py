"""The tools that this server runs for those who ask, and their opening for one request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from mlx_gptoss.errors import ToolError
from mlx_gptoss.harmony import Tool, ToolCall, ToolNamespace
from mlx_gptoss.mcp.config import Server, check_url, is_sse
from mlx_gptoss.mcp.connection import Connections, ListedTool
from mlx_gptoss.mcp.tools import McpTool, server_tools, without_clashes
from mlx_gptoss.server.tools.asked import Asked, McpEntry
from mlx_gptoss.tools import BuiltinTool
from mlx_gptoss.tools.call import RunnableTool

Kind = Literal["python", "browser", "mcp"]
REMOTE_TIMEOUT = 30.0  # seconds for a server that a request names


@dataclass(frozen=True)
class ServedTool(RunnableTool):
    """A tool for one request. unasked: its calls run without approval. mcp: what it is of a server."""

    kind: Kind
    unasked: bool = True
    mcp: McpTool | None = None

    @property
    def label(self) -> str:
        """The label of its MCP server."""
        return self.mcp.server if self.mcp is not None else ""

    def remote_name(self, called: str) -> str:
        """The name at its server of what a call names."""
        return self.mcp.remote_name(called) if self.mcp is not None else called


@dataclass(frozen=True)
class McpListing:
    """What a server listed for a request, or why it could not."""

    label: str
    tools: tuple[ListedTool, ...] = ()
    error: str | None = None


class ServedTools:
    """The tools of one request. `close` them after it."""

    def __init__(
        self, tools: Sequence[ServedTool], listings: Sequence[McpListing], close: Sequence[Callable[[], None]]
    ) -> None:
        self.tools = tuple(tools)
        self.listings = tuple(listings)
        self._close = close

    @property
    def declarations(self) -> list[Tool | ToolNamespace]:
        """What the model is shown."""
        return [tool.declaration for tool in self.tools]

    def find(self, name: str) -> ServedTool | None:
        """The tool of a call by its name, which for a namespace is "browser.search"."""
        root = name.split(".")[0]
        return next((t for t in self.tools if t.name == (root if t.builtin else name)), None)

    def local_name(self, label: str, remote: str) -> str:
        """The name under which the model knows a tool of a server."""
        for tool in self.tools:
            if tool.mcp is not None and tool.label == label and remote in (i.name for i in tool.mcp.listed):
                return f"{tool.name}.{remote}" if tool.builtin and remote != tool.name else tool.name
        return remote

    def close(self) -> None:
        """End what runs, and give up what was opened for the request."""
        for close in self._close:
            close()


class Toolbox:
    """What the server offers.

    builtin: name -> what makes the tool; each request has one of its own. mcp: servers by label.
    remote_hosts: HOST (at its standard port) or HOST:PORT of servers that requests may name by URL. trusting:
    whether a client may waive approval of tools that are not marked read-only.
    """

    def __init__(
        self,
        builtin: Mapping[str, Callable[[], BuiltinTool]] | None = None,
        mcp: Connections | None = None,
        *,
        remote_hosts: Sequence[str] = (),
        trusting: bool = False,
    ) -> None:
        self._makers = dict(builtin or {})
        self._namespaces: dict[str, ToolNamespace] = {}
        for name, make in self._makers.items():
            tool = make()  # what cannot work is told now
            self._namespaces[name] = tool.namespace
            tool.close()
        self._mcp = mcp
        self._remote_hosts = {host.lower() for host in remote_hosts}
        self._trusting = trusting

    @property
    def builtin(self) -> dict[str, ToolNamespace]:
        """The built-in tools by name."""
        return self._namespaces

    @property
    def offers(self) -> bool:
        """Whether there is anything to ask for."""
        return bool(self._makers or self.labels or self._remote_hosts)

    @property
    def labels(self) -> list[str]:
        """The MCP servers."""
        return self._mcp.names if self._mcp is not None else []

    def listing(self, label: str) -> McpListing:
        """What one of the servers offers; connecting may take a while."""
        assert self._mcp is not None
        try:
            return McpListing(label, tuple(self._mcp.tools(label)[0]))
        except ToolError as error:
            return McpListing(label, error=str(error))

    def open(self, asked: Sequence[Asked]) -> ServedTools:
        """The tools that a request asks for; connecting may take a while. Raises ToolError."""
        tools: list[ServedTool] = []
        listings: list[McpListing] = []
        close: list[Callable[[], None]] = []
        seen: set[str] = set()
        for one in asked:
            entry = one.entry
            name = entry if isinstance(entry, str) else f"mcp {entry.server_label}"
            if name in seen:
                raise ToolError(f"{one.where}: asked for twice: keep one", one.where)
            seen.add(name)
            if isinstance(entry, str):
                builtin = _Lazy(self._makers[entry])
                close.append(builtin.close)
                tools.append(ServedTool(self._namespaces[entry], builtin.handle, entry))  # type: ignore[arg-type]
                continue
            connections, label = self._connections(entry, one.where, close)
            try:
                found = server_tools(connections, label)
            except ToolError as error:
                listings.append(McpListing(entry.server_label, error=str(error)))
                continue
            kept = [tool for item in found if (tool := _allowed(item, entry)) is not None]
            listings.append(McpListing(entry.server_label, tuple(i for tool in kept for i in tool.listed)))
            tools += [self._served(replace(tool, server=entry.server_label), entry) for tool in kept]
        return ServedTools(_told_apart(tools), listings, close)

    def _served(self, tool: McpTool, entry: McpEntry) -> ServedTool:
        waived = all(entry.waives(item) for item in tool.listed)
        unasked = waived and (tool.read_only or self._trusting)
        return ServedTool(tool.declaration, tool.handle, "mcp", unasked, tool)

    def _connections(
        self, entry: McpEntry, where: str, close: list[Callable[[], None]]
    ) -> tuple[Connections, str]:
        """The connections that have a server, and its name there."""
        if entry.server_url is not None:
            server = self._remote(entry, where)
            connections = Connections([server], timeout=REMOTE_TIMEOUT)
            close.append(connections.close)
            return connections, server.name
        if self._mcp is None or entry.server_label not in self._mcp.names:
            known = ", ".join(self.labels) or "none: start it with --mcp FILE"
            raise ToolError(
                f"{where}.server_label is {entry.server_label[:80]!r}: this server's MCP servers are {known}",
                f"{where}.server_label",
            )
        return self._mcp, entry.server_label

    def _remote(self, entry: McpEntry, where: str) -> Server:
        """A server that a request brings. Its host has to be one that may be asked."""
        field = f"{where}.server_url"
        url = entry.server_url or ""
        try:
            check_url(url, field)
        except ToolError as error:
            raise ToolError(str(error), field) from None
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        host = f"[{host}]" if ":" in host else host
        standard = 443 if parts.scheme == "https" else 80
        port = parts.port or standard
        names = {f"{host}:{port}", host} if port == standard else {f"{host}:{port}"}
        if not names & self._remote_hosts or parts.username is not None:
            shown = min(names, key=len)[:80]
            raise ToolError(
                f"{field}: requests may not name {shown}: start the server with --mcp-remote {shown}, or "
                "name a server of its mcp.json by server_label alone",
                field,
            )
        headers = dict(entry.headers or {})
        if entry.authorization is not None:
            headers["Authorization"] = f"Bearer {entry.authorization}"
        return Server(entry.server_label, url=url, headers=headers, sse=is_sse(url))


class _Lazy:
    """A built-in tool that is made at its first call."""

    def __init__(self, make: Callable[[], BuiltinTool]) -> None:
        self._make = make
        self._tool: BuiltinTool | None = None
        self._closed = False
        self._lock = threading.Lock()

    def handle(self, call: ToolCall) -> str:
        """The result of a call. Raises ToolError after `close`."""
        with self._lock:
            if self._closed:
                raise ToolError("the request is over", "tools")
            self._tool = self._tool or self._make()
        return self._tool.handle(call)

    def close(self) -> None:
        """End it. A call that runs ends as well."""
        with self._lock:
            self._closed = True
            if self._tool is not None:
                self._tool.close()


def _allowed(tool: McpTool, entry: McpEntry) -> McpTool | None:
    """The tool, of a namespace the part that may be offered; None for nothing."""
    listed = tuple(item for item in tool.listed if entry.allows(item))
    if len(listed) == len(tool.listed):
        return tool
    if not listed or not isinstance(tool.declaration, ToolNamespace):
        return None
    names = {item.name for item in listed}
    kept = tuple(t for t in tool.declaration.tools if t.name in names)

    def handle(call: ToolCall) -> Any:
        if tool.remote_name(call.name) not in names:
            raise ToolError(f"{call.name} is not offered", "tools")
        return tool.handle(call)

    shown = replace(tool.declaration, tools=kept)
    return replace(tool, listed=listed, declaration=shown, handle=handle)


def _told_apart(tools: Sequence[ServedTool]) -> list[ServedTool]:
    """The tools under names of their own, whatever servers they come from."""
    names = iter(without_clashes([tool.mcp for tool in tools if tool.mcp is not None]))
    return [
        replace(tool, declaration=(found := next(names)).declaration, mcp=found)
        if tool.mcp is not None
        else tool
        for tool in tools
    ]
