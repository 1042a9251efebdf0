"""References may follow one another so far and no further."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.grammar.references import MAX_DEPTH, check_lark_references, check_schema_references


def schema(references: int) -> dict[str, Any]:
    """References that follow one another, down to a string."""
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(1, references)}
    return {"$ref": "#/$defs/a1", "$defs": {**links, f"a{references}": {"type": "string"}}}


def lark(rules: int) -> str:
    """Rules that follow one another, down to a letter."""
    return "start: r1\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(1, rules)) + f'r{rules}: "x"\n'


def test_as_many_as_are_allowed_pass() -> None:
    check_schema_references(schema(MAX_DEPTH), "schema")
    check_lark_references(lark(MAX_DEPTH), "lark")


def test_one_more_is_refused_with_the_field() -> None:
    with pytest.raises(SchemaError, match=rf"more than {MAX_DEPTH} \$ref") as caught:
        check_schema_references(schema(MAX_DEPTH + 1), "schema")
    assert caught.value.field == "schema"
    with pytest.raises(SchemaError, match=f"more than {MAX_DEPTH} rules") as caught:
        check_lark_references(lark(MAX_DEPTH + 1), "lark")
    assert caught.value.field == "lark"


@pytest.mark.parametrize("place", ["enum", "const", "$defs", "definitions"])
def test_what_is_no_schema_is_not_followed(place: str) -> None:
    value = [schema(MAX_DEPTH + 1)] if place == "enum" else {"x": schema(MAX_DEPTH + 1)}
    links = schema(MAX_DEPTH + 1)["$defs"]
    check_schema_references({place: value, "title": "a"} | ({} if "def" in place else {"$defs": links}), "s")


def test_names_in_texts_patterns_and_comments_are_no_rules() -> None:
    long = lark(MAX_DEPTH + 1).partition("\n")[2]
    check_lark_references('start: "r1" /r1/ // r1\n' + long, "lark")
    with pytest.raises(SchemaError):
        check_lark_references('start: "a" /b/ r1 // c\n' + long, "lark")


def test_rules_and_references_that_go_round_end() -> None:
    check_lark_references("start: a\na: b\nb: a | start\n", "lark")
    check_schema_references({"properties": {"a": {"$ref": "#"}, "b": {"$ref": "#/nowhere"}}}, "schema")
