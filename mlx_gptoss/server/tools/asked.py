"""What a request asks of the server's own tools: entries of its `tools`, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from mlx_gptoss.errors import ToolError
from mlx_gptoss.mcp.connection import ListedTool
from mlx_gptoss.server.translate.request import Items, RequestModel, Table

# Types that mean a built-in tool, in the words of OpenAI's Responses API and of others' chat completions.
BUILTIN_TYPES = {
    "code_interpreter": "python",
    "web_search": "browser",
    "web_search_preview": "browser",
    "browser_search": "browser",
}


class ToolFilter(RequestModel):
    """Tools by name, or by whether they change anything."""

    tool_names: Items[str] | None = None
    read_only: bool | None = None

    def matches(self, tool: ListedTool) -> bool:
        """Whether the filter means a tool."""
        named = self.tool_names is None or tool.name in self.tool_names
        return named and (self.read_only is None or tool.read_only == self.read_only)


class ApprovalFilter(RequestModel):
    """Which tools want approval. What is in neither wants it."""

    always: ToolFilter | None = None
    never: ToolFilter | None = None


class McpEntry(RequestModel):
    """A server whose tools are asked for. authorization: an OAuth token for a server given by its URL."""

    type: Literal["mcp"]
    server_label: str
    server_url: str | None = None
    connector_id: str | None = None
    tunnel_id: str | None = None
    authorization: str | None = None
    headers: Table[str] | None = None
    allowed_tools: Items[str] | ToolFilter | None = None
    require_approval: Literal["always", "never"] | ApprovalFilter | None = None

    def allows(self, tool: ListedTool) -> bool:
        """Whether a tool may be offered."""
        if isinstance(self.allowed_tools, list):
            return tool.name in self.allowed_tools
        return self.allowed_tools is None or self.allowed_tools.matches(tool)

    def waives(self, tool: ListedTool) -> bool:
        """Whether the client wants a tool to run without its approval."""
        wanted = self.require_approval
        if isinstance(wanted, ApprovalFilter):
            held = wanted.always is not None and wanted.always.matches(tool)
            return not held and wanted.never is not None and wanted.never.matches(tool)
        return wanted == "never"


@dataclass(frozen=True)
class Asked:
    """An entry and its place in the request. entry: the name of a built-in tool, or an MCP server."""

    where: str
    entry: str | McpEntry


Entries: TypeAlias = Sequence[Mapping[str, Any]]


def read_entries(entries: Entries) -> list[Asked]:
    """The entries that ask for tools of the server; others are left to the API. Raises ToolError."""
    asked = []
    for index, entry in enumerate(entries):
        where, kind = f"tools[{index}]", entry.get("type")
        if kind == "mcp":
            asked.append(Asked(where, _mcp(entry, where)))
        elif isinstance(kind, str) and kind in BUILTIN_TYPES:
            asked.append(Asked(where, BUILTIN_TYPES[kind]))
    return asked


def _mcp(entry: Mapping[str, Any], where: str) -> McpEntry:
    try:
        read = McpEntry.model_validate(entry)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        steps = [str(step) for step in problem["loc"] if isinstance(step, str) and step in entry]
        field = ".".join([where, *(steps or [str(problem["loc"][0])])])
        raise ToolError(f"{field}: {problem['msg']}", field) from None
    for name in ("connector_id", "tunnel_id"):
        if getattr(read, name) is not None:
            raise ToolError(
                f"{where}.{name}: there are no connectors or tunnels here: name a server of this machine's "
                "mcp.json by its server_label",
                f"{where}.{name}",
            )
    return read
