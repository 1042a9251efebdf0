"""JSON Schema as TypeScript: what the library cannot say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.harmony import Conversation, Tool, render_text
from mlx_gptoss.harmony.typescript import TypeWriter, check_parameters


def written(schema: dict[str, Any]) -> tuple[str, str]:
    """(declarations, type) of a schema."""
    check_parameters(schema, "test")
    declarations, text = TypeWriter().write(schema)
    return "".join(declarations), text


def of(**value: Any) -> str:
    """The type of a property with this schema."""
    declarations, text = written({"type": "object", "properties": {"p": value}, "required": ["p"]})
    assert not declarations
    return text.removeprefix("{\np: ").removesuffix(",\n}")


STRING, NUMBER, NULL = {"type": "string"}, {"type": "number"}, {"type": "null"}
POINT = {"type": "object", "properties": {"x": NUMBER}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"const": "a"}, '"a"'),
        ({"const": 3}, "3"),
        ({"const": None}, "null"),
        ({"type": "string", "const": 'say "hi"'}, r'"say \"hi\""'),
        ({"enum": ["a", 1, None, True]}, '"a" | 1 | null | true'),
        ({"type": "integer", "enum": [1, 2]}, "1 | 2"),
        ({"type": ["string", "null"], "enum": ["a", None]}, '"a" | null'),
        ({"type": ["string", "null"]}, "string | null"),
        ({"type": "null"}, "null"),
        ({"type": "string", "nullable": True}, "string | null"),
        ({"anyOf": [STRING, NULL]}, "string | null"),
        ({"anyOf": [STRING, {"type": "string", "format": "date"}]}, "string"),
        ({"anyOf": [NUMBER, {"type": "array", "items": NUMBER}]}, "number | number[]"),
        ({"type": "array", "items": {"anyOf": [STRING, NUMBER]}}, "(string | number)[]"),
        ({"type": "array", "items": {"type": "array", "items": {"const": 1}}}, "1[][]"),
        ({"type": ["array", "null"], "items": STRING}, "string[] | null"),
        ({"type": "array", "prefixItems": [STRING, NUMBER]}, "[string, number]"),
        ({"type": "array", "prefixItems": [STRING], "items": NUMBER}, "[string, ...number[]]"),
        ({"items": STRING}, "string[]"),
        ({"allOf": [STRING]}, "string"),
        ({"allOf": [{"anyOf": [STRING, NUMBER]}, {"type": "string"}]}, "(string | number) & string"),
        ({"allOf": [STRING, {"minLength": 2}]}, "string"),
        ({"properties": {"x": NUMBER}}, "{\n    x?: number,\n    }"),
        (
            {"allOf": [POINT, {"type": "object", "properties": {"y": NUMBER}, "required": ["y"]}]},
            "{\n    x?: number,\n    y: number,\n    }",
        ),
        ({"type": "object", "additionalProperties": NUMBER}, "{\n    [key: string]: number,\n    }"),
        ({"type": "object", "additionalProperties": False}, "{\n    }"),
        (
            {"type": "object", "patternProperties": {"^x-": STRING}},
            '{\n    // Keys that match "^x-":\n    [key: string]: string,\n    }',
        ),
        ({"type": "object", "properties": {"x": NUMBER}, "anyOf": [{"required": ["x"]}, {}]}, None),
    ],
)
def test_what_the_library_calls_any_is_shown(schema: dict[str, Any], text: str | None) -> None:
    assert of(**schema) == (text or of(**POINT))


def test_a_reference_used_once_reads_as_if_it_were_written_in_place() -> None:
    inline = {"type": "object", "properties": {"p": {**POINT, "description": "mine"}}}
    by_ref = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/Point", "description": "mine"}},
        "$defs": {"Point": {**POINT, "description": "a point"}},
    }
    assert written(by_ref) == written(inline)
    assert "// mine" in written(by_ref)[1] and "a point" not in written(by_ref)[1]


def test_a_recursive_definition_is_declared_by_name() -> None:
    node = {
        "type": "object",
        "description": "A node.\nOf a tree.",
        "properties": {"value": STRING, "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
    }
    schema = {"type": "object", "properties": {"root": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": node}}
    declarations, text = written(schema)
    assert declarations == (
        "// A node.\n// Of a tree.\ntype Node = {\nvalue?: string,\nchildren?: Node[],\n};\n"
    )
    assert text == "{\nroot?: Node,\n}"


def test_definitions_that_refer_to_each_other_are_declared_once_each() -> None:
    schema = {
        "$ref": "#/$defs/A",
        "$defs": {
            "A": {"type": "object", "properties": {"b": {"$ref": "#/$defs/B"}}},
            "B": {"anyOf": [{"$ref": "#/$defs/A"}, NULL]},
        },
    }
    declarations, text = written(schema)
    assert declarations == "type A = {\nb?: B,\n};\ntype B = A | null;\n"
    assert text == "A"


def test_a_schema_that_refers_to_its_root_is_named() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    assert written(schema) == ("type Arguments = {\nnext?: Arguments,\n};\n", "Arguments")


def test_a_reference_to_itself_does_not_hang() -> None:
    assert written({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}) == ("type A = A;\n", "A")


def test_a_chain_of_doubled_references_stays_linear() -> None:
    count = 40
    definitions: dict[str, Any] = {
        f"D{i}": {"type": "object", "properties": {k: {"$ref": f"#/$defs/D{i + 1}"} for k in "ab"}}
        for i in range(count)
    }
    definitions[f"D{count}"] = POINT
    declarations, _ = written({"$ref": "#/$defs/D0", "$defs": definitions})
    assert len(declarations) < 100 * count


def test_tools_share_equal_definitions_and_keep_different_ones_apart() -> None:
    def tool(name: str, kind: str) -> Tool:
        node = {"type": "object", "properties": {"v": {"type": kind}, "n": {"$ref": "#/$defs/Node"}}}
        return Tool(name, "", {"$ref": "#/$defs/Node", "$defs": {"Node": node}})

    text = render_text(
        Conversation([], tools=[tool("a", "string"), tool("b", "string"), tool("c", "number")])
    )
    assert text.count("type Node = ") == text.count("type Node_2 = ") == 1
    assert "type a = (_: Node) => any;" in text and "type b = (_: Node) => any;" in text
    assert "type c = (_: Node_2) => any;" in text


def test_a_definition_never_takes_the_name_of_a_tool() -> None:
    node = {"type": "object", "properties": {"n": {"$ref": "#/$defs/add"}}}
    text = render_text(
        Conversation([], tools=[Tool("add", "", {"$ref": "#/$defs/add", "$defs": {"add": node}})])
    )
    assert "type add = (_: add_2) => any;" in text


@pytest.mark.parametrize(
    "keyword",
    ["not", "if", "dependentSchemas", "dependentRequired", "dependencies", "$dynamicRef", "$recursiveRef"],
)
def test_a_keyword_that_changes_the_meaning_is_named_and_refused(keyword: str) -> None:
    schemas: list[dict[str, Any]] = [{keyword: {}}, {"properties": {"a": {"items": {keyword: {}}}}}]
    for schema in schemas:
        with pytest.raises(SchemaError) as caught:
            Tool("f", "", schema)
        assert repr(keyword) in str(caught.value) and "'f'" in str(caught.value)
        assert caught.value.field == "parameters"


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strin"}, "'strin'"),
        ({"type": {"a": 1}}, "type"),
        ({"properties": []}, "properties: expected an object"),
        ({"properties": {"a": 5}}, "#/properties/a: a int"),
        ({"required": "a"}, "required: expected a list"),
        ({"anyOf": []}, "anyOf: expected a list"),
        ({"enum": "a"}, "enum: expected a list"),
        ({"$ref": "#/$defs/Gone"}, "'#/$defs/Gone' leads nowhere"),
        ({"$ref": "other.json#/a"}, "'other.json#/a' leads nowhere"),
        ({"items": [{}, 5]}, "#/items/1: a int"),
        ({"items": 5}, "#/items: a int"),
        ({"const": float("nan")}, "not JSON"),
        ({"const": b"x"}, "not JSON"),
        ([], "expected a dict"),
        ("object", "expected a dict"),
    ],
)
def test_an_invalid_schema_is_refused_with_its_place(schema: Any, said: str) -> None:
    with pytest.raises(SchemaError) as caught:
        Tool("f", "", schema)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_depth_has_a_limit_and_an_error() -> None:
    Tool("f", "", nested(60))
    for depth in (70, 100_000):
        with pytest.raises(SchemaError, match="deep"):
            Tool("f", "", nested(depth))
    chain = {f"D{i}": {"items": {"$ref": f"#/$defs/D{i + 1}"}} for i in range(3000)}
    with pytest.raises(SchemaError, match="deep"):
        Tool("f", "", {"$ref": "#/$defs/D0", "$defs": {**chain, "D3000": {}}})


def test_limits_on_values_are_accepted_and_not_shown() -> None:
    limited = {"type": "string", "minLength": 1, "pattern": "^a", "format": "date"}
    assert of(**limited) == "string"
    assert of(type="integer", minimum=1, multipleOf=2) == "number"
    assert of(type="array", items=STRING, minItems=1, uniqueItems=True) == "string[]"
