"""Calls of the server's own tools as output items of the Responses API, and what its stream says of them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from mlx_gptoss.harmony import Message, ToolCall
from mlx_gptoss.server.openai.responses_items import APPROVAL, MCP_CALL
from mlx_gptoss.server.running.answer import Json
from mlx_gptoss.server.tools.toolbox import McpListing, ServedTool

# An event's type without "response.", and what it tells besides the item's place.
Said = tuple[str, Json]


def list_item(listing: McpListing) -> Json:
    """What a server listed."""
    tools = [
        {
            "name": tool.name,
            "description": tool.description,
            "input_schema": tool.schema,
            "annotations": {"read_only": tool.read_only},
        }
        for tool in listing.tools
    ]
    name = {"id": f"mcpl_{secrets.token_hex(16)}", "type": "mcp_list_tools", "server_label": listing.label}
    return name | {"tools": tools, "error": listing.error}


class HostedCall:
    """One call, from its first word to its result. `item` is there once its kind is known.

    asks: it needs approval, and nothing is run. approved: it had to be asked for before.
    """

    def __init__(self, tool: ServedTool, call_id: str, name: str, *, asks: bool, approved: bool) -> None:
        self.asks = asks
        self._kind = tool.kind
        server = {"server_label": tool.label, "name": tool.remote_name(name), "arguments": ""}
        self.item: Json
        if asks:
            self.item = {"id": APPROVAL + call_id, "type": "mcp_approval_request", **server}
        elif tool.kind == "mcp":
            request = APPROVAL + call_id if approved else None
            self.item = {"id": MCP_CALL + call_id, "type": "mcp_call", **server}
            self.item |= {"approval_request_id": request, "output": None, "error": None}
        elif tool.kind == "python":
            self.item = {"id": f"ci_{call_id}", "type": "code_interpreter_call"}
            self.item |= {"code": "", "container_id": "local", "outputs": None}
        else:
            self.item = {"id": f"ws_{call_id}", "type": "web_search_call"}

    @property
    def waits(self) -> bool:
        """Whether the item is told when its call is complete, because what it says comes last."""
        return self.asks or self._kind == "browser"

    def begin(self) -> Iterator[Said]:
        """After the item was told."""
        if not self.asks:
            yield f"{self.item['type']}.in_progress", {}

    def more(self, text: str) -> Iterator[Said]:
        """More of the arguments."""
        if not self.waits:
            kind = "code_interpreter_call_code" if self._kind == "python" else "mcp_call_arguments"
            yield f"{kind}.delta", {"delta": text}

    def complete(self, call: ToolCall) -> None:
        """The call is complete."""
        if self._kind == "python":
            self.item["code"] = call.arguments
        elif self._kind == "browser":
            self.item["action"] = _action(call)
        else:
            self.item["arguments"] = call.arguments

    def run(self) -> Iterator[Said]:
        """It is run now."""
        if self._kind == "python":
            yield "code_interpreter_call_code.done", {"code": self.item["code"]}
            yield "code_interpreter_call.interpreting", {}
        elif self._kind == "browser":
            yield "web_search_call.searching", {}
        elif not self.asks:
            yield "mcp_call_arguments.done", {"arguments": self.item["arguments"]}

    def end(self, result: Message) -> tuple[str, Iterator[Said]]:
        """The item's status, and what is said of the result."""
        text = result.content
        failed = self._kind == "mcp" and text.startswith("error: ")
        if self._kind == "python":
            self.item["outputs"] = [{"type": "logs", "logs": text}]
        elif self._kind == "mcp":
            self.item["output"] = text
            if failed:
                content = [{"type": "text", "text": text.removeprefix("error: ")}]
                self.item["error"] = {"type": "mcp_tool_execution_error", "content": content}
        status = "failed" if failed else "completed"
        return status, iter([(f"{self.item['type']}.{status}", {})])


def _action(call: ToolCall) -> Json:
    """What the browser is asked to do."""
    try:
        arguments: Any = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    given = arguments if isinstance(arguments, dict) else {}
    match call.name.rsplit(".", 1)[-1]:
        case "open":
            target = given.get("id")
            return {"type": "open_page", "url": target if isinstance(target, str) else None}
        case "find":
            return {"type": "find_in_page", "pattern": str(given.get("pattern", "")), "url": ""}
    query = str(given.get("query", ""))
    return {"type": "search", "query": query, "queries": [query]}
