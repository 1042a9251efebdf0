"""What all APIs share between a request and the engine: messages, tools, schemas, effort, sampling.

Each API reads its own protocol into these; ConversationBuilder makes the harmony Conversation of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from mlx_gptoss.errors import RequestError, SchemaError, ToolError
from mlx_gptoss.grammar import ToolChoice
from mlx_gptoss.harmony import Conversation, Message, Tool
from mlx_gptoss.harmony.schema import without_refused
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.memory.turns import AssistantTurn, TurnMemory, after, opening
from mlx_gptoss.server.settings import ServerSettings

Effort = Literal["low", "medium", "high"]

# Names that other models' clients send, onto the three that gpt-oss knows.
EFFORTS: dict[str, Effort] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


class ConversationBuilder:
    """Collects the turns of a request in order. Errors name the field that they are given."""

    def __init__(
        self, memory: TurnMemory, history: Sequence[Message] = (), preface: Sequence[str] = ()
    ) -> None:
        """history, preface: messages and leading instructions of an earlier request, to go on from."""
        self._memory = memory
        self._calls = {m.call_id for m in history if m.role == "assistant"}
        self.preface = list(preface)
        self.messages: list[Message | AssistantTurn] = list(history)

    def instructions(self, text: str) -> None:
        """A system or developer message: before the first turn part of the instructions, else a turn."""
        if not text:
            return
        if self.messages:
            self.messages.append(Message("developer", text))
        else:
            self.preface.append(text)

    def user(self, text: str) -> None:
        self.messages.append(Message.user(text))

    def assistant(self, turn: AssistantTurn) -> None:
        """A turn as the client sends it back."""
        if turn:
            self.messages.append(turn)
            self._calls.update(call.call_id for call in turn.calls)

    def tool_result(self, call_id: str | None, output: str, field: str) -> None:
        """The result of an earlier call."""
        if not call_id or call_id not in self._calls:
            raise ToolError(
                f"{field}: the call id {call_id!r} belongs to no earlier call in this conversation: "
                "send the assistant message with the call before its result",
                field,
            )
        self.messages.append(Message.tool_result(output, call_id=call_id))

    def build(
        self,
        *,
        instructions: str | None = None,
        tools: Iterable[Tool] = (),
        effort: Effort = "medium",
        schema: dict[str, Any] | None = None,
        schema_name: str | None = None,
        today: str | None = None,
    ) -> Conversation:
        """The harmony conversation of all that was collected. `instructions` go before the collected ones.

        The assistant's turns have their sampled tokens where they are remembered unchanged.
        """
        parts = [instructions, *self.preface] if instructions else self.preface
        conversation = Conversation(
            messages=[],
            instructions="\n\n".join(parts) or None,
            tools=list(tools),
            reasoning_effort=effort,
            response_schema=schema,
            response_name=schema_name or "response",
            current_date=today,
        )
        history = opening(conversation)
        for entry in self.messages:
            added = [entry] if isinstance(entry, Message) else self._sampled(entry, history)
            conversation.messages += added
            history = after(history, added)
        return conversation

    def _sampled(self, turn: AssistantTurn, history: bytes) -> list[Message]:
        recalled = self._memory.recall(turn, history)
        return turn.messages() if recalled is None else recalled


def effort_of(value: str | None, field: str) -> Effort:
    """A reasoning effort by any of its names; medium when none is given."""
    if value is None:
        return "medium"
    if value not in EFFORTS:
        raise RequestError(f"{field} is {value[:40]!r}: expected one of {', '.join(EFFORTS)}", field)
    return EFFORTS[value]


def check_schema_size(schema: object, settings: ServerSettings, field: str) -> None:
    """Refuse a schema that is no JSON or larger than the server takes."""
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except ValueError as error:
        raise SchemaError(f"{field}: not JSON ({error})", field) from None
    if size > settings.max_schema_bytes:
        raise SchemaError(
            f"{field}: the schema has {size:,} bytes and this server takes {settings.max_schema_bytes:,}",
            field,
        )


def function_tool(function: Mapping[str, Any], settings: ServerSettings, field: str) -> Tool:
    """A harmony tool of a declared function; errors carry the field of the declaration.

    Clients send what their own tools declare, so what the model cannot be shown of a schema is left out.
    """
    parameters = function.get("parameters")
    if parameters is not None:
        check_schema_size(parameters, settings, f"{field}.parameters")
    try:
        shown = without_refused(parameters) if parameters else None
        return Tool(function["name"], function.get("description") or "", shown)
    except RequestError as error:
        raise type(error)(f"{field}: {error}", field) from None


def check_tool_count(count: int, settings: ServerSettings) -> None:
    """Refuse more tools than the server takes."""
    if count > settings.max_tools:
        raise ToolError(
            f"tools: {count} tools are declared and this server takes {settings.max_tools}", "tools"
        )


def choose_tools(
    choice: object, tools: list[Tool], field: str = "tool_choice"
) -> tuple[list[Tool], ToolChoice]:
    """The tools to offer and the engine's tool choice, from either OpenAI API's `tool_choice`.

    Known: "auto", "none", "required", a function by name in both APIs' spellings, and allowed_tools.
    """
    if choice is None:
        return tools, "auto"
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise RequestError(
                f"{field} is {choice[:40]!r}: expected auto, none, required or a function", field
            )
        if choice == "required" and not tools:
            raise RequestError(f"{field} is 'required', and no function tool is declared", field)
        return tools, cast(ToolChoice, choice)
    if not isinstance(choice, dict):
        raise RequestError(f"{field}: expected a text or an object", field)
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        return _allowed(allowed, tools, field)
    name = _function_name(choice)
    if choice.get("type") != "function" or name is None:
        raise RequestError(
            f"{field}: type {str(choice.get('type'))[:40]!r} is not supported: expected function or "
            "allowed_tools",
            field,
        )
    _require_declared(name, tools, field)
    return tools, ("named", name)


def _function_name(choice: Mapping[str, Any]) -> str | None:
    inner = choice.get("function")
    name = inner.get("name") if isinstance(inner, dict) else choice.get("name")
    return name if isinstance(name, str) else None


def _require_declared(name: str, tools: list[Tool], field: str) -> None:
    if all(tool.name != name for tool in tools):
        raise RequestError(f"{field} names {name[:80]!r}, which is not among the declared functions", field)


def _allowed(allowed: object, tools: list[Tool], field: str) -> tuple[list[Tool], ToolChoice]:
    mode = allowed.get("mode", "auto") if isinstance(allowed, dict) else None
    listed = allowed.get("tools") if isinstance(allowed, dict) else None
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise RequestError(
            f"{field}: allowed_tools needs a mode (auto or required) and a list of tools", field
        )
    # Tools of other types may be declared and are not offered, so they may be allowed as well.
    functions = [t for t in listed if isinstance(t, dict) and t.get("type", "function") == "function"]
    names = {_function_name(function) for function in functions} - {None}
    for name in names:
        _require_declared(cast(str, name), tools, field)
    kept = [tool for tool in tools if tool.name in names]
    if mode == "required" and not kept:
        raise RequestError(f"{field}: a call is required, and no function is allowed", field)
    return kept, cast(ToolChoice, mode)


def sampling_params(values: Mapping[str, Any], renamed: Mapping[str, str] | None = None) -> SamplingParams:
    """SamplingParams of the values that are not None; an error names the protocol's field."""
    if values.get("top_p") == 0:
        values = {**values, "top_p": None, "temperature": 0.0}
    try:
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})
    except RequestError as error:
        field = (renamed or {}).get(error.field or "", error.field)
        raise RequestError(str(error), field) from None


def logit_bias(bias: Mapping[str, float] | None) -> dict[int, float] | None:
    """OpenAI's mapping of token ids, written as JSON's text keys, to biases from -100 to 100."""
    if bias is None:
        return None
    result = {}
    for key, value in bias.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9 or not -100 <= value <= 100:
            raise RequestError(
                f"logit_bias: {key[:40]!r}: {value} is no token id with a bias from -100 to 100", "logit_bias"
            )
        result[int(key)] = value
    return result


def stop_texts(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """One or several stop texts; empty ones say nothing and are left out."""
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(texts) > 16:
        raise RequestError(f"stop has {len(texts)} texts: expected at most 16", "stop")
    return tuple(text for text in texts if text)
