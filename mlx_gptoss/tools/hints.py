"""Type hints in two forms: the JSON schema that a model is shown, and the pydantic schema that checks and
converts what it writes.

Values are read strictly, as JSON: no text for a number, no number for a date. Where pydantic is looser or
knows less, its schema is put together here: 3.0 is a whole number, dates are ISO text only, unions take the
first member that fits, an `Iterable` is a list, and dataclasses are made by their own `__init__`.
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
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core import core_schema as core

from mlx_gptoss.errors import ToolError
from mlx_gptoss.harmony.schema import is_model
from mlx_gptoss.tools.docstrings import read_docstring

REQUIRED: Any = inspect.Parameter.empty  # stands where a default would
STRICT = core.CoreConfig(strict=True)
# Names that are missing or unknown, as a type of error; and a union's mark in the place of an error.
WRONG_NAMES, BRANCH = "wrong_names", "\0"


class Form(NamedTuple):
    """What a model is shown of a type hint, and what checks a value against it."""

    shown: dict[str, Any]
    checked: CoreSchema

    def noting(self, **notes: Any) -> Form:
        """This form with more in its JSON schema."""
        return self._replace(shown={**self.shown, **notes})


def _text(read: abc.Callable[[str], Any]) -> CoreSchema:
    return core.no_info_after_validator_function(read, core.str_schema())


def _iso(kind: Any) -> CoreSchema:
    words = f"expected a {kind.__name__} in ISO form"
    return core.custom_error_schema(_text(kind.fromisoformat), "iso", custom_error_message=words)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_NONE = type(None)
_ANYTHING = Form({}, core.any_schema())
_SCALARS: dict[Any, Form] = {
    str: Form({"type": "string"}, core.str_schema()),
    int: Form({"type": "integer"}, core.no_info_before_validator_function(_whole, core.int_schema())),
    float: Form({"type": "number"}, core.float_schema()),
    bool: Form({"type": "boolean"}, core.bool_schema()),
    _NONE: Form({"type": "null"}, core.none_schema()),
    Any: _ANYTHING,
    object: _ANYTHING,
    datetime.datetime: Form({"type": "string", "format": "date-time"}, _iso(datetime.datetime)),
    datetime.date: Form({"type": "string", "format": "date"}, _iso(datetime.date)),
    datetime.time: Form({"type": "string", "format": "time"}, _iso(datetime.time)),
    uuid.UUID: Form({"type": "string", "format": "uuid"}, core.uuid_schema()),
    decimal.Decimal: Form({"type": "string"}, core.decimal_schema()),
    pathlib.Path: Form({"type": "string"}, _text(pathlib.Path)),
}
_SETS = {set: core.set_schema, abc.Set: core.set_schema, frozenset: core.frozenset_schema}
_LISTS = (list, tuple, abc.Sequence, abc.Iterable, abc.Collection, *_SETS)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)


class Hints:
    """Reads the type hints of one tool. Classes go to `definitions`, so that they may refer to themselves."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.definitions: dict[str, Any] = {}
        self._checked: dict[str, CoreSchema] = {}
        self._name_of: dict[type, str] = {}

    def read(self, thing: Any) -> dict[str, Any]:
        """The type hints of a function or class. Raises ToolError."""
        try:
            return typing.get_type_hints(thing, include_extras=True)
        except (TypeError, NameError, AttributeError) as error:
            raise ToolError(
                f"tool {self.tool!r}: its type hints cannot be read ({error}): import what they name, or "
                "declare the tool with Tool(…)",
                "tools",
            ) from None

    def record(
        self,
        fields: abc.Mapping[str, tuple[Any, Any]],
        documented: abc.Mapping[str, str],
        where: str = "",
        make: abc.Callable[..., Any] = dict,
    ) -> Form:
        """An object with these fields, (hint, default) by name: `make` is called with those that are given.
        A default of None says no more than that the field may be left out. Raises ToolError.
        """
        forms = {}
        for name, (hint, default) in fields.items():
            form = self._of(hint, f"{where}.{name}" if where else f"argument {name!r}")
            if documented.get(name):
                form = form.noting(description=documented[name])
            forms[name] = form if default is REQUIRED else _with_default(form, default)
        required = [name for name, (_, default) in fields.items() if default is REQUIRED]

        def check(given: dict[str, Any]) -> Any:
            missing = [name for name in required if name not in given]
            unknown = [name for name in given if name not in forms]
            said = [f"missing {', '.join(missing)}"] if missing else []
            said += [f"unknown {', '.join(unknown)}"] if unknown else []
            if said:
                text = f"{'; '.join(said)}; expected {', '.join(forms) or 'none'}"
                raise PydanticCustomError(WRONG_NAMES, "{text}", {"text": text})
            try:
                return make(**given)
            except (TypeError, ValueError) as error:
                raise PydanticCustomError("refused", "{text}", {"text": str(error)}) from None

        shown = {"properties": {name: form.shown for name, form in forms.items()}, "required": required}
        parts = {name: core.typed_dict_field(f.checked, required=False) for name, f in forms.items()}
        checked = core.typed_dict_schema(parts, extra_behavior="allow", config=STRICT)
        return Form({"type": "object", **shown}, core.no_info_after_validator_function(check, checked))

    def with_definitions(self, form: Form) -> Form:
        """A form together with the classes that it refers to."""
        if not self.definitions:
            return form
        checked = core.definitions_schema(form.checked, list(self._checked.values()))
        return Form({**form.shown, "$defs": self.definitions}, checked)

    def _of(self, hint: Any, where: str) -> Form:
        try:
            if hint in _SCALARS:
                return _SCALARS[hint]
        except TypeError:  # a Literal or Annotated of something that cannot be hashed
            pass
        origin, inner = get_origin(hint), get_args(hint)
        if origin is typing.Annotated:
            return self._annotated(inner[0], inner[1:], where)
        if origin in (typing.Required, typing.NotRequired, typing.Final):
            return self._of(inner[0], where)
        if origin is Literal:
            return _values(inner)
        if origin in (Union, types.UnionType):
            return self._union(inner, where)
        if hint in _LISTS or origin in _LISTS:
            return self._list(origin or hint, inner, where)
        if hint in _MAPPINGS or origin in _MAPPINGS:
            return self._mapping(inner, where)
        if isinstance(hint, typing.NewType):
            return self._of(hint.__supertype__, where)
        if isinstance(hint, typing.TypeVar):
            return _ANYTHING
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return _values(tuple(hint))
        if isinstance(hint, type) and (
            dataclasses.is_dataclass(hint) or typing.is_typeddict(hint) or is_model(hint)
        ):
            return self._class(hint, where)
        raise self._refuse(hint, where)

    def _refuse(self, hint: Any, where: str) -> ToolError:
        return ToolError(
            f"tool {self.tool!r}: {where} is a {hint!r}, which has no JSON form: use text, numbers, lists, "
            "dicts, dataclasses or Literal, or declare the tool with Tool(…)",
            "tools",
        )

    def _annotated(self, hint: Any, notes: tuple[Any, ...], where: str) -> Form:
        form = self._of(hint, where)
        limits: list[Any] = []
        for note in notes:
            text = note if isinstance(note, str) else getattr(note, "description", None)
            if isinstance(text, str):
                form = form.noting(description=" ".join(text.split()))
            if not isinstance(note, str):
                limits += getattr(note, "metadata", [note])  # what a pydantic Field asks for beside its texts
        if not limits:
            return form
        from pydantic import TypeAdapter

        limited = TypeAdapter(typing.Annotated[(Any, *limits)]).core_schema
        return form._replace(checked=core.chain_schema([form.checked, limited]))

    def _union(self, members: tuple[Any, ...], where: str) -> Form:
        forms = [self._of(member, where) for member in members]
        shown = [form.shown for form in forms]
        plain = [s["type"] for s in shown if s.keys() == {"type"} and s["type"] not in ("object", "array")]
        choices = [f.checked for f, member in zip(forms, members, strict=True) if member is not _NONE]
        checked: CoreSchema = core.union_schema([(c, BRANCH) for c in choices], mode="left_to_right")
        if len(choices) < len(forms):
            checked = core.nullable_schema(checked)
        return Form({"type": plain} if len(plain) == len(shown) else {"anyOf": shown}, checked)

    def _list(self, kind: Any, items: tuple[Any, ...], where: str) -> Form:
        if kind is tuple and items and items[-1] is not Ellipsis:
            forms = [self._of(item, where) for item in items]
            limits = {"minItems": len(forms), "maxItems": len(forms)}
            shown = {"type": "array", "prefixItems": [form.shown for form in forms], **limits}
            return Form(shown, core.tuple_schema([form.checked for form in forms]))
        item = self._of(items[0], where) if items else _ANYTHING
        shown = {"type": "array", **({"items": item.shown} if items else {})}
        if kind in _SETS:
            return Form({**shown, "uniqueItems": True}, _SETS[kind](item.checked))
        if kind is tuple:
            return Form(shown, core.tuple_schema([item.checked], variadic_item_index=0))
        return Form(shown, core.list_schema(item.checked))

    def _mapping(self, items: tuple[Any, ...], where: str) -> Form:
        if items and items[0] is not str:
            raise self._refuse(items[0], f"the key of {where}")
        value = self._of(items[1], where) if items else _ANYTHING
        shown = {"type": "object", **({"additionalProperties": value.shown} if value.shown else {})}
        return Form(shown, core.dict_schema(core.str_schema(), value.checked))

    def _class(self, hint: Any, where: str) -> Form:
        if hint not in self._name_of:
            name, count = hint.__name__, 1
            while name in self.definitions:
                count += 1
                name = f"{hint.__name__}_{count}"
            self._name_of[hint] = name
            self.definitions[name] = {}
            form = self._model(hint, name) if is_model(hint) else self._fields(hint, where)
            self.definitions[name] = form.shown
            self._checked[name] = core.chain_schema([form.checked], ref=name)
        name = self._name_of[hint]
        return Form({"$ref": f"#/$defs/{name}"}, core.definition_reference_schema(name))

    def _model(self, hint: Any, name: str) -> Form:
        """A pydantic model, as pydantic has it."""
        from pydantic import TypeAdapter

        shown = hint.model_json_schema(ref_template="#/$defs/{model}")
        self.definitions.update(shown.pop("$defs", {}))
        if shown.get("$ref") == f"#/$defs/{name}":  # it refers to itself, and stands among its definitions
            shown = self.definitions[name]
        checked = TypeAdapter(hint).core_schema
        if checked["type"] == "definitions":  # several models may bring the same ones along
            self._checked.update({part["ref"]: part for part in checked["definitions"]})
            checked = checked["schema"]
        return Form(shown, checked)

    def _fields(self, hint: Any, where: str) -> Form:
        """A dataclass or a TypedDict."""
        description, documented = read_docstring(hint.__doc__)
        hints = self.read(hint)
        if typing.is_typeddict(hint):
            # Its own record of required keys misses marks in hints that were written as text.
            marks = {name: get_origin(h) for name, h in hints.items()}
            required = hint.__required_keys__ - {n for n, mark in marks.items() if mark is typing.NotRequired}
            required |= {n for n, mark in marks.items() if mark is typing.Required}
            fields = {name: (h, REQUIRED if name in required else None) for name, h in hints.items()}
            form = self.record(fields, documented, where)
        else:
            if description.startswith(f"{hint.__name__}("):
                description = ""  # the signature that dataclass() writes where there is no docstring
            fields = {f.name: (hints[f.name], _default(f)) for f in dataclasses.fields(hint) if f.init}
            form = self.record(fields, documented, where, hint)
        return form.noting(description=" ".join(description.split())) if description else form


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return REQUIRED if field.default_factory is dataclasses.MISSING else None


def _with_default(form: Form, default: Any) -> Form:
    """The form with its default, where that is JSON and not None."""
    if isinstance(default, enum.Enum):
        default = default.value
    try:
        plain = json.loads(json.dumps(default, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return form
    return form if plain is None else form.noting(default=plain)


def _values(values: tuple[Any, ...]) -> Form:
    """A fixed set of values; a member of an enum is written as its value."""
    plain = [value.value if isinstance(value, enum.Enum) else value for value in values]
    kinds = {type(value) for value in plain}
    kind = _SCALARS.get(kinds.pop()) if len(kinds) == 1 else None
    # By their JSON text, for 1, 1.0 and true are equal in Python.
    value_of = {json.dumps(text, default=repr): value for text, value in zip(plain, values, strict=True)}

    def choose(given: Any) -> Any:
        text = json.dumps(given)
        if text not in value_of:
            raise PydanticCustomError("value", "expected one of {values}", {"values": ", ".join(value_of)})
        return value_of[text]

    shown = {**(kind.shown if kind else {}), "enum": plain}
    return Form(shown, core.no_info_plain_validator_function(choose))
