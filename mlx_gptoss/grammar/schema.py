"""JSON schemas: from dicts and Python types to grammars, and replies back to data.

Nothing in a schema is dropped: a keyword that the grammar cannot enforce is a SchemaError that names it.
Annotations (title, description, default, examples, ...) constrain nothing and pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from llguidance import LLMatcher

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.grammar.types import adapter_of, schema_of_type

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    Schema: TypeAlias = Mapping[str, Any] | TypeForm[Any]
else:
    Schema: TypeAlias = Any

# JSON allows any amount of white space between its parts, and a model may well spend all its tokens there.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
FORMATS = "date-time, time, date, duration, email, hostname, ipv4, ipv6, uuid, uri"
# What may admit arguments that `properties` does not name.
_OPENING = {"additionalProperties", "patternProperties", "minProperties", "$ref", "allOf", "anyOf", "oneOf"}
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*)\]")
_UNKNOWN_FORMAT = re.compile(r"Unknown format: (.*)")


def json_schema_of(schema: Schema, field: str = "schema") -> dict[str, Any]:
    """The JSON schema of a dict, or of a type as pydantic has it, as a plain dict.

    Raises SchemaError when it is neither, or not made of JSON values.
    """
    if not isinstance(schema, Mapping):
        return schema_of_type(schema, field)
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(schema), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(
            f"{field} is not made of JSON values ({error}): use plain dicts, lists, text and numbers", field
        ) from None
    return plain


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """The llguidance grammar of the JSON texts that a JSON schema (of JSON values) admits."""
    # In an open object a key written with \u escapes could spell a declared key and dodge its schema.
    escapes = 'nrbtf\\"' if _has_open_object(schema) else 'nrbtf\\"u'
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema, ensure_ascii=False),
        overrides={
            "whitespace_pattern": WHITESPACE,
            "json_allowed_escapes": escapes,
            "lenient": False,
            "coerce_one_of": False,
        },
    )


def arguments_schema(parameters: Mapping[str, Any] | None, field: str) -> dict[str, Any]:
    """The schema that a call's arguments follow: the tool's own, without arguments it does not declare.

    A tool without parameters takes `{}`. Raises SchemaError when `parameters` is not a schema.
    """
    schema = json_schema_of(parameters if parameters is not None else {"type": "object"}, field)
    schema.setdefault("type", "object")
    if schema["type"] != "object":
        raise SchemaError(f"{field} has the type {schema['type']!r}: parameters are an object", field)
    if not _OPENING & schema.keys():
        schema["additionalProperties"] = False
    return schema


def schema_error(message: str, schema: object, field: str) -> SchemaError:
    """What llguidance says against a schema, in one line with the keyword, its place and the cure."""
    lines = message.strip().splitlines() or ["unknown reason"]
    # A regex's syntax error comes with a drawing; its last line of words says what is wrong.
    first = next((line for line in lines if line.startswith("error: ")), lines[0])
    if found := _UNIMPLEMENTED.search(message):
        keywords = json.loads(f"[{found[1]}]")
        named = ", ".join(f"{k} (at {_place(schema, k)})" for k in keywords)
        return SchemaError(
            f"{field}: cannot enforce the keyword {named}: remove it and check the reply yourself", field
        )
    if found := _UNKNOWN_FORMAT.search(message):
        return SchemaError(
            f"{field}: cannot enforce the format {found[1]!r} (at {_place(schema, 'format', found[1])}): "
            f"use one of {FORMATS}, or a pattern",
            field,
        )
    if "oneOf" in first:
        return SchemaError(
            f"{field}: cannot enforce the keyword oneOf (at {_place(schema, 'oneOf')}), "
            "because its branches overlap: use anyOf",
            field,
        )
    return SchemaError(f"{field} cannot be used: {first}", field)


def parse_reply(text: str, schema: Schema | None) -> Any:
    """A constrained reply as data: what JSON gives, or a value of the type.

    None when the text is not a whole JSON value (a reply cut by max_tokens). Raises SchemaError when the
    type's own validators refuse a whole reply.
    """
    try:
        data = json.loads(text)
    except ValueError:
        return None
    if schema is None or isinstance(schema, Mapping):
        return data
    from pydantic import ValidationError

    try:
        return adapter_of(schema, "schema").validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the whole"
        name = schema.__name__ if isinstance(schema, type) else str(schema)
        raise SchemaError(
            f"the reply does not pass {name}'s validation ({place}: {problem['msg']})", "schema"
        ) from None


def _subschemas(schema: object, path: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dict in a schema with its JSON pointer; those of `properties`, `enum` and such included."""
    if isinstance(schema, dict):
        yield path, schema
        for key, value in schema.items():
            yield from _subschemas(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for i, value in enumerate(schema):
            yield from _subschemas(value, f"{path}/{i}")


def _place(schema: object, key: str, value: object = None) -> str:
    for path, part in _subschemas(schema):
        if key in part and (value is None or part[key] == value):
            return path
    return "#"


def _has_open_object(schema: Mapping[str, Any]) -> bool:
    return any(
        isinstance(part.get("properties"), dict) and part.get("additionalProperties") is not False
        for _, part in _subschemas(dict(schema))
    )
