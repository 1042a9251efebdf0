"""Calls of the server's own tools in a chat completion: `executed_tools`, a field of some other servers."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from mlx_gptoss.harmony import Message, ToolCall, ToolCallDelta
from mlx_gptoss.server.running.answer import Json
from mlx_gptoss.server.tools.toolbox import ServedTool, ServedTools

TYPES = {"python": "code_interpreter", "browser": "browser_search", "mcp": "mcp"}


class Executed:
    """The calls of one answer. Those that need approval are told like a function's, with `server_label`.

    entries: {"index", "id", "type", "name", "arguments", "output"}, of MCP servers with "server_label".
    """

    def __init__(self, served: ServedTools, approved: Set[str]) -> None:
        self.entries: list[Json] = []
        self._served = served
        self._approved = approved

    def owns(self, call: ToolCall | ToolCallDelta) -> bool:
        """Whether a call is of the server's own tools."""
        return self._served.find(call.name) is not None

    def called(self, call: ToolCall) -> Json:
        """The delta of a complete call."""
        tool = self._served.find(call.name)
        assert tool is not None
        if not tool.unasked and call.call_id not in self._approved:
            function = {"name": call.name, "arguments": call.arguments}
            asked = {"index": call.index, "id": call.call_id, "type": "function", "function": function}
            return {"tool_calls": [asked | _label(tool)]}
        entry = {
            "index": len(self.entries),
            "id": call.call_id,
            "type": TYPES[tool.kind],
            **_label(tool),
            "name": call.name,
            "arguments": call.arguments,
            "output": None,
        }
        self.entries.append(entry)
        return {"executed_tools": [dict(entry)]}

    def ended(self, result: Message) -> Json | None:
        """The delta of a result."""
        for entry in self.entries:
            if entry["id"] == result.call_id:
                entry["output"] = result.content
                return {"executed_tools": [{key: entry[key] for key in ("index", "id", "output")}]}
        return None


def _label(tool: ServedTool) -> dict[str, Any]:
    return {"server_label": tool.label} if tool.mcp is not None else {}
