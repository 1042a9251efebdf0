"""The request of /v1/messages (Anthropic's API), and its translation to a harmony conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_gptoss.errors import RequestError, SchemaError, ToolError
from mlx_gptoss.grammar import ToolChoice
from mlx_gptoss.harmony import Conversation, Tool
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.memory.turns import AssistantTurn, Call
from mlx_gptoss.server.openai.chat_request import Protocol, Temperature, TopP, naming, tool_fields
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.options import (
    ConversationBuilder,
    Effort,
    check_schema_size,
    check_tool_count,
    choose_tools,
    effort_of,
    function_tool,
    sampling_params,
    stop_texts,
)

SCHEMA_FIELD = "output_config.format.schema"


class TextPart(Protocol):
    """A block where only text makes sense; not recursive, so that the OpenAPI document is not either."""

    type: str
    text: str | None = None


class Block(Protocol):
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


class AnthropicMessage(Protocol):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Protocol):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class AnthropicToolChoice(Protocol):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class Thinking(Protocol):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    display: str | None = None


class OutputFormat(Protocol):
    type: str
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class OutputConfig(Protocol):
    effort: str | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Protocol):
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    model: str | None = None
    system: str | list[TextPart] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=1, le=2**31)]
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    stop_sequences: list[str] | None = None

    def params(self) -> SamplingParams:
        """How to sample. Raises RequestError naming the field."""
        with naming({"stop": "stop_sequences"}):
            return sampling_params(
                {
                    "max_tokens": self.max_tokens,
                    "temperature": self.temperature,
                    "top_p": self.top_p,
                    "top_k": self.top_k,
                    "stop": stop_texts(self.stop_sequences),
                }
            )

    def fields(self, offered: Sequence[Tool]) -> dict[str, str]:
        """This API's names of what the engine may find wrong; `offered` are the tools that it gets."""
        declared = [tool.name if tool.type in (None, "custom") else None for tool in self.tools or ()]
        return {"schema": SCHEMA_FIELD, **tool_fields(offered, declared, "input_schema")}


def shows_thinking(request: CountTokensRequest) -> bool:
    """Thinking blocks are answered only where the caller asked for thinking, as Anthropic's API does."""
    thinking = request.thinking
    return thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"


def conversation_of(request: CountTokensRequest, state: ServerState) -> tuple[Conversation, ToolChoice]:
    """Translate a request. Raises RequestError naming the field at fault."""
    settings = state.settings
    if len(request.messages) > settings.max_messages:
        raise RequestError(
            f"messages has {len(request.messages):,} entries and this server takes {settings.max_messages:,}",
            "messages",
        )
    if request.messages[-1].role == "assistant":
        raise RequestError(
            "the last message is the assistant's: gpt-oss cannot go on from it; end with a user message",
            "messages",
        )
    builder = ConversationBuilder(state.turns)
    builder.instructions(_text(request.system or "", "system"))
    for index, message in enumerate(request.messages):
        where = f"messages[{index}].content"
        if message.role == "system":
            builder.instructions(_text(message.content, where))
        elif message.role == "user":
            _add_user(builder, message.content, where)
        else:
            _add_assistant(builder, message.content, where)
    tools, choice = _tools(request, state)
    schema = _schema(request, state)
    conversation = builder.build(tools=tools, effort=_effort(request), schema=schema, today=state.today())
    return conversation, choice


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
    if turn.calls:
        turn.preamble, turn.text = turn.text, ""
    builder.assistant(turn)


def _tools(request: CountTokensRequest, state: ServerState) -> tuple[list[Tool], ToolChoice]:
    """The function tools (Anthropic's own server tools are accepted and not offered), and the choice."""
    declared = request.tools or []
    check_tool_count(len(declared), state.settings)
    tools = []
    for index, tool in enumerate(declared):
        if tool.type in (None, "custom"):
            function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
            try:
                tools.append(function_tool(function, state.settings, f"tools[{index}]"))
            except SchemaError as error:
                error.field = f"tools[{index}].input_schema"
                raise
    choice: str | dict[str, Any] | None = None
    if request.tool_choice is not None:
        wanted = request.tool_choice
        named = {"type": "function", "name": wanted.name}
        choice = {"auto": "auto", "any": "required", "none": "none"}.get(wanted.type, named)
    return choose_tools(choice, tools)


def _schema(request: CountTokensRequest, state: ServerState) -> dict[str, Any] | None:
    wanted = request.output_config.format if request.output_config else None
    if wanted is None:
        return None
    if wanted.type != "json_schema" or wanted.schema_ is None:
        raise RequestError(
            "output_config.format: expected type json_schema with a schema", "output_config.format"
        )
    check_schema_size(wanted.schema_, state.settings, SCHEMA_FIELD)
    return wanted.schema_


def _effort(request: CountTokensRequest) -> Effort:
    if request.output_config and request.output_config.effort:
        return effort_of(request.output_config.effort, "output_config.effort")
    if request.thinking is None or request.thinking.type == "adaptive":
        return "medium"
    budget = request.thinking.budget_tokens or 0
    if request.thinking.type == "disabled" or budget < 2048:
        return "low"
    return "medium" if budget < 16384 else "high"
