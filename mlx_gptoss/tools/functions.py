"""Tools from plain Python functions: name, description and a JSON schema of the arguments.

The schema comes from the signature and its type hints, the descriptions from the docstring or from
`Annotated[T, "…"]`.
"""

from __future__ import annotations

import collections.abc as abc
import dataclasses
import datetime
import decimal
import enum
import inspect
import json
import pathlib
import types
import typing
import uuid
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

from mlx_gptoss.errors import ToolError
from mlx_gptoss.harmony.types import Tool
from mlx_gptoss.tools.docstrings import read_docstring

_SCALARS: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
    object: {},
    inspect.Parameter.empty: {},
    datetime.datetime: {"type": "string", "format": "date-time"},
    datetime.date: {"type": "string", "format": "date"},
    datetime.time: {"type": "string", "format": "time"},
    uuid.UUID: {"type": "string", "format": "uuid"},
    decimal.Decimal: {"type": "string"},
    pathlib.Path: {"type": "string"},
    dict: {"type": "object"},
    abc.Mapping: {"type": "object"},
}
LISTS = (list, set, frozenset, tuple, abc.Sequence, abc.Iterable, abc.Collection, abc.Set)
MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
UNIONS = (Union, types.UnionType)


def tool_from_function(function: Callable[..., Any]) -> Tool:
    """The tool that calls `function`.

    Raises ToolError for what a model cannot call: no name, arguments without one (`*args`, positional-only,
    `**kwargs`), coroutines, type hints that cannot be read or have no JSON form.
    """
    name = getattr(function, "__name__", "")
    if not callable(function) or not name or name == "<lambda>":
        raise ToolError(f"{function!r} cannot be a tool: expected a function with a name", "tools")
    if inspect.iscoroutinefunction(function):
        raise ToolError(f"tool {name!r} is a coroutine: wrap it in a plain function that runs it", "tools")
    description, documented = read_docstring(function.__doc__)
    schemas = _Schemas(name)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter, hint in parameters(function).values():
        schema = schemas.of(hint, f"argument {parameter.name!r}")
        if parameter.name in documented and documented[parameter.name]:
            schema = {**schema, "description": documented[parameter.name]}
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
        else:
            schema = _with_default(schema, parameter.default)
        properties[parameter.name] = schema
    if not properties:
        return Tool(name, description)
    result: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        result["required"] = required
    if schemas.definitions:
        result["$defs"] = schemas.definitions
    return Tool(name, description, result)


def parameters(function: Callable[..., Any]) -> dict[str, tuple[inspect.Parameter, Any]]:
    """The parameters that a caller names, each with its type hint. Raises ToolError."""
    name = getattr(function, "__name__", "tool")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError, AttributeError) as error:
        raise ToolError(
            f"tool {name!r}: its type hints cannot be read ({error}): import what they name, or declare the "
            "tool with Tool(…)",
            "tools",
        ) from None
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(
                f"tool {name!r}: argument {parameter.name!r} has no name of its own to be called by: use "
                "ordinary arguments",
                "tools",
            )
    return {p.name: (p, hints.get(p.name, p.empty)) for p in signature.parameters.values()}


