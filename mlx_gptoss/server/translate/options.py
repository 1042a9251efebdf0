"""What all APIs read of a request beside its turns and its sampling: sizes, effort, schemas, tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from mlx_gptoss.errors import RequestError, SchemaError, ToolError
from mlx_gptoss.grammar import ResponseFormat, ToolChoice
from mlx_gptoss.harmony import ReasoningEffort, Tool
from mlx_gptoss.harmony.schema import without_refused
from mlx_gptoss.server.settings import ServerSettings

# Names that other models' clients send, onto the three that gpt-oss knows.
EFFORTS: dict[str, ReasoningEffort] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


def effort_of(value: str | None, field: str) -> ReasoningEffort:
    """A reasoning effort by any of its names; medium when none is given."""
    if value is None:
        return "medium"
    if value not in EFFORTS:
        raise RequestError(f"{field} is {value[:40]!r}: expected one of {', '.join(EFFORTS)}", field)
    return EFFORTS[value]


def check_message_count(
    messages: Sequence[object], settings: ServerSettings, field: str = "messages"
) -> None:
    """Refuse more messages than the server takes."""
    if len(messages) > settings.max_messages:
        raise RequestError(
            f"{field} has {len(messages):,} entries and this server takes {settings.max_messages:,}", field
        )


def check_choice_count(count: int, settings: ServerSettings, prompts: int = 1) -> None:
    """Refuse more answers to one request than the server gives."""
    if count * prompts > settings.max_choices:
        asked = f"{prompts} prompts with n={count}" if prompts > 1 else f"n is {count}"
        raise RequestError(f"{asked}: this server gives at most {settings.max_choices} choices", "n")


def check_schema_size(schema: object, settings: ServerSettings, field: str) -> None:
    """Refuse a schema that is not JSON or larger than the server takes."""
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except ValueError as error:
        raise SchemaError(f"{field}: not JSON ({error})", field) from None
    if size > settings.max_schema_bytes:
        raise SchemaError(
            f"{field}: the schema has {size:,} bytes and this server takes {settings.max_schema_bytes:,}",
            field,
        )


def schema_format(schema: dict[str, Any], settings: ServerSettings, field: str) -> ResponseFormat:
    """The form of an answer that follows a schema. Raises SchemaError for one that is too large."""
    check_schema_size(schema, settings, field)
    return ResponseFormat("schema", schema)


class Declaration(NamedTuple):
    """A function that a request declares, {"name", "description", "parameters"}: where, and its schema."""

    function: Mapping[str, Any]
    field: str
    schema_field: str


def offered_tools(
    declared: Sequence[Declaration | None], choice: object, settings: ServerSettings
) -> tuple[list[Tool], ToolChoice, dict[str, str]]:
    """The tools to offer, the LLM's tool choice, and the names for `naming` of what it may find wrong.

    None is a declared tool that is not a function: it counts, and is not offered.
    """
    if len(declared) > settings.max_tools:
        raise ToolError(
            f"tools: {len(declared)} tools are declared and this server takes {settings.max_tools}", "tools"
        )
    known = [one for one in declared if one is not None]
    tools = [function_tool(one.function, settings, one.field, one.schema_field) for one in known]
    schema_field = {tool.name: one.schema_field for tool, one in zip(tools, known, strict=True)}
    tools, tool_choice = choose_tools(choice, tools)
    names = {f"tools[{index}].parameters": schema_field[tool.name] for index, tool in enumerate(tools)}
    return tools, tool_choice, names


def function_tool(
    function: Mapping[str, Any], settings: ServerSettings, field: str, schema_field: str | None = None
) -> Tool:
    """A harmony tool of a declared function; errors carry the field of the declaration.

    Clients send what their own tools declare, so what the model cannot be shown of a schema is left out.
    """
    schema_field = schema_field or f"{field}.parameters"
    parameters = function.get("parameters")
    if parameters is not None:
        check_schema_size(parameters, settings, schema_field)
    try:
        shown = without_refused(parameters) if parameters else None
        return Tool(function["name"], function.get("description") or "", shown)
    except RequestError as error:
        where = schema_field if isinstance(error, SchemaError) else field
        raise type(error)(f"{where}: {error}", where) from None


def choose_tools(
    choice: object, tools: list[Tool], field: str = "tool_choice"
) -> tuple[list[Tool], ToolChoice]:
    """The tools to offer and the tool choice, from either OpenAI API's `tool_choice`.

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
