"""Python types as the shape of an answer: pydantic models, dataclasses, TypedDicts, enums, list[int], .."""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

from typing_extensions import TypedDict

from mlx_gptoss.errors import SchemaError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def schema_of_type(hint: Any, field: str) -> dict[str, Any]:
    """The JSON schema of a type. Raises SchemaError for what is no type, or has no JSON form."""
    adapter = adapter_of(hint, field)
    with _refusing(hint, field):
        return adapter.json_schema()


def adapter_of(hint: Any, field: str) -> TypeAdapter[Any]:
    """What makes values of a type from JSON text. Raises SchemaError like `schema_of_type`."""
    # An alias made by `type X = ...` is of a class that typing and typing_extensions each have their own of.
    if not isinstance(hint, type | UnionType) and get_origin(hint) is None and not hasattr(hint, "__value__"):
        raise SchemaError(
            f"{field} is {hint!r:.80}: expected a JSON schema as a dict, or a type such as a pydantic model, "
            "a dataclass or list[str]",
            field,
        )
    from pydantic import TypeAdapter

    with _refusing(hint, field):
        return TypeAdapter(_portable(hint) if sys.version_info < (3, 12) else hint)


@contextmanager
def _refusing(hint: object, field: str) -> Iterator[None]:
    from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError

    try:
        yield
    except (PydanticUserError, PydanticUndefinedAnnotation, NameError, TypeError) as error:
        why = getattr(error, "message", str(error)).strip().splitlines()[0]
        raise SchemaError(f"{field} is {hint!r:.80}, which has no JSON form: {why}", field) from None


def _portable(hint: Any, within: tuple[object, ...] = ()) -> Any:
    """The hint with each `typing.TypedDict` in typing_extensions' form, which pydantic wants before 3.12."""
    if typing.is_typeddict(hint) and not any(hint is one for one in within):
        fields = {}
        for name, part in typing.get_type_hints(hint, include_extras=True).items():
            mark = get_origin(part)
            if mark in (Required, NotRequired):
                (part,) = get_args(part)
            else:
                mark = Required if name in hint.__required_keys__ else NotRequired
            fields[name] = mark[_portable(part, (*within, hint))]
        make: Any = TypedDict
        return make(hint.__name__, fields)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is None or origin is Literal:
        return hint
    if origin is Annotated:
        return Annotated[(_portable(parts[0], within), *hint.__metadata__)]
    made = tuple(_portable(part, within) for part in parts)
    if all(new is old for new, old in zip(made, parts, strict=True)):
        return hint
    return Union[made] if origin in (Union, UnionType) else origin[made]  # noqa: UP007
