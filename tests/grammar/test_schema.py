"""Schemas: what can be enforced, what is refused and how, and replies read back as data."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

import pydantic
import pytest

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.grammar import ResponseFormat, json_schema_of, parse_reply
from mlx_gptoss.grammar.schema import arguments_schema
from mlx_gptoss.harmony import Tool
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.constraints import constrain


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Circle(pydantic.BaseModel):
    kind: Literal["circle"]
    radius: float = pydantic.Field(gt=0, lt=10)


class Square(pydantic.BaseModel):
    kind: Literal["square"]
    side: int


class Drawing(pydantic.BaseModel):
    title: str = pydantic.Field(min_length=1, max_length=20)
    colour: Colour
    shapes: list[Circle | Square] = pydantic.Field(max_length=3)
    one: Circle | Square = pydantic.Field(discriminator="kind")
    parent: Drawing | None = None


class Even(pydantic.BaseModel):
    n: int

    @pydantic.field_validator("n")
    @classmethod
    def even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("is odd")
        return value


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "contains": {"type": "integer"}}, "contains"),
        ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "if"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"$dynamicRef": "#meta"}, r"\$dynamicRef"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "zip-code"}, "format 'zip-code'"),
        ({"type": "object", "minProperties": 2, "properties": {"a": {}, "b": {}}}, "Properties"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "https://example.com/x.json"}, "example.com"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}, "matches no text"),
        ({"type": "strin"}, "strin"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": []}, "empty"),
        ({"type": "object", "required": "a"}, "required"),
    ],
)
def test_what_cannot_be_enforced_is_named_and_not_ignored(
    tok: Tokenizer, schema: dict[str, Any], named: str
) -> None:
    with pytest.raises(SchemaError, match=named) as caught:
        constrain(tok, schema=schema)
    assert caught.value.field == "schema"
    assert "\n" not in str(caught.value)


def test_the_error_tells_where_the_keyword_stands(tok: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(SchemaError, match=r"uniqueItems \(at #/properties/tags\): remove it"):
        constrain(tok, schema=schema)


def test_a_schema_cannot_switch_the_checks_off(tok: Tokenizer) -> None:
    with pytest.raises(SchemaError, match="uniqueItems"):
        constrain(tok, schema={"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True})


def test_a_schema_nested_beyond_measure_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(SchemaError, match="not made of JSON values"):
        json_schema_of(schema)


@pytest.mark.parametrize("schema", [5, "x", ["a"], {"enum": {1, 2}}, {"const": float("nan")}, {1: object()}])
def test_what_is_not_a_schema_is_refused(tok: Tokenizer, schema: Any) -> None:
    with pytest.raises(SchemaError, match="schema"):
        constrain(tok, schema=schema)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"regex": "a(b"}, "regex"),
        ({"regex": ""}, "regex"),
        ({"lark": "start: nowhere"}, "nowhere"),
        ({"lark": 7}, "lark"),
        ({"choices": []}, "choices"),
        ({"choices": "abc"}, "choices"),
        ({"choices": ["a", ""]}, "choices"),
    ],
)
def test_grammars_that_cannot_be_used_are_refused(
    tok: Tokenizer, request_: dict[str, Any], named: str
) -> None:
    with pytest.raises(SchemaError, match=named) as caught:
        constrain(tok, **request_)
    assert "\n" not in str(caught.value)


def test_a_tool_whose_schema_cannot_be_enforced_is_refused_or_takes_any_object(tok: Tokenizer) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    tools = [Tool("collect", parameters=parameters)]
    with pytest.raises(SchemaError, match="parameters of collect: cannot enforce the keyword uniqueItems"):
        constrain(tok, tools=tools)
    assert constrain(tok, tools=tools, strict_tools=False) is not None


def test_arguments_that_a_tool_does_not_declare_are_closed_off() -> None:
    closed = arguments_schema({"properties": {"a": {}}}, "p")
    assert closed == {"type": "object", "properties": {"a": {}}, "additionalProperties": False}
    declared_open = {"type": "object", "additionalProperties": {"type": "integer"}}
    assert arguments_schema(declared_open, "p") == declared_open
    with pytest.raises(SchemaError, match="object"):
        arguments_schema({"type": "string"}, "p")


def test_pydantic_models_are_schemas(tok: Tokenizer) -> None:
    assert json_schema_of(Drawing) == Drawing.model_json_schema()
    assert constrain(tok, schema=Drawing) is not None


def test_replies_come_back_as_data_or_as_the_model() -> None:
    assert parse_reply('{"n": [1, 2.5, null]}', {"type": "object"}) == {"n": [1, 2.5, None]}
    assert parse_reply("[1]", None) == [1]
    text = '{"title": "t", "colour": "red", "shapes": [], "one": {"kind": "square", "side": 2}}'
    drawing = parse_reply(text, Drawing)
    assert isinstance(drawing, Drawing)
    assert drawing.colour is Colour.RED
    assert drawing.one == Square(kind="square", side=2)


def test_an_answer_is_read_as_its_form_says() -> None:
    class Sum(pydantic.BaseModel):
        n: int

    text = '{"n": 3}'
    forms = [
        ResponseFormat.of(**given) for given in ({"schema": Sum}, {"json_object": True}, {"regex": ".*"})
    ]
    assert [form and form.parse(text) for form in forms] == [Sum(n=3), {"n": 3}, None]
    assert ResponseFormat.of() is None


def test_a_reply_that_was_cut_has_no_data() -> None:
    assert parse_reply('{"n": 1', {"type": "object"}) is None
    assert parse_reply("", Even) is None


def test_a_reply_that_a_models_own_validator_refuses_is_an_error() -> None:
    with pytest.raises(SchemaError, match=r"Even's validation \(n: Value error, is odd\)"):
        parse_reply('{"n": 3}', Even)
