"""The tools of MCP servers as runnable tools, under names that a call can be told by."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.harmony import BROWSER, PYTHON, Tool, ToolCall, ToolNamespace
from mlx_gptoss.harmony.schema import without_refused
from mlx_gptoss.mcp.config import NAMESPACES, Source, read_servers
from mlx_gptoss.mcp.connection import Connections, ListedTool, logger
from mlx_gptoss.mcp.results import one_line
from mlx_gptoss.tools.call import RunnableTool

MAX_NAME = 64  # characters
MAX_SCHEMA = 64 * 1024  # characters of a tool's schema
_SHAPES = {"$ref", "anyOf", "oneOf", "allOf", "patternProperties"}  # that may bring properties along
_TAUGHT = {PYTHON.name: PYTHON, BROWSER.name: BROWSER}


@dataclass(frozen=True)
class McpTool(RunnableTool):
    """A tool of a server, or the namespace that a server called `python` or `browser` speaks for.

    listed: as the server lists it; of a namespace, all its tools.
    """

    server: str
    listed: tuple[ListedTool, ...]

    @property
    def read_only(self) -> bool:
        """Whether the server says that calls change nothing."""
        return all(tool.read_only for tool in self.listed)

    def remote_name(self, called: str) -> str:
        """What the server calls the tool that a call names."""
        return called.rsplit(".", 1)[-1] if self.builtin else self.listed[0].name


class McpTools(Sequence[McpTool]):
    """The tools of all servers that could be reached, and the connections to them.

    failed: server -> why its tools are not there. Use it in a `with` statement, or `close` it; it closes
    itself when neither it nor any of its tools is in use any more, and at the end of the program.
    """

    def __init__(self, tools: Sequence[McpTool], failed: dict[str, str], connections: Connections) -> None:
        self.failed = failed
        self._tools = tuple(tools)
        self._connections = connections

    @overload
    def __getitem__(self, index: int) -> McpTool: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[McpTool]: ...

    def __getitem__(self, index: int | slice) -> McpTool | Sequence[McpTool]:
        return self._tools[index]

    def __len__(self) -> int:
        return len(self._tools)

    def __repr__(self) -> str:
        return f"McpTools({', '.join(tool.name for tool in self)})"

    def close(self) -> None:
        """End the connections and the servers that were started. Safe to call again."""
        self._connections.close()

    def __enter__(self) -> McpTools:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def mcp_tools(*sources: Source, timeout: float = 60.0) -> McpTools:
    """The tools of MCP servers, to be given to a chat: `llm.chat(tools=[*mcp_tools("mcp.json")])`.

    sources: an mcp.json (its path or its content), a URL, a command line, or an MCPServer in this process.
    timeout: seconds in which a server has to connect, and to answer a call. A server that is not there is
    left out with a warning; a call that fails tells the model so in one line.

    Raises ToolError for a source that makes no sense, and when the `mcp` package is missing.
    """
    if not sources:
        raise ToolError("there are no MCP servers: give an mcp.json, a URL or a command", "mcp")
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0:
        raise RequestError(f"timeout is {timeout!r}: expected seconds above 0", "timeout")
    connections = Connections(read_servers(sources), timeout=timeout)
    try:
        connections.connect()
        failed: dict[str, str] = {}
        offered: list[McpTool] = []
        for name in connections.names:
            try:
                offered += server_tools(connections, name)
            except ToolError as error:
                failed[name] = str(error)
        return McpTools(without_clashes(offered), failed, connections)
    except BaseException:
        connections.close()
        raise


def server_tools(connections: Connections, name: str) -> list[McpTool]:
    """The tools of one server, connected if need be; those that cannot be shown are left out with a warning.

    Raises ToolError when it is not there.
    """
    listed, instructions = connections.tools(name)
    shown: list[tuple[ListedTool, Tool]] = []
    for tool in listed:
        try:
            shown.append((tool, _declaration(tool)))
        except RequestError as error:
            logger.warning("MCP server %s: %s is left out: %s", name, one_line(tool.name), one_line(error))
    if name in NAMESPACES:
        return [_namespace(connections, name, instructions, shown)] if shown else []

    def handle_of(tool: ListedTool) -> Any:
        return lambda call: connections.call(name, tool.name, _arguments(call))

    return [McpTool(declared, handle_of(tool), name, (tool,)) for tool, declared in shown]


def without_clashes(tools: Sequence[McpTool]) -> list[McpTool]:
    """The tools under names of their own: where two are called the same, the server's name goes before."""
    counts = Counter(tool.name for tool in tools)
    taken = {name for name, count in counts.items() if count == 1}
    result = []
    for tool in tools:
        if counts[tool.name] > 1:
            long = _name(f"{tool.server}__{tool.name}")
            tries = (long, *(f"{long[: MAX_NAME - 5]}_{n}" for n in range(2, len(tools) + 2)))
            name = next(name for name in tries if name not in taken)
            taken.add(name)
            tool = replace(tool, declaration=replace(tool.declaration, name=name))
        result.append(tool)
    return result


def _declaration(tool: ListedTool) -> Tool:
    """A tool as the model is shown it. Raises RequestError."""
    if len(json.dumps(tool.schema)) > MAX_SCHEMA:
        raise ToolError(f"its schema has more than {MAX_SCHEMA:,} characters", "mcp")
    schema = without_refused(tool.schema)
    if schema.get("type", "object") != "object":
        raise ToolError(f"its arguments are of type {schema['type']!r}: expected an object", "mcp")
    none = not schema.get("properties") and not _SHAPES & schema.keys()
    return Tool(_name(tool.name), tool.description, None if none else schema, strict=False)


def _name(text: str) -> str:
    """A name as functions have it: letters, digits, _ and -."""
    return re.sub(r"[^\w-]", "_", text, flags=re.ASCII)[:MAX_NAME]


def _namespace(
    connections: Connections, name: str, instructions: str, shown: Sequence[tuple[ListedTool, Tool]]
) -> McpTool:
    """The tools as one namespace of built-in ones.

    A tool that is called like the namespace takes the whole message, python's code, as its only argument.
    """
    tools = tuple(declared for _, declared in shown if declared.name != name)
    by_name = {declared.name: tool for tool, declared in shown}

    def handle(call: ToolCall) -> str:
        wanted = call.name.rsplit(".", 1)[-1]
        if wanted not in by_name:
            raise ToolError(f"{call.name} is not a tool of {name}: it has {', '.join(by_name)}", "name")
        tool = by_name[wanted]
        if wanted == name:
            argument = next(iter(tool.schema.get("properties") or ("code",)))
            return connections.call(name, tool.name, {argument: call.arguments})
        return connections.call(name, tool.name, _arguments(call))

    text = instructions or _TAUGHT[name].description
    return McpTool(ToolNamespace(name, text, tools), handle, name, tuple(tool for tool, _ in shown))


def _arguments(call: ToolCall) -> dict[str, Any]:
    try:
        value = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        raise ToolError("the arguments are not JSON", "arguments") from None
    if not isinstance(value, dict):
        raise ToolError("the arguments are not a JSON object", "arguments")
    return value
