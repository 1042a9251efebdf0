"""The request of /v1/messages (Anthropic's API), and its translation to a turn."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.harmony import ReasoningEffort
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.conversation import AssistantTurn, Call
from mlx_gptoss.server.translate.options import EFFORTS, Effort, at_most
from mlx_gptoss.server.translate.request import ContentPart, Items, RequestModel, part_text, text_of
from mlx_gptoss.server.translate.sampling_fields import SamplingFields, bounded, sampling_params
from mlx_gptoss.server.translate.turn import Declaration, TurnBuilder, TurnRequest


class Block(ContentPart):
    """A content block of any type; `type` says which of the fields count."""

    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Items[ContentPart] | None = None
    is_error: bool | None = None


class AnthropicMessage(RequestModel):
    role: Literal["user", "assistant", "system"]
    content: str | Items[Block]


class AnthropicTool(RequestModel):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class AnthropicToolChoice(RequestModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class Thinking(RequestModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    display: str | None = None


class OutputFormat(RequestModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class OutputConfig(RequestModel):
    effort: Effort | None = None
    format: OutputFormat | None = None


class CountTokensRequest(RequestModel):
    messages: Annotated[Items[AnthropicMessage], Field(min_length=1)]
    model: str | None = None
    system: str | Items[ContentPart] | None = None
    tools: Items[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the older name of output_config.format
    mcp_servers: Items[Any] | None = None
    thread: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest, SamplingFields):
    max_tokens: int = bounded("max_tokens")
    stream: bool | None = None
    stop_sequences: Items[str] | None = None


def shows_thinking(request: CountTokensRequest) -> bool:
    """Thinking blocks are answered only where the caller asked for thinking, as Anthropic's API does."""
    thinking = request.thinking
    return thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"


def translate(request: MessagesRequest, state: ServerState, caller: str) -> TurnRequest:
    """The turn that is asked for. Raises RequestError naming the field at fault."""
    builder = read(request, state, caller)
    names = {"stop": "stop_sequences"}
    params = sampling_params(request, names, max_tokens=request.max_tokens, stop=request.stop_sequences)
    budget = request.thinking.budget_tokens if request.thinking else None
    return builder.build(params, names, reasoning_budget=budget)


def read(request: CountTokensRequest, state: ServerState, caller: str) -> TurnBuilder:
    """All of a request that its prompt shows. Raises RequestError naming the field at fault."""
    _refuse_thread(request)
    if request.mcp_servers:
        raise RequestError(
            "mcp_servers is not supported: this server connects to none for a request; declare their tools "
            "as your own",
            "mcp_servers",
        )
    if request.messages[-1].role == "assistant":
        raise RequestError(
            "the last message is the assistant's: gpt-oss cannot go on from it; end with a user message",
            "messages",
        )
    builder = state.new_turn(caller)
    builder.model = request.model
    at_most(state.settings.max_messages, len(request.messages), "entries", "messages")
    builder.instructions(text_of(request.system, "system"))
    for index, message in enumerate(request.messages):
        _add_message(builder, message, f"messages[{index}].content")
    builder.tools(request.tools, _declaration, _tool_choice(request.tool_choice))
    if request.output_config and (wanted := request.output_config.format):
        builder.answer_format(wanted.type, "output_config.format", wanted.schema_)
    elif wanted := request.output_format:
        builder.answer_format(wanted.type, "output_format", wanted.schema_)
    builder.effort = _effort(request)
    return builder


def _refuse_thread(request: CountTokensRequest) -> None:
    """Refuse a conversation to be kept here, in the words upon which Anthropic's SDKs send all of it."""
    if request.thread is not None:
        raise ApiError(
            400,
            "thread is not supported: send the whole conversation in messages",
            code="thread_unsupported_request",
            param="thread",
            details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
        )


def _add_message(builder: TurnBuilder, message: AnthropicMessage, where: str) -> None:
    given = message.content
    blocks = [Block(type="text", text=given)] if isinstance(given, str) else given
    turn, texts = AssistantTurn(), []
    for index, block in enumerate(blocks):
        here = f"{where}[{index}]"
        match message.role, block.type:
            case "user", "tool_result":
                output = text_of(block.content, f"{here}.content")
                output = f"Error: {output}" if block.is_error else output
                builder.tool_result(block.tool_use_id, output, f"{here}.tool_use_id")
            case "assistant", "thinking":
                turn.reasoning += block.thinking or ""
            case "assistant", "redacted_thinking":
                pass
            case "assistant", "tool_use":
                if not block.id or not block.name:
                    raise ToolError(f"{here}: a tool_use needs an id and a name", here)
                arguments = json.dumps(block.input or {}, ensure_ascii=False, separators=(",", ":"))
                turn.calls.append(Call(block.id, block.name, arguments))
            case _:
                texts.append(part_text(block, here))
    if message.role == "assistant":
        turn.text = "".join(texts)
        builder.assistant(turn)
    elif texts:
        add = builder.user if message.role == "user" else builder.instructions
        add("\n".join(texts))


def _declaration(tool: AnthropicTool, where: str) -> Declaration | None:
    """A function tool; Anthropic's own server tools are accepted and not offered."""
    if tool.type not in (None, "custom"):
        return None
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return function, where, f"{where}.input_schema"


def _tool_choice(wanted: AnthropicToolChoice | None) -> str | dict[str, Any] | None:
    """The choice in OpenAI's words."""
    if wanted is None:
        return None
    named = {"type": "function", "name": wanted.name}
    return {"auto": "auto", "any": "required", "none": "none"}.get(wanted.type, named)


def _effort(request: CountTokensRequest) -> ReasoningEffort:
    if request.output_config and request.output_config.effort:
        return EFFORTS[request.output_config.effort]
    if request.thinking is None or request.thinking.type == "adaptive":
        return "medium"
    budget = request.thinking.budget_tokens or 0
    if request.thinking.type == "disabled" or budget < 2048:
        return "low"
    return "medium" if budget < 16384 else "high"
