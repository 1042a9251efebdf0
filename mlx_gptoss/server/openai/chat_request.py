"""The request of /v1/chat/completions, as OpenAI documents it, with fields that gpt-oss servers share."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import ConfigDict, Field

from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.server.openai.choices import ChoicesRequest
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.tools.asked import BUILTIN_TYPES
from mlx_gptoss.server.tools.loop import open_calls
from mlx_gptoss.server.tools.toolbox import ServedTools
from mlx_gptoss.server.translate.conversation import AssistantTurn, Call
from mlx_gptoss.server.translate.options import EFFORTS, Effort, at_most
from mlx_gptoss.server.translate.request import ContentPart, Items, RequestModel, naming, text_of
from mlx_gptoss.server.translate.sampling_fields import bounded, sampling_params
from mlx_gptoss.server.translate.turn import Declaration, TurnBuilder, TurnRequest


class FunctionCall(RequestModel):
    name: str
    arguments: str


class ChatToolCall(RequestModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[ContentPart] | None = None
    tool_calls: Items[ChatToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class FunctionDeclaration(RequestModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ChatTool(RequestModel):
    """A function, or by another type a tool that the server runs: then the other fields are its own."""

    model_config = ConfigDict(extra="allow")

    type: str
    function: FunctionDeclaration | None = None


class JsonSchemaFormat(RequestModel):
    name: str = "response"
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ChatFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(RequestModel):
    """How vLLM's clients ask for a form of the answer."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None

    unsupported: ClassVar = {"structural_tag": "declare tools, or give a JSON schema or a grammar"}


class ChatReasoning(RequestModel):
    """How OpenRouter's clients speak of reasoning."""

    effort: Effort | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    exclude: bool | None = None
    enabled: bool | None = None


