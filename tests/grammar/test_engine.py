"""Constraints through the real engine, over a checkpoint of random weights that knows no format at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jsonschema
import pytest

import mlx_gptoss
from mlx_gptoss.errors import SchemaError
from mlx_gptoss.harmony import Message, Reply, Tool
from mlx_gptoss.llm import LLM

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(text_folder: Path) -> Iterator[LLM]:
    with mlx_gptoss.load(text_folder, max_context=2048, kv_budget=2**28) as engine:
        yield engine


@pytest.mark.parametrize("seed", range(3))
def test_random_weights_write_valid_json_within_their_budget(llm: LLM, seed: int) -> None:
    reply = llm.respond("x", schema=SCHEMA, temperature=1.5, seed=seed, reasoning_budget=5, max_tokens=1500)
    assert reply.finish_reason == "stop"
    jsonschema.validate(reply.parsed, SCHEMA)
    assert json.loads(reply.text) == reply.parsed
    assert reply.usage.reasoning_tokens <= 5 + len("<|channel|>analysis<|message|><|end|>")
    assert not reply.diagnostics


@pytest.mark.parametrize("seed", range(2))
def test_random_weights_call_the_tool_that_is_required(llm: LLM, seed: int) -> None:
    tools = [Tool("keep", parameters=SCHEMA), Tool("drop", parameters=SCHEMA)]
    reply = llm.respond(
        "x",
        tools=tools,
        tool_choice=("named", "keep"),
        temperature=1.5,
        seed=seed,
        reasoning_budget=0,
        max_tokens=1500,
    )
    assert reply.finish_reason == "tool_calls"
    assert [call.name for call in reply.tool_calls] == ["keep"]
    jsonschema.validate(json.loads(reply.tool_calls[0].arguments), SCHEMA)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_history_with_calls_is_continued_without_tools(llm: LLM, choice: Literal["auto", "none"]) -> None:
    call = Message.tool_call("look", "{}", "c")
    history = [Message.user("x"), call, Message.tool_result("sun", call_id="c"), Message.user("y")]
    reply = llm.respond(history, temperature=1.5, seed=1, max_tokens=60, tool_choice=choice)
    assert not reply.tool_calls
    headers = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
    assert all(llm.tokenizer.decode(m.token_ids or ()).startswith(headers) for m in reply.messages)


def test_requests_of_different_shapes_run_side_by_side(llm: LLM) -> None:
    streams = [
        llm.stream("x", choices=["yes", "no"], temperature=1.5, seed=1, reasoning_budget=0),
        llm.stream("x", regex="[ab]{3}", temperature=1.5, seed=2, reasoning_budget=0),
        llm.stream("x", temperature=1.5, seed=3, max_tokens=20),
    ]
    yes, letters, _ = (list(stream)[-1].reply for stream in streams)  # type: ignore[union-attr]
    assert yes.text in ("yes", "no")
    assert len(letters.text) == 3 and set(letters.text) <= {"a", "b"}


def test_a_tool_whose_schema_cannot_be_enforced_is_an_error_or_takes_any_object(llm: LLM) -> None:
    loose = Tool(
        "collect", parameters={"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    )

    def respond(strict: bool) -> Reply:
        return llm.respond(
            "x",
            tools=[loose],
            tool_choice="required",
            strict_tools=strict,
            reasoning_budget=0,
            max_tokens=20,
        )

    with pytest.raises(SchemaError, match="uniqueItems"):
        respond(strict=True)
    sampled = respond(strict=False).messages[-1].token_ids or ()
    assert "to=functions.collect" in llm.tokenizer.decode(sampled)
