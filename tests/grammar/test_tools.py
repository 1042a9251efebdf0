"""Tools as clients declare them: no unusual schema of one may cost the whole request."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.harmony import Tool
from mlx_gptoss.harmony.schema import without_refused
from mlx_gptoss.harmony.typescript import TypeWriter
from mlx_gptoss.server import ServerSettings
from mlx_gptoss.server.translate.options import choose_tools, function_tool
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.constraints import constrain
from tests.support.scripted_llm import ScriptedLLM

pytest_plugins = ["tests.support.server_fixtures"]

UNUSUAL: list[dict[str, Any]] = [
    {"anyOf": [{"not": {}}, {"type": "string"}]},
    {"anyOf": [{"type": "string"}, {"not": {"type": "null"}}]},
    {"oneOf": [{"not": {}}]},
    {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {}},
    {"type": "object", "dependentRequired": {"a": ["b"]}, "dependentSchemas": {"a": {}}},
    {"type": "any"},
    {"type": ["string", "any"]},
    {"type": None},
    {"type": "string", "enum": None},
    {"type": "object", "additionalProperties": None, "properties": None},
    {"type": "object", "properties": {"a": None}, "required": True},
    {"type": "string", "required": True},
    {"type": "array", "items": None, "prefixItems": []},
    {"allOf": [], "anyOf": None},
    {"$ref": "#/$defs/Nobody"},
    {"$ref": None},
]


def around(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": schema, "y": {"type": "integer"}}, "required": ["y"]}


def tool_of(parameters: dict[str, Any]) -> Tool:
    return function_tool({"name": "f", "parameters": parameters}, ServerSettings(), "tools[0]")


@pytest.mark.parametrize("schema", UNUSUAL, ids=json.dumps)
def test_an_unusual_schema_is_shown_as_far_as_it_can_be(
    scripted: TestClient, llm: ScriptedLLM, schema: dict[str, Any]
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": around(schema)}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "none"}
    response = scripted.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    shown = llm.seen[-1][0].tools[0].parameters
    assert shown is not None and shown["properties"]["y"] == {"type": "integer"}
    assert shown["required"] == ["y"]


def test_what_must_be_absent_leaves_the_other_choice() -> None:
    tool = tool_of(around({"anyOf": [{"not": {}}, {"type": "string"}]}))
    assert tool.parameters is not None
    assert "x?: string," in TypeWriter().write(tool.parameters)[1]


def test_arguments_that_may_be_null_are_an_object() -> None:
    assert tool_of({"type": ["object", "null"], "properties": {}}).parameters == {
        "type": "object",
        "properties": {},
    }


@pytest.mark.parametrize("schema", UNUSUAL, ids=json.dumps)
def test_a_tool_made_in_python_is_told_what_it_lost(schema: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        Tool("f", parameters=around(schema))


def test_a_schema_without_anything_unusual_stays_as_it_is() -> None:
    usual = {
        "type": "object",
        "description": "All of it.",
        "properties": {
            "a": {"type": ["string", "null"], "default": None, "minLength": 1},
            "b": {"enum": [None, 1], "examples": [None]},
            "c": {"const": None},
            "d": {"type": "array", "items": {"$ref": "#/$defs/D"}, "uniqueItems": True},
            "not": {"type": "string"},
        },
        "required": ["a", "not"],
        "additionalProperties": False,
        "$defs": {"D": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/D"}]}},
    }
    before = copy.deepcopy(usual)
    assert without_refused(usual) == before == usual


KEYWORDS = ("type", "enum", "required", "properties", "anyOf", "oneOf", "allOf", "items", "not", "const")
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([None, True, False, 1, "x", "string", "any", "object", [], {}, ["object", "null"]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYWORDS), VALUES, max_size=5))
def test_any_json_is_a_schema_that_can_be_shown_and_compiled(tokenizer: Tokenizer, schema: Any) -> None:
    tool = tool_of(around(schema))
    assert constrain(tokenizer, tools=[tool], strict_tools=False) is not None


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_may_list_tools_that_are_not_functions(mode: str) -> None:
    f, g = Tool("f"), Tool("g")
    listed = [{"type": "custom", "name": "patch"}, {"type": "web_search"}, {"type": "function", "name": "g"}]
    choice = {"type": "allowed_tools", "mode": mode, "tools": listed}
    assert choose_tools(choice, [f, g]) == ([g], mode)