class ChatRequest(ChoicesRequest):
    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    tools: Items[ChatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ChatFormat | None = None
    reasoning_effort: Effort | None = None
    reasoning: ChatReasoning | None = None
    include_reasoning: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    max_completion_tokens: int | None = bounded("max_tokens", None)
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_progress: bool | None = None
    modalities: Items[str] | None = None
    audio: dict[str, Any] | None = None
    functions: Items[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None

    unsupported: ClassVar = {
        "audio": "gpt-oss reads and writes text only",
        "functions": "send tools instead",
        "function_call": "send tool_choice instead",
        "web_search_options": "this server has no web search; declare a tool of your own",
    }

    @property
    def effort(self) -> Effort:
        """The reasoning effort as it was asked for."""
        asked = self.reasoning or ChatReasoning()
        return self.reasoning_effort or asked.effort or ("none" if asked.enabled is False else "medium")

    @property
    def shows_reasoning(self) -> bool:
        """Whether the reasoning is to be in the answer."""
        return self.include_reasoning is not False and not (self.reasoning and self.reasoning.exclude)


def translate(
    request: ChatRequest, state: ServerState, caller: str, served: ServedTools | None = None
) -> TurnRequest:
    """The turn that is asked for. served: the server's own tools. Raises RequestError naming the field."""
    request.refuse_unsupported()
    if request.modalities not in (None, ["text"]):
        raise RequestError(
            f"modalities is {request.modalities!r:.80}: gpt-oss writes text only", "modalities"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    at_most(state.settings.max_choices, request.n or 1, "choices", "n")
    builder = state.new_turn(caller)
    builder.model = request.model
    at_most(state.settings.max_messages, len(request.messages), "entries", "messages")
    for index, message in enumerate(request.messages):
        _add_message(builder, message, f"messages[{index}]")
    builder.progress = bool(request.stream and request.return_progress)
    builder.effort = EFFORTS[request.effort]
    own = served.declarations if served is not None else ()
    read = partial(_declaration, state)
    builder.tools(request.tools, read, request.tool_choice, own)
    if served is not None:
        if (request.n or 1) > 1:
            raise RequestError(f"n is {request.n}: tools that the server runs take one answer", "n")
        # A client answers the calls of its own functions; what it sends back without a result is approved.
        builder.approved = {call.call_id for call in open_calls(builder.conversation().messages)}
    _read_format(builder, request)
    limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    names = {"max_tokens": limit, "logprobs": "top_logprobs"}
    params = sampling_params(
        request,
        names,
        max_tokens=getattr(request, limit),
        stop=request.stop,
        logit_bias=request.logit_bias,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    budget = request.reasoning.max_tokens if request.reasoning else None
    return builder.build(params, names, reasoning_budget=budget)


def _add_message(builder: TurnBuilder, message: ChatMessage, where: str) -> None:
    text = text_of(message.content, f"{where}.content")
    if message.role in ("system", "developer"):
        builder.instructions(text)
    elif message.role == "user":
        builder.user(text)
    elif message.role == "tool":
        builder.tool_result(message.tool_call_id, text, f"{where}.tool_call_id")
    else:
        calls = [
            Call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()
        ]
        reasoning = message.reasoning or message.reasoning_content or ""
        builder.assistant(AssistantTurn(reasoning, text=text or message.refusal or "", calls=calls))


def _declaration(state: ServerState, tool: ChatTool, where: str) -> Declaration | None:
    if tool.type != "function":
        name = BUILTIN_TYPES.get(tool.type)
        if tool.type == "mcp" or name in state.toolbox.builtin:
            return None
        cure = (
            f"start the server with --tool {name}"
            if name
            else "expected function, or a type of GET /v1/tools"
        )
        raise ToolError(
            f"{where}.type is {tool.type[:40]!r}, which this server does not run: {cure}", f"{where}.type"
        )
    if tool.function is None:
        raise ToolError(f"{where}.function is missing: give {{'name': …}}", f"{where}.function")
    return tool.function.model_dump(), f"{where}.function", f"{where}.function.parameters"


def _read_format(builder: TurnBuilder, request: ChatRequest) -> None:
    """The form of the answer, in whichever spelling it was asked for; raises RequestError for several."""
    ways: dict[str, tuple[str, Any]] = {
        "guided_json": ("json", request.guided_json),
        "guided_regex": ("regex", request.guided_regex),
        "guided_choice": ("choices", request.guided_choice),
        "guided_grammar": ("lark", request.guided_grammar),
    }
    if (structured := request.structured_outputs) is not None:
        with naming({"structural_tag": "structured_outputs.structural_tag"}):
            structured.refuse_unsupported()
        ways |= {
            "structured_outputs.json": ("json", structured.json_),
            "structured_outputs.regex": ("regex", structured.regex),
            "structured_outputs.choice": ("choices", structured.choice),
            "structured_outputs.grammar": ("lark", structured.grammar),
            "structured_outputs.json_object": ("json_object", structured.json_object or None),
        }
    wanted = request.response_format
    if wanted is not None and wanted.type == "text":
        wanted = None
    given = [where for where, (_, value) in ways.items() if value is not None]
    if len(given) + (wanted is not None) > 1:
        first = "response_format" if wanted is not None else given[0]
        raise RequestError(f"{first} and {given[-1]} were given together: an answer has one form", given[-1])
    if wanted is not None:
        _read_response_format(builder, wanted)
    for where in given:
        kind, value = ways[where]
        if kind == "json":
            builder.answer_format("json_schema", where, _schema(value, where), nested=False)
        elif kind == "json_object":
            builder.answer_format("json_object", where)
        else:
            builder.answer_grammar(cast(Literal["regex", "lark", "choices"], kind), value, where)


def _read_response_format(builder: TurnBuilder, wanted: ChatFormat) -> None:
    where = "response_format.json_schema"
    if wanted.json_schema is not None:
        shape = wanted.json_schema
        builder.answer_format(wanted.type, where, shape.schema_, shape.name, shape.strict)
    elif wanted.type == "json_schema":
        raise RequestError(f"{where} is missing: give {{'name': …, 'schema': …}}", where)
    else:
        builder.answer_format(wanted.type, where)


def _schema(given: str | dict[str, Any], where: str) -> object:
    """A schema, or the JSON text of one."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON ({error}): give a JSON schema", where) from None
