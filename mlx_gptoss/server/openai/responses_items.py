"""Items of a response's input, and what those of the server's own tools mean in a conversation."""

from __future__ import annotations

from pydantic import ConfigDict

from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.server.tools.toolbox import ServedTools
from mlx_gptoss.server.translate.conversation import Call
from mlx_gptoss.server.translate.request import ContentPart, Items, RequestModel, text_of
from mlx_gptoss.server.translate.turn import TurnBuilder

APPROVAL, MCP_CALL = "mcpr_", "mcp_"  # before the id of the call
# Items of tools that the server ran. What the built-in ones gave was for the reasoning, which is over.
HOSTED = (
    *("mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response"),
    *("code_interpreter_call", "web_search_call"),
)


class InputPart(ContentPart):
    """A part of an item's content; what it has besides is listed again."""

    model_config = ConfigDict(extra="allow")


InputContent = str | Items[InputPart]


class InputItem(RequestModel):
    """One item of any type; `type` says which of the fields count. The others are only listed again."""

    model_config = ConfigDict(extra="allow")

    type: str = "message"
    id: str | None = None
    role: str | None = None
    content: InputContent | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: InputContent | None = None
    encrypted_content: str | None = None
    status: str | None = None
    server_label: str | None = None
    approval_request_id: str | None = None
    approve: bool | None = None
    reason: str | None = None


def call_id_of(item_id: str) -> str:
    """The id of the call that an item of an MCP server is about; items are named after it."""
    return item_id.removeprefix(APPROVAL).removeprefix(MCP_CALL)


class HostedItems:
    """Adds the items of MCP servers to a turn. served: the tools that the request asks for again."""

    def __init__(self, builder: TurnBuilder, served: ServedTools | None) -> None:
        self._builder = builder
        self._served = served

    def call(self, item: InputItem, where: str) -> Call:
        """A call that the server ran, or for which it asked for approval."""
        if not item.name or not item.server_label or item.arguments is None or not item.id:
            raise ToolError(f"{where}: an {item.type} needs id, server_label, name and arguments", where)
        name = item.name
        if self._served is not None:
            name = self._served.local_name(item.server_label, item.name)
        return Call(item.call_id or call_id_of(item.id), name, item.arguments)

    def result(self, call: Call, item: InputItem, where: str) -> None:
        """What a call gave, perhaps one that was approved before."""
        self._builder.approved.discard(call.call_id)
        output = text_of(item.output, f"{where}.output")
        self._builder.tool_result(call.call_id, output or "error: it failed", f"{where}.id")

    def approval(self, item: InputItem, where: str) -> None:
        """What the person said to an approval request, in this input or in the response gone on from."""
        field = f"{where}.approval_request_id"
        call_id = call_id_of(item.approval_request_id or "")
        if item.approve is None:
            raise RequestError(f"{where}.approve is missing: expected true or false", f"{where}.approve")
        if not item.approve:
            why = f": {item.reason}" if item.reason else ""
            self._builder.tool_result(call_id, f"error: the user did not allow this call{why}", field)
            return
        name = self._builder.open_call(call_id, field)
        if self._served is None or self._served.find(name) is None:
            raise ToolError(
                f"{field}: the call is of {name!r}, which no entry of tools offers: send the same tools with "
                "the approval",
                "tools",
            )
        self._builder.approved.add(call_id)
