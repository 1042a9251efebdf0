"""Schemas that crash or stall a compiler, through each API over the demo model: they end one request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import mlx_gptoss
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support import scripted_llm
from tests.support.server_help import live, wait_until

pytest_plugins = ["tests.support.server_fixtures"]

Schema = dict[str, Any]
ASKED = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    settings = ServerSettings(port=0)
    with (
        mlx_gptoss.load("demo", max_context=1024) as llm,
        live(create_app(llm, settings)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def links(count: int) -> Schema:
    """References, one after the other."""
    chain: Schema = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": chain | {f"a{count}": {"type": "string"}}}


def objects(count: int) -> Schema:
    """References through objects."""

    def link(to: int) -> Schema:
        return {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{to}"}}}

    return {**link(0), "$defs": {f"a{i}": link(i + 1) for i in range(count)} | {f"a{count}": {}}}


def optional(count: int, letter: str = "a") -> Schema:
    """An expression that takes long to compile."""
    return {"type": "object", "properties": {"x": {"type": "string", "pattern": f"{letter}?" * count}}}


SCHEMAS: dict[str, Schema] = {
    "links": links(2500),
    "objects": objects(930),
    "pattern": optional(30_000),
    "enum": {"type": "object", "properties": {"x": {"enum": [f"v{i}" for i in range(24_000)]}}},
}


def chat(schema: Schema, strict: bool) -> tuple[str, Schema]:
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": strict}}
    return "/v1/chat/completions", {"messages": ASKED, "max_tokens": 8, "response_format": shape}


def chat_tool(schema: Schema, strict: bool) -> tuple[str, Schema]:
    function = {"name": "f", "parameters": schema, "strict": strict}
    tools = [{"type": "function", "function": function}]
    return "/v1/chat/completions", {"messages": ASKED, "max_tokens": 8, "tools": tools, **CHOICE}


def responses(schema: Schema, strict: bool) -> tuple[str, Schema]:
    shape = {"type": "json_schema", "name": "n", "schema": schema, "strict": strict}
    return "/v1/responses", {"input": "hi", "max_output_tokens": 16, "text": {"format": shape}}


def responses_tool(schema: Schema, strict: bool) -> tuple[str, Schema]:
    tools = [{"type": "function", "name": "f", "parameters": schema, "strict": strict}]
    return "/v1/responses", {"input": "hi", "max_output_tokens": 16, "tools": tools, **CHOICE}


def messages(schema: Schema, strict: bool) -> tuple[str, Schema]:
    shape = {"type": "json_schema", "schema": schema}
    return "/v1/messages", {"messages": ASKED, "max_tokens": 8, "output_config": {"format": shape}}


def messages_tool(schema: Schema, strict: bool) -> tuple[str, Schema]:
    return "/v1/messages", {
        "messages": ASKED,
        "max_tokens": 8,
        "tools": [{"name": "f", "input_schema": schema}],
        "tool_choice": {"type": "any"},
    }


CHOICE = {"tool_choice": "required"}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize(
    "place", [chat, chat_tool, responses, responses_tool, messages, messages_tool], ids=lambda p: p.__name__
)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_hostile_schema_ends_one_request(client: httpx.Client, name: str, place: Any, strict: bool) -> None:
    path, body = place(SCHEMAS[name], strict)
    answer = client.post(path, json=body)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert error["message"] and len(error["message"]) < 500
    if strict and place in (chat, responses, messages):
        assert answer.status_code == 400
    assert client.get("/health").status_code == 200


def test_requests_go_on_while_as_many_as_may_run_are_still_starting(tokenizer: Tokenizer) -> None:
    """Starting one is where its schema is tried, which takes seconds when it is hostile."""
    over = threading.Event()

    def write(conversation: Any, options: Any) -> Any:
        if conversation.messages[-1].content == "slow":
            assert over.wait(60)
        return scripted_llm.answer(conversation, options)

    def ask(text: str) -> int:
        body = {"messages": [{"role": "user", "content": text}]}
        return caller.post("/v1/chat/completions", json=body).status_code

    llm = scripted_llm.ScriptedLLM(tokenizer, write)
    settings = ServerSettings(port=0, max_active=41)
    app = create_app(llm, settings)  # type: ignore[arg-type]
    limits = httpx.Limits(max_connections=None)
    with (
        live(app) as url,
        httpx.Client(base_url=url, timeout=60, limits=limits) as caller,
        ThreadPoolExecutor(40) as threads,
    ):
        slow = [threads.submit(ask, "slow") for _ in range(40)]
        try:
            wait_until(lambda: app.state.server.jobs.active == 40)
            assert ask("quick") == 200
        finally:
            over.set()
        assert [answer.result() for answer in slow] == [200] * 40
