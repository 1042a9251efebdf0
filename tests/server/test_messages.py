"""/v1/messages on a scripted LLM: Anthropic's blocks, events and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from mlx_gptoss.errors import ContextLengthError, SchemaError
from mlx_gptoss.harmony import render
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM
from tests.support.server_help import read_events

pytest_plugins = ["tests.support.server_fixtures"]

PATH = "/v1/messages"
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
THINK = {"type": "enabled", "budget_tokens": 1024}
WEATHER = {
    "name": "get_weather",
    "description": "The weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASKED = {"role": "user", "content": "weather?"}


@pytest.fixture
def ask(scripted: TestClient) -> Callable[..., Any]:
    """Post a request; the message, or a stream's text."""

    def post(messages: Any = "hi", *, status: int = 200, **fields: Any) -> Any:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {"model": "any", "max_tokens": 100, "messages": messages, **fields}
        reply = scripted.post(PATH, json=body, headers={"anthropic-version": "2023-06-01"})
        assert reply.status_code == status, reply.text
        return reply.text if fields.get("stream") and status == 200 else reply.json()

    return post


def replay(text: str) -> dict[str, Any]:
    """The message that a stream's events add up to, checking every event on the way."""
    message: dict[str, Any] = {}
    pieces = ""
    is_open = False
    events = read_events(text)
    for name, data in events:
        EVENT.validate_python(data, strict=True)
        assert name == data["type"]
        if name == "message_start":
            assert not message
            assert data["message"]["usage"]["input_tokens"] > 0
            message = data["message"]
        elif name == "content_block_start":
            assert not is_open and data["index"] == len(message["content"])
            is_open, pieces = True, ""
            message["content"].append(data["content_block"])
        elif name == "content_block_delta":
            assert is_open and data["index"] == len(message["content"]) - 1
            delta = dict(data["delta"])
            kind = delta.pop("type")
            [(field, value)] = delta.items()
            block = message["content"][-1]
            if kind == "input_json_delta":
                pieces += value
                block["partial"] = pieces
            else:
                block[field] += value
        elif name == "content_block_stop":
            assert is_open
            is_open = False
        elif name == "message_delta":
            assert not is_open
            message |= data["delta"]
            message["usage"] = data["usage"]
    assert [events[0][0], events[-1][0]] == ["message_start", "message_stop"]
    return message


def test_an_answer_is_text_and_counts_cached_tokens_apart(ask: Callable[..., Any]) -> None:
    message = Message.model_validate(ask("hello there"), strict=True)
    assert [(block.type, getattr(block, "text", None)) for block in message.content] == [
        ("text", "You said: hello there")
    ]
    assert message.stop_reason == "end_turn"
    assert message.usage.cache_read_input_tokens == 3
    assert message.usage.input_tokens + 3 == len("hello there")


