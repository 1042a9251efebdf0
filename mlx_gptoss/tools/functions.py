"""Tools from plain Python functions: what the model is shown, and the arguments of its calls as values.

Name and description come from the function, the schema of the arguments from its type hints, their
descriptions from the docstring or from `Annotated[T, "…"]`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from pydantic_core import SchemaValidator, ValidationError

from mlx_gptoss.errors import ToolError
from mlx_gptoss.harmony.types import Tool
from mlx_gptoss.tools.docstrings import read_docstring
from mlx_gptoss.tools.hints import BRANCH, STRICT, WRONG_NAMES, Hints

MAX_SHOWN = 200  # characters of a wrong value in an error


def tool_from_function(function: Callable[..., Any]) -> Tool:
    """The tool that calls `function`, to be shown only. Raises ToolError as `read_function` does."""
    return read_function(function)[0]


def read_function(function: Callable[..., Any]) -> tuple[Tool, Callable[[str], dict[str, Any]]]:
    """The tool that calls `function`, and what makes its keyword arguments of the JSON text a model wrote.

    Raises ToolError for what a model cannot call: no name, arguments without one (`*args`, positional-only,
    `**kwargs`), type hints that cannot be read or have no JSON form. So does the second, in words that the
    model can act on, for arguments that are missing, unknown or of another type.
    """
    name = getattr(function, "__name__", "")
    if not callable(function) or not name or name == "<lambda>":
        raise ToolError(f"{function!r} cannot be a tool: expected a function with a name", "tools")
    if inspect.isasyncgenfunction(function):
        raise ToolError(f"tool {name!r} is an async generator: return the whole result", "tools")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        raise ToolError(f"tool {name!r} has no signature: wrap it in a Python function", "tools") from None
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(
                f"tool {name!r}: argument {parameter.name!r} has no name of its own to be called by: use "
                "ordinary arguments",
                "tools",
            )
    description, documented = read_docstring(function.__doc__)
    hints = Hints(name)
    hint_of = hints.read(function)
    fields = {p.name: (hint_of.get(p.name, Any), p.default) for p in parameters}
    shown, checked = hints.with_definitions(hints.record(fields, documented))
    if not shown["required"]:
        del shown["required"]
    validator = SchemaValidator(checked, STRICT)

    def bind(arguments: str) -> dict[str, Any]:
        try:
            bound: dict[str, Any] = validator.validate_json(arguments)
        except ValidationError as error:
            raise ToolError(_what_is_wrong(error), "arguments") from None
        return bound

    return Tool(name, description, shown if fields else None), bind


def _what_is_wrong(error: ValidationError) -> str:
    """One line: each place with the value found there and what was expected."""
    said: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False, include_context=False):
        steps = [step for step in problem["loc"] if step != BRANCH]
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)[1:]
        text = problem["msg"].replace("Input should be", "expected", 1)
        if problem["type"] == WRONG_NAMES:
            head = place or "wrong arguments"
        elif problem["type"] == "missing":
            head, text = place, "missing"
        else:
            value = json.dumps(problem["input"], ensure_ascii=False, default=str)
            head = f"{place} is {value[:MAX_SHOWN]}" if place else f"the arguments are {value[:MAX_SHOWN]}"
        said.setdefault(head, []).append(text)
    told = {head: " or ".join(dict.fromkeys(texts)) for head, texts in said.items()}
    return "; ".join(f"{head}: {text.replace(' or expected ', ' or ')}" for head, text in told.items())