class _Schemas:
    """JSON schemas of type hints; classes go to `definitions` so that they may refer to themselves."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.definitions: dict[str, Any] = {}
        self._name_of: dict[type, str] = {}

    def of(self, hint: Any, where: str) -> dict[str, Any]:
        """The schema of `hint`. Raises ToolError, naming the tool and `where`."""
        try:
            if hint in _SCALARS:
                return dict(_SCALARS[hint])
        except TypeError:  # a Literal or Annotated of something that cannot be hashed
            pass
        origin = get_origin(hint)
        if origin is typing.Annotated:
            return self._annotated(hint, where)
        if origin in (typing.Required, typing.NotRequired, typing.Final):
            return self.of(get_args(hint)[0], where)
        if origin is Literal:
            return _values(get_args(hint))
        if origin in UNIONS:
            return self._union(get_args(hint), where)
        if hint in LISTS or origin in LISTS:
            return self._list(origin or hint, get_args(hint), where)
        if hint in MAPPINGS or origin in MAPPINGS:
            return self._mapping(get_args(hint), where)
        if isinstance(hint, typing.NewType):
            return self.of(hint.__supertype__, where)
        if isinstance(hint, typing.TypeVar):
            return {}
        if isinstance(hint, type):
            return self._class(hint, where)
        raise self._refuse(hint, where)

    def _refuse(self, hint: Any, where: str) -> ToolError:
        return ToolError(
            f"tool {self.tool!r}: {where} is a {hint!r}, which has no JSON form: use text, numbers, lists, "
            "dicts, dataclasses or Literal, or declare the tool with Tool(…)",
            "tools",
        )

    def _annotated(self, hint: Any, where: str) -> dict[str, Any]:
        inner, *notes = get_args(hint)
        schema = self.of(inner, where)
        for note in notes:
            text = note if isinstance(note, str) else getattr(note, "description", None)
            if isinstance(text, str):
                schema = {**schema, "description": " ".join(text.split())}
        return schema

    def _union(self, members: tuple[Any, ...], where: str) -> dict[str, Any]:
        schemas = [self.of(member, where) for member in members]
        plain = [s["type"] for s in schemas if s.keys() == {"type"} and s["type"] not in ("object", "array")]
        return {"type": plain} if len(plain) == len(schemas) else {"anyOf": schemas}

    def _list(self, kind: Any, items: tuple[Any, ...], where: str) -> dict[str, Any]:
        if kind is tuple and items and items[-1] is not Ellipsis:
            parts = [self.of(item, where) for item in items]
            return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
        unique = {"uniqueItems": True} if kind in (set, frozenset, abc.Set) else {}
        of_items = {"items": self.of(items[0], where)} if items else {}
        return {"type": "array", **of_items, **unique}

    def _mapping(self, items: tuple[Any, ...], where: str) -> dict[str, Any]:
        if items and items[0] is not str:
            raise self._refuse(items[0], f"the key of {where}")
        value = self.of(items[1], where) if items else {}
        return {"type": "object", "additionalProperties": value} if value else {"type": "object"}

    def _class(self, hint: type, where: str) -> dict[str, Any]:
        if issubclass(hint, enum.Enum):
            return _values(tuple(member.value for member in hint))
        if not (dataclasses.is_dataclass(hint) or typing.is_typeddict(hint) or is_pydantic(hint)):
            raise self._refuse(hint, where)
        if hint not in self._name_of:
            name, count = hint.__name__, 1
            while name in self.definitions:
                count += 1
                name = f"{hint.__name__}_{count}"
            self._name_of[hint] = name
            self.definitions[name] = {}
            self.definitions[name] = self._fields(hint, name, where)
        return {"$ref": f"#/$defs/{self._name_of[hint]}"}

    def _fields(self, hint: Any, name: str, where: str) -> dict[str, Any]:
        if is_pydantic(hint):
            schema = hint.model_json_schema(ref_template="#/$defs/{model}")
            self.definitions.update(schema.pop("$defs", {}))
            # A model that refers to itself stands among its own definitions.
            itself = schema.get("$ref") == f"#/$defs/{name}"
            return self.definitions[name] if itself else schema
        description, documented = read_docstring(hint.__doc__)
        if dataclasses.is_dataclass(hint) and description.startswith(f"{name}("):
            description = ""  # the signature that dataclass() writes where there is no docstring
        hints = typing.get_type_hints(hint, include_extras=True)
        defaults: dict[str, Any] = {}
        if dataclasses.is_dataclass(hint):
            fields = [f for f in dataclasses.fields(hint) if f.init]
            optional = {f.name for f in fields if not (f.default is f.default_factory is dataclasses.MISSING)}
            defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
            names = [f.name for f in fields]
        else:
            names, optional = list(hints), hints.keys() - required_keys(hint, hints)
        properties = {}
        for field in names:
            schema = self.of(hints[field], f"{where}.{field}")
            if documented.get(field):
                schema = {**schema, "description": documented[field]}
            properties[field] = _with_default(schema, defaults[field]) if field in defaults else schema
        result: dict[str, Any] = {"type": "object", "properties": properties}
        result["required"] = [field for field in names if field not in optional]
        return {**result, "description": " ".join(description.split())} if description else result


def required_keys(hint: Any, hints: dict[str, Any]) -> set[str]:
    """The keys a TypedDict must have. Its own record misses marks in hints that were written as text."""
    marked = {name: get_origin(h) for name, h in hints.items()}
    by_total = hint.__required_keys__
    return {
        name
        for name, mark in marked.items()
        if mark is typing.Required or (name in by_total and mark is not typing.NotRequired)
    }


def is_pydantic(hint: Any) -> bool:
    """True for a pydantic model; asks for its method, so that pydantic need not be installed."""
    return isinstance(hint, type) and callable(getattr(hint, "model_json_schema", None))


def _values(values: tuple[Any, ...]) -> dict[str, Any]:
    """The schema of a fixed set of values."""
    plain = [value.value if isinstance(value, enum.Enum) else value for value in values]
    kinds = {type(value) for value in plain}
    kind = _SCALARS.get(kinds.pop()) if len(kinds) == 1 else None
    return {**(kind or {}), "enum": plain}


def _with_default(schema: dict[str, Any], default: Any) -> dict[str, Any]:
    """The schema with its default, where that is JSON; None says no more than that it may be left out."""
    if isinstance(default, enum.Enum):
        default = default.value
    if default is None:
        return schema
    try:
        return {**schema, "default": json.loads(json.dumps(default, allow_nan=False))}
    except (TypeError, ValueError, RecursionError):
        return schema
