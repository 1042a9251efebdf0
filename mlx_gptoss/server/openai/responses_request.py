"""The request of /v1/responses, the items of its input, and its translation to a turn."""

from __future__ import annotations

import base64
import binascii
import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.harmony import Message
from mlx_gptoss.server.openai.responses_items import HOSTED, HostedItems, InputItem, call_id_of
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.tools.loop import open_calls
from mlx_gptoss.server.tools.toolbox import ServedTools
from mlx_gptoss.server.translate.conversation import AssistantTurn, Call
from mlx_gptoss.server.translate.options import EFFORTS, Effort, at_most
from mlx_gptoss.server.translate.request import Items, RequestModel, Table, text_of
from mlx_gptoss.server.translate.sampling_fields import SamplingFields, bounded, sampling_params
from mlx_gptoss.server.translate.turn import Declaration, TurnBuilder, TurnRequest

LOGPROBS = "message.output_text.logprobs"
SEALED = "gptoss-reasoning:"


class TextFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class TextConfig(RequestModel):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(RequestModel):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # its older name


class ResponsesRequest(SamplingFields):
    input: str | Items[InputItem] = Field(default_factory=list)
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Items[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_output_tokens: int | None = bounded("max_tokens", None)
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    metadata: Table[str] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None

    unsupported: ClassVar = {
        "conversation": "send previous_response_id or the whole input",
        "prompt": "there are no stored prompt templates here; send instructions and input",
    }

    @property
    def effort(self) -> Effort:
        """The reasoning effort as it was asked for."""
        return (self.reasoning.effort if self.reasoning else None) or "medium"

    @property
    def summary(self) -> str | None:
        """The kind of summary that is asked for: all kinds are the reasoning itself."""
        return (self.reasoning.summary or self.reasoning.generate_summary) if self.reasoning else None

    @property
    def format(self) -> TextFormat | None:
        """What the answer's text has to be."""
        return self.text.format if self.text else None

    def includes(self, what: str) -> bool:
        """Whether more of the answer was asked for by this name."""
        return what in (self.include or ())


def input_items(request: ResponsesRequest, state: ServerState, caller: str) -> list[InputItem]:
    """The items of the input, with what references stand for. Raises ApiError for what is not stored.

    Their ids are the server's own: an id that a client chose could be another's.
    """
    if isinstance(request.input, str):
        return [InputItem(id=new_item_id(), role="user", content=request.input)]
    at_most(state.settings.max_messages, len(request.input), "items", "input")
    return [
        InputItem.model_validate(state.responses.item(caller, item.id, f"input[{index}].id"))
        if item.type == "item_reference"
        else item.model_copy(update={"id": new_item_id()} | _call_of(item))
        for index, item in enumerate(request.input)
    ]


def _call_of(item: InputItem) -> dict[str, str]:
    """What the items of MCP servers say by their ids."""
    named = item.type in ("mcp_call", "mcp_approval_request") and item.id
    return {"call_id": call_id_of(item.id)} if named and item.id else {}


def translate(
    request: ResponsesRequest,
    items: list[InputItem],
    state: ServerState,
    caller: str,
    served: ServedTools | None = None,
) -> TurnRequest:
    """The turn that is asked for. served: the server's own tools. Raises RequestError naming the field at
    fault, ApiError for what is not stored.
    """
    request.refuse_unsupported()
    if request.background:
        raise RequestError("background is not supported: stream the response instead", "background")
    builder = state.new_turn(caller)
    if request.previous_response_id:
        before = state.responses.get(caller, request.previous_response_id, "previous_response_id")
        builder = state.new_turn(caller, before.history, before.preface)
    builder.model = request.model
    _add_items(builder, items, HostedItems(builder, served) if state.toolbox.offers or served else None)
    if not builder.messages and not builder.preface and not request.instructions:
        raise RequestError("input is empty: send a text or a list of items", "input")
    builder.effort = EFFORTS[request.effort]
    own = served.declarations if served is not None else ()
    builder.tools(request.tools, _declaration, request.tool_choice, own)
    if wanted := request.format:
        builder.answer_format(wanted.type, "text.format", wanted.schema_, wanted.name, wanted.strict)
    names = {"messages": "input", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
    scored = request.top_logprobs is not None or request.includes(LOGPROBS)
    params = sampling_params(
        request,
        names,
        max_tokens=request.max_output_tokens,
        logprobs=(request.top_logprobs or 0) if scored else None,
    )
    asked = builder.build(params, names, instructions=request.instructions)
    if asked.approved - {call.call_id for call in open_calls(asked.conversation.messages)}:
        raise RequestError("input: send an approval alone; what is said after it would come before", "input")
    return asked


def _declaration(tool: dict[str, Any], where: str) -> Declaration | None:
    """A function tool. Other types (web_search, namespace, custom, …) are accepted: what is among them of the
    server's own tools is offered apart, the rest is not.
    """
    if not isinstance(tool.get("type"), str):
        raise ToolError(f"{where} has no type: expected 'function'", f"{where}.type")
    if tool["type"] != "function":
        return None
    if not isinstance(tool.get("name"), str):
        raise ToolError(f"{where} has no name: give it one, such as 'get_weather'", f"{where}.name")
    if not isinstance(tool.get("parameters"), dict | None):
        raise ToolError(f"{where}.parameters is not an object: expected a JSON schema", f"{where}.parameters")
    if not isinstance(tool.get("description") or "", str):
        raise ToolError(f"{where}.description is not a text", f"{where}.description")
    return tool, where, f"{where}.parameters"


def _add_items(builder: TurnBuilder, items: list[InputItem], hosted: HostedItems | None) -> None:
    """Add the input's items to a conversation; neighbouring items of the assistant make up one turn."""
    turn = AssistantTurn()

    def flush() -> None:
        nonlocal turn
        builder.assistant(turn)
        turn = AssistantTurn()

    for index, item in enumerate(items):
        where = f"input[{index}]"
        match item.type, item.role:
            case "reasoning", _:
                if turn.text or turn.calls:
                    flush()
                turn.reasoning += _reasoning_text(item, where)
            case "message", "assistant":
                if turn.text or turn.calls:
                    flush()
                text = text_of(item.content, f"{where}.content")
                if item.phase == "commentary":
                    turn.preamble += text
                else:
                    turn.text += text
            case (("function_call" | "custom_tool_call"), _):
                turn.calls.append(_call(item, where))
            case (("function_call_output" | "custom_tool_call_output"), _):
                flush()
                builder.tool_result(item.call_id, text_of(item.output, f"{where}.output"), f"{where}.call_id")
            case "message", ("user" | "system" | "developer") as role:
                flush()
                if item.content is None:
                    raise RequestError(f"{where}.content is missing", f"{where}.content")
                add = builder.user if role == "user" else builder.instructions
                add(text_of(item.content, f"{where}.content"))
            case "message", role:
                raise RequestError(
                    f"{where}.role is {str(role)[:40]!r}: expected user, assistant, system or developer",
                    f"{where}.role",
                )
            case kind, _ if hosted is not None and kind in HOSTED:
                if kind in ("mcp_approval_request", "mcp_call"):
                    call = hosted.call(item, where)
                    turn.calls += [] if builder.is_open(call.call_id) else [call]
                if kind == "mcp_call":
                    flush()
                    hosted.result(call, item, where)
                elif kind == "mcp_approval_response":
                    flush()
                    hosted.approval(item, where)
            case kind, _:
                raise RequestError(
                    f"{where} is of type {kind[:40]!r}: expected message, reasoning, function_call or "
                    "function_call_output (a hosted tool's item has no meaning to this server)",
                    f"{where}.type",
                )
    flush()


def new_item_id() -> str:
    """An id that nobody can guess."""
    return f"item_{secrets.token_hex(16)}"


def listed(item: InputItem) -> dict[str, Any]:
    """An item as GET …/input_items lists it: as it came, with what OpenAI's types ask for besides."""
    fields = item.model_dump(exclude_none=True)
    if item.type == "reasoning":
        fields.setdefault("summary", [])
    else:
        fields.setdefault("status", "completed")
    if item.type == "message":
        content = fields.get("content", "")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        fields["content"] = [_listed_part(part, item.role == "assistant") for part in parts]
    return fields


def _listed_part(part: dict[str, Any], said: bool) -> dict[str, Any]:
    if part["type"] == "refusal":
        return part
    return {"annotations": []} | part | {"type": "output_text"} if said else part | {"type": "input_text"}


def _call(item: InputItem, where: str) -> Call:
    arguments = item.arguments if item.type == "function_call" else item.input
    if not item.call_id or not item.name or arguments is None:
        raise ToolError(f"{where}: a {item.type} needs call_id, name and its arguments", where)
    return Call(item.call_id, item.name, arguments)


def seal(reasoning: str) -> str:
    """`encrypted_content` of a reasoning item: opaque to clients, but only encoded."""
    return SEALED + base64.b64encode(reasoning.encode()).decode()


def _reasoning_text(item: InputItem, where: str) -> str:
    """The reasoning sent back: its text, or what was sealed of it; summaries are not the reasoning."""
    if isinstance(item.content, list) and item.content:
        return "".join(part.text or "" for part in item.content if part.type == "reasoning_text")
    sealed = item.encrypted_content or ""
    if not sealed.startswith(SEALED):
        return ""
    try:
        return base64.b64decode(sealed.removeprefix(SEALED), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise RequestError(
            f"{where}.encrypted_content is damaged: send it back as it was", f"{where}.encrypted_content"
        ) from None


def drop_oldest(messages: list[Message], excess: int, tokens: int) -> list[Message] | None:
    """Messages without the oldest turns; None when only the last turn is left.

    Of the text at least `excess` parts in `tokens` go: about that many tokens. Turns start with a user
    message, so that no result is left without its call.
    """
    starts = [index for index, message in enumerate(messages) if message.role == "user" and index > 0]
    if not starts:
        return None
    total = sum(len(message.content) for message in messages)
    dropped = 0
    for before, start in zip([0, *starts], starts, strict=False):
        dropped += sum(len(message.content) for message in messages[before:start])
        if dropped * tokens >= excess * total:
            return messages[start:]
    return messages[starts[-1] :]
