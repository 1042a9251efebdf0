"""What all APIs read of a request beside its turns and its sampling: sizes, effort, schemas, tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, cast

from mlx_gptoss.errors import RequestError, SchemaError
from mlx_gptoss.grammar import ToolChoice
from mlx_gptoss.harmony import ReasoningEffort, Tool
from mlx_gptoss.harmony.schema import without_refused
from mlx_gptoss.server.settings import ServerSettings

# Names that other models' clients send, onto the three that gpt-oss knows.
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: dict[Effort, ReasoningEffort] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


def at_most(limit: int, count: int, what: str, field: str, kind: type[RequestError] = RequestError) -> None:
    """Refuse more of something than the server takes."""
    if count > limit:
        raise kind(f"{field}: {count:,} {what}, and this server takes at most {limit:,}", field)


def check_schema_size(schema: object, settings: ServerSettings, field: str) -> None:
    """Refuse a schema that is not JSON or larger than the server takes."""
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except ValueError as error:
        raise SchemaError(f"{field}: not JSON ({error})", field) from None
    at_most(settings.max_schema_bytes, size, "bytes", field, SchemaError)


def function_tool(
    function: Mapping[str, Any], settings: ServerSettings, field: str, schema_field: str | None = None
) -> Tool:
    """A harmony tool of a declared function; errors carry the field of the declaration, or of its schema.

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


def choose_tools(choice: str | dict[str, Any] | None, tools: list[Tool]) -> tuple[list[Tool], ToolChoice]:
    """The tools to offer and the tool choice, from either OpenAI API's `tool_choice`.

    Known: "auto", "none", "required", a function by name in both APIs' spellings, and allowed_tools.
    """
    match choice:
        case None:
            return tools, "auto"
        case "required" if not tools:
            raise _wrong_choice("is 'required', and no function tool is declared")
        case "auto" | "none" | "required":
            return tools, cast(ToolChoice, choice)
        case {"type": "allowed_tools", "allowed_tools": allowed} | ({"type": "allowed_tools"} as allowed):
            return _allowed(allowed, tools)
        case {"type": "function"} if name := _function_name(choice):
            _require_declared(name, tools)
            return tools, ("named", name)
    raise _wrong_choice(
        f"is {str(choice)[:80]!r}: expected auto, none, required, a function or allowed_tools"
    )


def _wrong_choice(why: str) -> RequestError:
    return RequestError(f"tool_choice {why}", "tool_choice")


def _function_name(choice: object) -> str | None:
    match choice:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    return None


def _require_declared(name: str, tools: list[Tool]) -> None:
    if all(tool.name != name for tool in tools):
        raise _wrong_choice(f"names {name[:80]!r}, which is not among the declared functions")


def _allowed(allowed: object, tools: list[Tool]) -> tuple[list[Tool], ToolChoice]:
    match {"mode": "auto", **allowed} if isinstance(allowed, dict) else {}:
        case {"mode": "auto" | "required" as mode, "tools": list(listed)}:
            # Tools of other types may be declared and are not offered, so they may be allowed as well.
            functions = [t for t in listed if isinstance(t, dict) and t.get("type", "function") == "function"]
        case _:
            raise _wrong_choice("allowed_tools needs a mode (auto or required) and a list of tools")
    names = {name for function in functions if (name := _function_name(function))}
    for name in names:
        _require_declared(name, tools)
    kept = [tool for tool in tools if tool.name in names]
    if mode == "required" and not kept:
        raise _wrong_choice("requires a call, and no function is allowed")
    return kept, cast(ToolChoice, mode)
