"""The arguments of a call: the JSON a model wrote, made into what a function's type hints promise."""

from __future__ import annotations

import collections.abc as abc
import dataclasses
import datetime
import decimal
import enum
import inspect
import json
import pathlib
import typing
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.functions import LISTS, MAPPINGS, UNIONS, is_pydantic, parameters, required_keys


def bind_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for `function` from the JSON object a model wrote: enums, dates, dataclasses and
    pydantic models are made of it as the type hints say.

    Raises ToolError, in words the model can act on, for arguments missing, unknown or of another type.
    """
    known = parameters(function)
    unknown = [name for name in arguments if name not in known]
    missing = [n for n, (p, _) in known.items() if p.default is p.empty and n not in arguments]
    if unknown or missing:
        said = [f"missing {', '.join(missing)}"] if missing else []
        said += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise ToolError(
            f"wrong arguments: {'; '.join(said)}; expected {', '.join(known) or 'none'}", "arguments"
        )
    return {name: _convert(value, known[name][1], name) for name, value in arguments.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint` has it. Raises ToolError naming the place."""

    def wrong(expected: str) -> ToolError:
        return ToolError(
            f"{where} is {json.dumps(value, ensure_ascii=False)}: expected {expected}", "arguments"
        )

    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Annotated, typing.Required, typing.NotRequired, typing.Final):
        return _convert(value, inner[0], where)
    if isinstance(hint, typing.NewType):
        return _convert(value, hint.__supertype__, where)
    if origin is Literal:
        allowed = {json.dumps(v.value if isinstance(v, enum.Enum) else v): v for v in inner}
        if json.dumps(value) not in allowed:
            raise wrong(f"one of {', '.join(allowed)}")
        return allowed[json.dumps(value)]
    if origin in UNIONS:
        return _convert_union(value, inner, where)
    kind = origin or hint
    if kind in LISTS:
        if not isinstance(value, list):
            raise wrong("a list")
        return _convert_list(value, kind, inner, where)
    if kind in MAPPINGS:
        if not isinstance(value, dict):
            raise wrong("an object")
        return {k: _convert(v, inner[1], f"{where}.{k}") for k, v in value.items()} if inner else value
    if kind in (str, bool, int, float, type(None)):
        return _convert_scalar(value, kind, wrong)
    if isinstance(hint, type) and hint is not inspect.Parameter.empty and hint is not object:
        return _convert_class(value, hint, where, wrong)
    return value


def _convert_union(value: Any, members: tuple[Any, ...], where: str) -> Any:
    problems = []
    for member in members:
        try:
            return _convert(value, member, where)
        except ToolError as error:
            problems.append(str(error))
    raise ToolError("; or ".join(dict.fromkeys(problems)), "arguments")


def _convert_list(value: list[Any], kind: Any, inner: tuple[Any, ...], where: str) -> Any:
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            raise ToolError(f"{where} has {len(value)} items: expected {len(inner)}", "arguments")
        return tuple(
            _convert(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True))
        )
    items = [_convert(v, inner[0], f"{where}[{i}]") for i, v in enumerate(value)] if inner else value
    return {tuple: tuple, set: set, frozenset: frozenset, abc.Set: set}.get(kind, list)(items)


def _convert_scalar(value: Any, kind: Any, wrong: Callable[[str], ToolError]) -> Any:
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
    whole = isinstance(value, float) and value.is_integer()
    if kind is int and whole:
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) and kind is int:
        raise wrong(names[kind])
    return value


def _convert_class(value: Any, hint: Any, where: str, wrong: Callable[[str], ToolError]) -> Any:
    if issubclass(hint, enum.Enum):
        found = [member for member in hint if member.value == value and type(member.value) is type(value)]
        if not found:
            raise wrong(f"one of {', '.join(json.dumps(m.value) for m in hint)}")
        return found[0]
    if is_pydantic(hint):
        try:
            return hint.model_validate(value)
        except ValueError as error:  # pydantic's own error is one
            list_errors = getattr(error, "errors", None)
            details = list_errors() if callable(list_errors) else []
            said = [f"{'.'.join([where, *map(str, d['loc'])])}: {d['msg']}" for d in details]
            raise ToolError("; ".join(said) or f"{where}: {error}", "arguments") from None
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        return _convert_fields(value, hint, where, wrong)
    if issubclass(hint, datetime.date | datetime.time):
        try:
            return hint.fromisoformat(value)
        except (TypeError, ValueError):
            raise wrong(f"a {hint.__name__} in ISO form") from None
    if hint in (uuid.UUID, decimal.Decimal, pathlib.Path):
        try:
            return hint(value)
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            raise wrong(f"a {hint.__name__} as text") from None
    return value


def _convert_fields(value: Any, hint: Any, where: str, wrong: Callable[[str], ToolError]) -> Any:
    if not isinstance(value, dict):
        raise wrong("an object")
    hints = typing.get_type_hints(hint, include_extras=True)
    if unknown := [name for name in value if name not in hints]:
        raise wrong(f"only the fields {', '.join(hints)}, not {', '.join(unknown)}")
    fields = {name: _convert(v, hints[name], f"{where}.{name}") for name, v in value.items()}
    if typing.is_typeddict(hint):
        if missing := sorted(required_keys(hint, hints) - fields.keys()):
            raise wrong(f"the fields {', '.join(missing)} as well")
        return fields
    try:
        return hint(**fields)
    except (TypeError, ValueError) as error:
        raise ToolError(f"{where}: {error}", "arguments") from None
