"""The request of /api/chat (Ollama's API), and its translation to a turn."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from mlx_gptoss.errors import ToolError
from mlx_gptoss.server.ollama.request import NAMES, GenerationRequest, refuse_images
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.conversation import AssistantTurn, Call
from mlx_gptoss.server.translate.options import at_most
from mlx_gptoss.server.translate.request import Items, RequestModel
from mlx_gptoss.server.translate.turn import Declaration, TurnBuilder, TurnRequest


class CalledFunction(RequestModel):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class OllamaCall(RequestModel):
    id: str | None = None
    function: CalledFunction


class OllamaMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: Items[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Function(RequestModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class OllamaTool(RequestModel):
    type: Literal["function"] = "function"
    function: Function


class ChatRequest(GenerationRequest):
    messages: Items[OllamaMessage] = Field(default_factory=list)
    tools: Items[OllamaTool] | None = None


def translate(request: ChatRequest, state: ServerState, caller: str) -> TurnRequest:
    """The turn that is asked for. Raises RequestError naming the field at fault."""
    builder = state.new_turn(caller)
    builder.model = request.model
    at_most(state.settings.max_messages, len(request.messages), "entries", "messages")
    calls: dict[str, str] = {}  # those that wait for their result, id -> name
    for index, message in enumerate(request.messages):
        _add_message(builder, message, f"messages[{index}]", calls)
    builder.tools(request.tools, _declaration, None)
    request.shape(builder)
    return builder.build(request.params(), NAMES)


def _add_message(builder: TurnBuilder, message: OllamaMessage, where: str, calls: dict[str, str]) -> None:
    refuse_images(message.images, f"{where}.images")
    text = message.content or ""
    if message.role in ("system", "developer"):
        builder.instructions(text)
    elif message.role == "user":
        builder.user(text)
    elif message.role == "tool":
        builder.tool_result(_answered(message, calls, where), text, where)
    else:
        made = [
            Call(call.id or f"{where}.{number}", call.function.name, _text(call.function.arguments))
            for number, call in enumerate(message.tool_calls or ())
        ]
        calls.update({call.call_id: call.name for call in made})
        builder.assistant(AssistantTurn(message.thinking or "", text=text, calls=made))


def _answered(message: OllamaMessage, calls: dict[str, str], where: str) -> str:
    """The id of the call whose result a message has: the one it names, else the first that waits."""
    if message.tool_call_id is not None:
        calls.pop(message.tool_call_id, None)
        return message.tool_call_id
    fitting = (i for i, name in calls.items() if message.tool_name in (None, name))
    found = next(fitting, None)
    if found is None:
        raise ToolError(
            f"{where} is the result of no earlier call: send the assistant's message with its tool_calls "
            "before it",
            where,
        )
    del calls[found]
    return found


def _text(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))


def _declaration(tool: OllamaTool, where: str) -> Declaration:
    return tool.function.model_dump(), f"{where}.function", f"{where}.function.parameters"