def test_thinking_is_shown_to_those_who_ask(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    blocks = ask(thinking=THINK)["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    assert blocks[0]["thinking"] == "The user asks."
    assert llm.seen[-1][1]["reasoning_budget"] == 1024
    for thinking in ({"type": "disabled"}, {"type": "adaptive", "display": "omitted"}):
        assert [block["type"] for block in ask(thinking=thinking)["content"]] == ["text"]


@pytest.mark.parametrize(
    "fields", [{}, {"thinking": THINK}, {"tools": [WEATHER]}], ids=["text", "thinking", "tool"]
)
def test_a_stream_adds_up_to_the_answer_in_one_piece(ask: Callable[..., Any], fields: dict[str, Any]) -> None:
    whole = ask("hello", **fields)
    streamed = replay(ask("hello", stream=True, **fields))
    for block in streamed["content"]:
        if block["type"] == "tool_use":
            block["input"] = {"city": "Paris"}
            assert block.pop("partial") == '{"city": "Paris"}'
    for message in (whole, streamed):
        message.pop("id")
        for block in message["content"]:
            block.pop("id", None)
    assert streamed == whole


def test_a_tool_loop_is_rendered_with_the_sampled_tokens(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    first = ask([ASKED], tools=[WEATHER])
    assert first["stop_reason"] == "tool_use"
    use = first["content"][-1]
    assert (use["name"], use["input"]) == ("get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "sunny"}]}
    history = [
        ASKED,
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
    ]
    assert ask(history, tools=[WEATHER])["content"][-1]["text"] == "The tool says: sunny"
    assert [(m.channel, bool(m.token_ids)) for m in llm.seen[-1][0].messages] == [
        (None, False),
        ("analysis", True),
        ("commentary", True),
        ("commentary", False),
    ]


def test_the_whole_request_reaches_the_llm(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}}
    failed = {"type": "tool_result", "tool_use_id": "t1", "content": "no network", "is_error": True}
    ask(
        [
            ASKED,
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}, use]},
            {"role": "user", "content": [failed, {"type": "text", "text": "Try again."}]},
        ],
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        tools=[WEATHER, {"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["END"],
        top_k=5,
        output_config={"effort": "high"},
    )
    conversation, options = llm.seen[-1]
    assert conversation.instructions == "Be brief."
    assert [tool.name for tool in conversation.tools] == ["get_weather"]
    assert [m.content for m in conversation.messages] == [
        "weather?",
        "Hm.",
        '{"city":"Rome"}',
        "Error: no network",
        "Try again.",
    ]
    assert options["tool_choice"] == "required"
    assert (options["params"].stop, options["params"].top_k) == (("END",), 5)
    assert conversation.reasoning_effort == "high"


def test_a_stop_sequence_is_named_where_it_ended_the_answer(
    ask: Callable[..., Any], llm: ScriptedLLM
) -> None:
    def ended(cut: bool) -> tuple[str, str | None]:
        llm.write = lambda *_: Script(text="one", cut=cut)
        body = ask(stop_sequences=["three", "two"])
        return body["stop_reason"], body["stop_sequence"]

    assert ended(True) == ("stop_sequence", "two")
    assert ended(False) == ("end_turn", None)
    llm.write = lambda *_: Script(text="one two three")
    body = ask(stop_sequences=["three", "two"])
    assert (body["content"][0]["text"], body["stop_sequence"]) == ("one ", "two")


def test_a_format_is_asked_of_the_llm(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    body = ask(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert body["content"][0]["text"] == '{"n": 7}'
    assert llm.seen[-1][1]["schema"] == schema


def test_the_older_name_of_a_format_counts_as_well(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    ask(output_format={"type": "json_schema", "schema": schema})
    assert llm.seen[-1][1]["schema"] == schema


def test_a_thread_is_refused_in_the_words_upon_which_sdks_send_the_whole_conversation(
    ask: Callable[..., Any],
) -> None:
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        error = ask(thread=thread, status=400)["error"]
        assert error["type"] == "invalid_request_error"
        assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert ask(thread=None, mcp_servers=[])["stop_reason"] == "end_turn"


@pytest.mark.parametrize("at_least", [False, True])
def test_a_prompt_that_is_too_long_is_told_as_clients_read_it(
    ask: Callable[..., Any], llm: ScriptedLLM, tokenizer: Tokenizer, at_least: bool
) -> None:
    llm.write = lambda *_: ContextLengthError(5000, 4096, at_least=at_least)
    error = ask("x" * 6000, status=400)["error"]
    tokens = len(render(llm.seen[-1][0], tokenizer)) if at_least else 5000
    assert error["message"] == f"prompt is too long: {tokens} tokens > 4096 maximum"
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_counting_stops_at_a_few_contexts(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: ContextLengthError(5000, 4096, at_least=True)
    message = ask("x" * 400_000, status=400)["error"]["message"]
    counted = int(message.removeprefix("prompt is too long: ").split()[0])
    assert 8 * llm.max_context <= counted < 400_000


def test_models_are_listed_as_anthropic_does_to_its_clients(scripted: TestClient) -> None:
    version = {"anthropic-version": "2023-06-01"}
    page = scripted.get("/v1/models", headers=version).json()
    [model] = [ModelInfo.model_validate(model) for model in page.pop("data")]
    assert page == {"has_more": False, "first_id": model.id, "last_id": model.id}
    assert (model.id, model.type, model.max_input_tokens) == ("scripted", "model", 4096)
    assert model.created_at.tzinfo is not None
    assert scripted.get(f"/v1/models/{model.id}", headers=version).json()["display_name"] == model.id
    assert scripted.get("/v1/models").json()["object"] == "list"


def test_counted_tokens_are_those_of_the_rendered_prompt(
    ask: Callable[..., Any], scripted: TestClient, llm: ScriptedLLM, tokenizer: Tokenizer
) -> None:
    ask([ASKED], tools=[WEATHER], system="Be brief.")
    expected = len(render(llm.seen[-1][0], tokenizer))
    body = {"model": "any", "messages": [ASKED], "tools": [WEATHER], "system": "Be brief."}
    assert scripted.post(PATH + "/count_tokens", json=body).json() == {"input_tokens": expected}


def test_a_failure_in_a_stream_ends_it_with_an_error(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(text="so much text", fail_after=5)
    name, data = read_events(ask(stream=True))[-1]
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")


TEXT = {"type": "text", "text": "look"}
PICTURE = [{"type": "image", "source": {}}]
RESULT = [{"type": "tool_result", "tool_use_id": "x"}]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "user", "content": PICTURE}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [TEXT, *PICTURE]}]}, "messages[0].content[1].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (
        {"messages": [{"role": "assistant", "content": [TEXT, *PICTURE]}, ASKED]},
        "messages[0].content[1].type",
    ),
    ({"messages": [ASKED, {"role": "assistant", "content": "The"}]}, "messages"),
    ({"tools": [WEATHER, WEATHER | {"input_schema": {"enum": ["x" * 300_000]}}]}, "tools[1].input_schema"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice"),
    ({"mcp_servers": [{"type": "url", "url": "https://example.com", "name": "x"}]}, "mcp_servers"),
    ({"messages": [{"role": "user", "content": RESULT}]}, "messages[0].content[0].tool_use_id"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[param for _, param in WRONG])
def test_what_is_wrong_is_named_in_both_shapes(
    ask: Callable[..., Any], fields: dict[str, Any], param: str
) -> None:
    messages = fields.get("messages", "hi")
    body = ask(messages, status=400, **{k: v for k, v in fields.items() if k != "messages"})
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param


@pytest.mark.parametrize("path", [PATH, PATH + "/count_tokens", PATH + "/batches"])
def test_errors_from_before_any_route_have_the_shape_as_well(tokenizer: Tokenizer, path: str) -> None:
    app = create_app(ScriptedLLM(tokenizer), ServerSettings(api_key="k"))  # type: ignore[arg-type]
    client = TestClient(app, base_url="http://localhost")
    key = {"x-api-key": "k"}
    for response, kind in (
        (client.post(path), "authentication_error"),
        (client.post(path, headers=key | {"Host": "evil.example"}), "permission_error"),
        (client.post(path, headers=key, content=b"\xff"), "invalid_request_error"),
        (client.get(path, headers=key), "not_found_error" if "batches" in path else "invalid_request_error"),
    ):
        body = response.json()
        assert (body["type"], body["error"]["type"]) == ("error", kind), body
        assert {"message", "param", "code"} <= set(body["error"])


def test_what_the_llm_finds_wrong_has_the_name_that_the_client_gave_it(
    ask: Callable[..., Any], llm: ScriptedLLM
) -> None:
    def param(field: str, **fields: Any) -> Any:
        llm.write = lambda *_: SchemaError("no", field)
        return ask(status=400, **fields)["error"]["param"]

    shape = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    assert param("schema", output_config=shape) == "output_config.format.schema"
    search = {"type": "web_search_20250305", "name": "get_weather"}
    assert param("tools[0].parameters", tools=[search, WEATHER]) == "tools[1].input_schema"
