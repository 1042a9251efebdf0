"""The request of /v1/messages (Anthropic's API), and its translation to a turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.grammar import ResponseFormat, ToolChoice
from mlx_gptoss.harmony import Conversation, ReasoningEffort
from mlx_gptoss.server.settings import ServerSettings
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.conversation import AssistantTurn, Call, ConversationBuilder
from mlx_gptoss.server.translate.options import (
    Declaration,
    check_message_count,
    effort_of,
    offered_tools,
    schema_format,
)
from mlx_gptoss.server.translate.request import RequestModel, TurnRequest
from mlx_gptoss.server.translate.sampling_fields import SamplingFields, bounded, sampling_params

SCHEMA_FIELD = "output_config.format.schema"


class TextPart(RequestModel):
    """A block where only text makes sense; not recursive, so that the OpenAPI document is not either."""

    type: str
    text: str | None = None


class Block(RequestModel):
    """A content block of any type; `type` says which of the fields count."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[TextPart] | None = None
    is_error: bool | None = None


class AnthropicMessage(RequestModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


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
    type: str
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class OutputConfig(RequestModel):
    effort: str | None = None
    format: OutputFormat | None = None


class CountTokensRequest(RequestModel):
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    model: str | None = None
    system: str | list[TextPart] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest, SamplingFields):
    max_tokens: int = bounded("max_tokens")
    stream: bool | None = None
    stop_sequences: list[str] | None = None


def shows_thinking(request: CountTokensRequest) -> bool:
    """Thinking blocks are answered only where the caller asked for thinking, as Anthropic's API does."""
    thinking = request.thinking
    return thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"


def translate(request: MessagesRequest, state: ServerState) -> TurnRequest:
    """The turn that is asked for. Raises RequestError naming the field at fault."""
    conversation, choice, names = read_conversation(request, state)
    names |= {"stop": "stop_sequences"}
    params = sampling_params(request, names, max_tokens=request.max_tokens, stop=request.stop_sequences)
    options = TurnOptions(
        params,
        ResponseFormat.of(schema=conversation.response_schema),
        choice,
        strict_tools=False,
        reasoning_budget=request.thinking.budget_tokens if request.thinking else None,
    )
    return TurnRequest(conversation, options, names)


def read_conversation(
    request: CountTokensRequest, state: ServerState
) -> tuple[Conversation, ToolChoice, dict[str, str]]:
    """The conversation, the choice of tools, and the names of what the model may find wrong.

    Raises RequestError naming the field at fault.
    """
    check_message_count(request.messages, state.settings)
    if request.messages[-1].role == "assistant":
        raise RequestError(
            "the last message is the assistant's: gpt-oss cannot go on from it; end with a user message",
            "messages",
        )
    builder = ConversationBuilder(state.turns.recall)
    builder.instructions(_text(request.system or "", "system"))
    for index, message in enumerate(request.messages):
        where = f"messages[{index}].content"
        if message.role == "system":
            builder.instructions(_text(message.content, where))
        elif message.role == "user":
            _add_user(builder, message.content, where)
        else:
            _add_assistant(builder, message.content, where)
    declared = [_declaration(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())]
    tools, choice, names = offered_tools(declared, _tool_choice(request.tool_choice), state.settings)
    conversation = builder.build(
        today=state.today(),
        tools=tools,
        effort=_effort(request),
        response_format=_response_format(request, state.settings),
    )
    return conversation, choice, {"schema": SCHEMA_FIELD, **names}


def _text(content: str | Sequence[TextPart | Block], where: str) -> str:
    """The text of blocks that may only be text."""
    if isinstance(content, str):
        return content
    return "\n".join(_block_text(block, f"{where}[{index}]") for index, block in enumerate(content))


def _block_text(block: TextPart | Block, where: str) -> str:
    if block.type != "text":
        raise RequestError(
            f"{where} is of type {block.type[:40]!r}: gpt-oss reads text only", f"{where}.type"
        )
    if block.text is None:
        raise RequestError(f"{where} has no text", f"{where}.text")
    return block.text


def _add_user(builder: ConversationBuilder, content: str | list[Block], where: str) -> None:
    if isinstance(content, str):
        builder.user(content)
        return
    texts: list[str] = []
    for index, block in enumerate(content):
        here = f"{where}[{index}]"
        if block.type == "tool_result":
            output = _text(block.content or "", f"{here}.content")
            builder.tool_result(
                block.tool_use_id, f"Error: {output}" if block.is_error else output, f"{here}.tool_use_id"
            )
        else:
            texts.append(_block_text(block, here))
    if texts:
        builder.user("\n".join(texts))


def _add_assistant(builder: ConversationBuilder, content: str | list[Block], where: str) -> None:
    if isinstance(content, str):
        builder.assistant(AssistantTurn(text=content))
        return
    turn = AssistantTurn()
    for index, block in enumerate(content):
        if block.type == "thinking":
            turn.reasoning += block.thinking or ""
        elif block.type == "tool_use":
            if not block.id or not block.name:
                raise ToolError(f"{where}[{index}]: a tool_use needs an id and a name", f"{where}[{index}]")
            arguments = json.dumps(block.input or {}, ensure_ascii=False, separators=(",", ":"))
            turn.calls.append(Call(block.id, block.name, arguments))
        elif block.type != "redacted_thinking":
            turn.text += _block_text(block, f"{where}[{index}]")
    builder.assistant(turn)


def _declaration(tool: AnthropicTool, where: str) -> Declaration | None:
    """A function tool; Anthropic's own server tools are accepted and not offered."""
    if tool.type not in (None, "custom"):
        return None
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return Declaration(function, where, f"{where}.input_schema")


def _tool_choice(wanted: AnthropicToolChoice | None) -> str | dict[str, Any] | None:
    """The choice in OpenAI's words."""
    if wanted is None:
        return None
    named = {"type": "function", "name": wanted.name}
    return {"auto": "auto", "any": "required", "none": "none"}.get(wanted.type, named)


def _response_format(request: CountTokensRequest, settings: ServerSettings) -> ResponseFormat | None:
    wanted = request.output_config.format if request.output_config else None
    if wanted is None:
        return None
    if wanted.type != "json_schema" or wanted.schema_ is None:
        raise RequestError(
            "output_config.format: expected type json_schema with a schema", "output_config.format"
        )
    return schema_format(wanted.schema_, settings, SCHEMA_FIELD)


def _effort(request: CountTokensRequest) -> ReasoningEffort:
    if request.output_config and request.output_config.effort:
        return effort_of(request.output_config.effort, "output_config.effort")
    if request.thinking is None or request.thinking.type == "adaptive":
        return "medium"
    budget = request.thinking.budget_tokens or 0
    if request.thinking.type == "disabled" or budget < 2048:
        return "low"
    return "medium" if budget < 16384 else "high"
