"""/v1/responses on a scripted LLM: items, events as OpenAI's types define them, and stored responses."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from mlx_gptoss.errors import ContextLengthError, SchemaError
from mlx_gptoss.harmony import Message, render
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.memory.responses import ResponseStore, StoredResponse
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM, answer
from tests.support.server_help import read_events

pytest_plugins = ["tests.support.server_fixtures"]

PATH = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather.",
    "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
USER = {"role": "user", "content": "weather?"}


@pytest.fixture
def ask(scripted: TestClient) -> Callable[..., Any]:
    """Post a request; the response, or a stream's text."""

    def post(given: Any = "hi", *, status: int = 200, **fields: Any) -> Any:
        reply = scripted.post(PATH, json={"model": "any", "input": given, **fields})
        assert reply.status_code == status, reply.text
        return reply.text if fields.get("stream") and status == 200 else reply.json()

    return post


def replay(text: str) -> dict[str, Any]:
    """The response that a stream's events add up to, checking every event on the way."""
    events = read_events(text)
    items: list[dict[str, Any]] = []
    open_item: str | None = None
    pieces: dict[str, str] = {}
    final: dict[str, Any] = {}
    for number, (name, data) in enumerate(events):
        EVENT.validate_python(data, strict=True)
        assert name == data["type"]
        assert data["sequence_number"] == number
        kind = data["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert open_item is None and data["output_index"] == len(items)
            open_item = data["item"]["id"]
            assert data["item"]["status"] == "in_progress"
            pieces[open_item] = ""
        elif kind == "output_item.done":
            assert data["item"]["id"] == open_item and data["output_index"] == len(items)
            items.append(data["item"])
            open_item = None
        elif kind.endswith(".delta"):
            assert data["item_id"] == open_item and data["output_index"] == len(items)
            pieces[data["item_id"]] += data["delta"]
        elif kind in ("output_text.done", "reasoning_text.done", "reasoning_summary_text.done"):
            assert data["text"] == pieces[data["item_id"]]
        elif kind == "function_call_arguments.done":
            assert data["arguments"] == pieces[data["item_id"]]
        elif kind in ("completed", "incomplete", "failed"):
            assert number == len(events) - 1
            final = data["response"]
    assert [name for name, _ in events[:2]] == ["response.created", "response.in_progress"]
    assert open_item is None
    assert final["output"] == items
    return final


def without_ids(response: dict[str, Any]) -> Any:
    """A response without what differs from run to run."""
    text = json.dumps({k: v for k, v in response.items() if k not in ("id", "created_at", "completed_at")})
    for item in response["output"]:
        text = text.replace(item["id"], "ID").replace(item.get("call_id", "ID"), "CALL")
    return json.loads(text)


def test_an_answer_has_reasoning_a_message_and_usage(ask: Callable[..., Any]) -> None:
    body = ask("hello")
    response = Response.model_validate(body, strict=True)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert body["output"][0]["content"] == [{"type": "reasoning_text", "text": "The user asks."}]
    assert response.output_text == "You said: hello"
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


@pytest.mark.parametrize(
    "fields",
    [{}, {"tools": [WEATHER]}, {"top_logprobs": 1}, {"reasoning": {"summary": "auto"}}],
    ids=["text", "call", "scores", "summary"],
)
def test_a_stream_adds_up_to_the_answer_in_one_piece(ask: Callable[..., Any], fields: dict[str, Any]) -> None:
    whole = ask("hello", **fields)
    streamed = replay(ask("hello", stream=True, **fields))
    assert without_ids(streamed) == without_ids(whole)


@pytest.mark.parametrize("asked", [{"summary": "detailed"}, {"generate_summary": "auto"}])
def test_a_summary_is_the_reasoning(ask: Callable[..., Any], asked: dict[str, str]) -> None:
    body = ask("hello", reasoning=asked)
    assert body["reasoning"] == {"effort": "medium", "summary": next(iter(asked.values()))}
    item = Response.model_validate(body).output[0]
    assert item.type == "reasoning"
    assert [(part.type, part.text) for part in item.summary] == [("summary_text", "The user asks.")]
    assert item.content and item.content[0].text == "The user asks.", "to be sent back"
    kinds = [name for name, _ in read_events(ask("hello", reasoning=asked, stream=True))]
    told = [kind.removeprefix("response.") for kind in kinds if kind and "reasoning" in kind]
    assert told[0] == "reasoning_summary_part.added" and told[-1] == "reasoning_summary_part.done"
    assert set(told[1:-2]) == {"reasoning_summary_text.delta"} and told[-2] == "reasoning_summary_text.done"
    assert ask("hello")["output"][0]["summary"] == []


def test_input_tokens_are_those_of_the_rendered_prompt(
    ask: Callable[..., Any], scripted: TestClient, llm: ScriptedLLM, tokenizer: Tokenizer
) -> None:
    first = ask("hello", tools=[WEATHER], instructions="Be brief.")
    counted = scripted.post(
        "/v1/responses/input_tokens",
        json={"input": "hello", "tools": [WEATHER], "instructions": "Be brief."},
    ).json()
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": len(render(llm.seen[-1][0], tokenizer)),
    }
    longer = scripted.post(
        "/v1/responses/input_tokens", json={"input": "and?", "previous_response_id": first["id"]}
    )
    assert longer.json()["input_tokens"] > 0
    wrong = scripted.post("/v1/responses/input_tokens", json={"input": "x", "conversation": "conv_1"})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "conversation"


def test_a_preamble_is_a_message_of_its_own(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(preamble="One moment.", text="Done.")
    final = replay(ask(stream=True))
    assert [(item["type"], item.get("phase")) for item in final["output"]] == [
        ("reasoning", None),
        ("message", "commentary"),
        ("message", "final_answer"),
    ]
    structured = ask(text={"format": {"type": "json_object"}})
    assert [item["type"] for item in structured["output"]] == ["reasoning", "reasoning", "message"]


def test_a_tool_loop_is_rendered_with_the_sampled_tokens(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    first = ask([USER], tools=[WEATHER], store=False)
    call = first["output"][-1]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "get_weather",
        {"city": "Paris"},
    )
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    second = ask([USER, *first["output"], result], tools=[WEATHER], store=False)
    assert Response.model_validate(second).output_text == "The tool says: sunny"
    sent = llm.seen[-1][0].messages
    assert [(m.channel, bool(m.token_ids)) for m in sent] == [
        (None, False),
        ("analysis", True),
        ("commentary", True),
        ("commentary", False),
    ]


def test_a_previous_response_is_gone_on_from(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    lead = {"role": "developer", "content": "Always be kind."}
    first = ask([lead, USER], tools=[WEATHER], instructions="Be brief.")
    result = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "sunny"}
    second = ask([result], tools=[WEATHER], previous_response_id=first["id"], instructions="Shout.")
    conversation = llm.seen[-1][0]
    assert conversation.instructions == "Shout.\n\nAlways be kind."
    assert [m.content for m in conversation.messages] == [
        "weather?",
        "I need the tool.",
        '{"city": "Paris"}',
        "sunny",
    ]
    third = ask("thanks", previous_response_id=second["id"])
    assert third["previous_response_id"] == second["id"]
    assert [m.role for m in llm.seen[-1][0].messages].count("user") == 2


def test_a_reference_stands_for_the_stored_item(
    ask: Callable[..., Any], llm: ScriptedLLM, scripted: TestClient
) -> None:
    first = ask([USER], tools=[WEATHER])
    reasoning, call = first["output"]
    reference = {"type": "item_reference", "id": reasoning["id"]}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    ask([USER, reference, call, result], tools=[WEATHER], store=False)
    assert [m.content for m in llm.seen[-1][0].messages][1] == "I need the tool."
    scripted.delete(f"{PATH}/{first['id']}")
    error = ask([USER, reference, call, result], tools=[WEATHER], status=404)["error"]
    assert error["param"] == "input[1].id"


def test_stored_responses_can_be_read_and_deleted(ask: Callable[..., Any], scripted: TestClient) -> None:
    body = ask("hello")
    url = f"{PATH}/{body['id']}"
    assert scripted.get(url).json() == body
    items = scripted.get(url + "/input_items").json()
    assert items["data"][0]["content"] == [{"type": "input_text", "text": "hello"}]
    assert scripted.delete(url).json()["deleted"] is True
    for gone in (scripted.get(url), scripted.delete(url)):
        assert gone.status_code == 404
        assert gone.json()["error"]["type"] == "not_found_error"
    assert ask(previous_response_id=body["id"], status=404)["error"]["param"] == "previous_response_id"
    unstored = ask(store=False)
    assert scripted.get(f"{PATH}/{unstored['id']}").status_code == 404


def test_what_a_response_answered_is_listed_as_the_sdk_types_it(
    ask: Callable[..., Any], scripted: TestClient
) -> None:
    """Also what was only referred to, and what the server itself has no use for."""
    first = ask([USER], tools=[WEATHER])
    reasoning, call = first["output"]
    given: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {"role": "assistant", "content": "Let me see."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "reasoning", "id": "rs_x", "encrypted_content": "foreign"},
        {"type": "reasoning", "id": "rs_y", "summary": [{"type": "summary_text", "text": "Short."}]},
        {"type": "item_reference", "id": reasoning["id"]},
        {"type": "function_call", **{name: call[name] for name in ("call_id", "name", "arguments")}},
        {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"},
        {"type": "custom_tool_call", "call_id": "c7", "name": "patch", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c7", "output": "done"},
    ]
    body = ask(given, tools=[WEATHER])
    items = scripted.get(f"{PATH}/{body['id']}/input_items", params={"order": "asc"}).json()
    listed = ResponseItemList.model_validate(items, strict=True).data
    assert [item.type for item in listed] == [
        "reasoning" if "reference" in item.get("type", "") else item.get("type", "message") for item in given
    ]
    assert items["data"][5]["summary"] == [{"type": "summary_text", "text": "Short."}]
    assert items["data"][6] == reasoning | {"summary": []}


def test_input_items_come_in_pages(ask: Callable[..., Any], scripted: TestClient) -> None:
    turns = [{"role": "user", "content": f"text {number}"} for number in range(25)]
    url = f"{PATH}/{ask(turns)['id']}/input_items"
    ids = [item["id"] for item in scripted.get(url, params={"order": "asc", "limit": 100}).json()["data"]]

    def page(**params: Any) -> tuple[list[int], bool]:
        body = scripted.get(url, params=params).json()
        found = [item["id"] for item in body["data"]]
        assert [body["first_id"], body["last_id"]] == ([found[0], found[-1]] if found else ["", ""])
        texts = [item["content"][0]["text"] for item in body["data"]]
        assert [f"text {ids.index(name)}" for name in found] == texts
        return [ids.index(name) for name in found], body["has_more"]

    assert page() == (list(range(24, 4, -1)), True)
    assert page(after=ids[5]) == (list(range(4, -1, -1)), False)
    assert page(order="asc", limit=2, after=ids[3]) == ([4, 5], True)
    assert page(order="asc", limit=100) == (list(range(25)), False)
    assert page(after=ids[0]) == ([], False)
    for params in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "nowhere"}):
        refused = scripted.get(url, params=params)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, *params)


def test_ids_are_never_taken_from_clients(ask: Callable[..., Any], scripted: TestClient) -> None:
    mine = ask([USER | {"id": "msg_1"}, {"role": "user", "id": "msg_1", "content": "a secret"}])
    ask([{"type": "item_reference", "id": "msg_1"}], status=404)
    items = scripted.get(f"{PATH}/{mine['id']}/input_items").json()["data"]
    names = {item["id"] for item in (*items, *mine["output"])}
    assert len(names) == 2 + len(mine["output"]) and "msg_1" not in names
    assert all(len(name.partition("_")[2]) == 32 for name in (*names, mine["id"]))
    again = ask([USER, *mine["output"]])
    items = scripted.get(f"{PATH}/{again['id']}/input_items").json()["data"]
    assert not names & {item["id"] for item in items}


def test_what_one_caller_stored_is_never_another_s() -> None:
    store = ResponseStore(9)
    item = {"id": "item_1", "type": "message"}
    store.put("alice", StoredResponse.of({"id": "resp_1", "output": []}, [item], [Message.user("x")]))
    for other in ("bob", ""):
        for ask in (
            lambda who: store.get(who, "resp_1"),
            lambda who: store.delete(who, "resp_1"),
            lambda who: store.item(who, "item_1", "input[0].id"),
        ):
            with pytest.raises(ApiError, match="not stored"):
                ask(other)
    store.put("bob", StoredResponse.of({"id": "resp_1", "output": []}, [], []))
    assert store.get("alice", "resp_1").input_items == [item]
    assert store.item("alice", "item_1", "input[0].id") == item


def test_an_item_can_be_referred_to_as_long_as_a_response_holds_it(
    ask: Callable[..., Any], scripted: TestClient
) -> None:
    first = ask([USER])
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    second = ask([USER, *first["output"], USER])
    for gone in (second, first):
        ask([USER, reference, USER], store=False)
        scripted.delete(f"{PATH}/{gone['id']}")
    error = ask([USER, reference], status=404)["error"]
    assert error["param"] == "input[1].id" and reference["id"] in error["message"]
    ask([USER | {"id": ""}])
    ask([USER, {"type": "item_reference"}], status=404)


def test_a_cut_answer_is_incomplete(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(text="half", finish_reason="length")
    final = replay(ask(stream=True, max_output_tokens=5))
    assert final["status"] == "incomplete"
    assert final["incomplete_details"] == {"reason": "max_output_tokens"}
    assert llm.seen[-1][1]["params"].max_tokens == 5
    assert [item["status"] for item in final["output"]] == ["completed", "incomplete"]


@pytest.mark.parametrize(
    "script",
    [Script(), Script(preamble="One mo"), Script(calls=[("f", "{}"), ("f", '{"a')]), Script(text="ha")],
    ids=["reasoning", "preamble", "call", "text"],
)
def test_only_the_item_that_broke_off_is_incomplete(
    ask: Callable[..., Any], llm: ScriptedLLM, script: Script
) -> None:
    llm.write = lambda *_: replace(script, finish_reason="length")
    for final in (ask(), replay(ask(stream=True))):
        *before, last = [item["status"] for item in final["output"]]
        assert last == "incomplete" and set(before) <= {"completed"}


def test_a_call_that_broke_off_is_incomplete(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(calls=[("get_weather", '{"city": "Par')], finish_reason="length")
    for final in (ask(tools=[WEATHER]), replay(ask(tools=[WEATHER], stream=True))):
        call = final["output"][-1]
        assert (final["status"], call["status"]) == ("incomplete", "incomplete")
        assert call["arguments"] == '{"city": "Par'


def test_a_failure_in_a_stream_is_told_as_events(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(text="so much text", fail_after=6)
    text = ask(stream=True)
    final = replay(text)
    assert final["status"] == "failed" and final["error"]["message"] == "the engine failed"
    assert read_events(text)[-2][0] == "error"


def test_what_codex_sends_is_accepted(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    namespace = {"type": "namespace", "name": "agents", "description": "More.", "tools": [WEATHER]}
    custom = {"type": "custom", "name": "apply_patch", "description": "Patch.", "format": {"type": "text"}}
    final = replay(
        ask(
            [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "One."}]},
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Two."}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "do it"}]},
            ],
            stream=True,
            store=False,
            include=["reasoning.encrypted_content"],
            prompt_cache_key="0",
            client_metadata={"session_id": "0"},
            parallel_tool_calls=True,
            reasoning={"summary": "auto"},
            tools=[WEATHER, namespace, {"type": "web_search", "external_web_access": False}, custom],
        )
    )
    conversation = llm.seen[-1][0]
    assert conversation.instructions == "One.\n\nTwo."
    assert [tool.name for tool in conversation.tools] == ["get_weather"]
    assert [tool["type"] for tool in final["tools"]] == ["function", "namespace", "web_search", "custom"]


def test_reasoning_comes_back_sealed(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    """A client that only keeps `encrypted_content`, on a server that has forgotten the turn."""
    item = ask(include=["reasoning.encrypted_content"], store=False)["output"][0]
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": item["encrypted_content"]}
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"}
    result = {
        "type": "function_call_output",
        "call_id": "c1",
        "output": [{"type": "input_text", "text": "sun"}],
    }
    ask([USER, sealed, call, result], tools=[WEATHER])
    assert [m.content for m in llm.seen[-1][0].messages] == ["weather?", "The user asks.", "{}", "sun"]
    assert "encrypted_content" not in ask()["output"][0]


def test_assistant_items_are_grouped_into_turns(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Look."}]}
    thought = {
        "type": "reasoning",
        "id": "rs",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm."}],
    }
    call = {"type": "function_call", "call_id": "c9", "name": "get_weather", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c9", "output": "sun"}
    ask([USER, thought, said, call, result, thought, said], tools=[WEATHER])
    assert [(m.role, m.channel, m.recipient) for m in llm.seen[-1][0].messages] == [
        ("user", None, None),
        ("assistant", "analysis", None),
        ("assistant", "commentary", None),
        ("assistant", "commentary", "functions.get_weather"),
        ("tool", "commentary", "assistant"),
        ("assistant", "analysis", None),
        ("assistant", "final", None),
    ]


def test_truncation_drops_the_oldest_turns(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    def write(conversation: Any, options: Any) -> Any:
        size = sum(len(m.content) for m in conversation.messages)
        return ContextLengthError(size, 30) if size > 30 else answer(conversation, options)

    llm.write = write
    turns = [{"role": "user", "content": "0123456789"} for _ in range(9)]
    error = ask(turns, status=400)["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert "90" in error["message"] and "30" in error["message"]
    ask(turns, truncation="auto")
    assert [m.content for m in llm.seen[-1][0].messages] == ["0123456789"] * 3
    assert ask("0" * 31, truncation="auto", status=400)["error"]["code"] == "context_length_exceeded"


def test_formats_reach_the_llm(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    body = ask(text={"format": {"type": "json_schema", "name": "count", "schema": schema, "strict": True}})
    assert json.loads(Response.model_validate(body, strict=True).output_text) == {"n": 7}
    assert body["text"]["format"]["schema"] == schema
    conversation, options = llm.seen[-1]
    assert (options["schema"], conversation.response_name) == (schema, "count")


@pytest.mark.parametrize("stream", [True, False])
def test_a_schema_that_cannot_be_enforced_is_shown_unless_it_is_strict(
    ask: Callable[..., Any], llm: ScriptedLLM, stream: bool
) -> None:
    def write(conversation: Any, options: dict[str, Any]) -> Any:
        return SchemaError("schema: no", "schema") if options["schema"] else answer(conversation, options)

    llm.write = write
    shape = {"type": "json_schema", "name": "tags", "schema": {"type": "object", "not": {"required": ["a"]}}}
    for strict in (None, False):
        body = ask(stream=stream, text={"format": shape | {"strict": strict}})
        final = Response.model_validate(replay(body) if stream else body)
        assert json.loads(final.output_text) == {"answer": 42}
        conversation, options = llm.seen[-1]
        assert (options["schema"], options["json_object"]) == (None, True)
        assert conversation.response_schema == shape["schema"]
    refused = ask(status=400, stream=stream, text={"format": shape | {"strict": True}})
    assert refused["error"]["code"] == "invalid_schema"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"truncation": "middle"}, "truncation"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"tools": [{"name": "x"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": 3}]}, "tools[0].parameters"),
    ({"input": []}, "input"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "boss", "content": "x"}]}, "input[0].role"),
    ({"input": [{"type": "function_call_output", "call_id": "no", "output": "x"}]}, "input[0].call_id"),
    ({"input": 5}, "input"),
    ({"temperature": -1}, "temperature"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[param for _, param in WRONG])
def test_what_is_wrong_is_named(scripted: TestClient, fields: dict[str, Any], param: str) -> None:
    reply = scripted.post(PATH, json={"input": "hi", **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_what_the_llm_finds_wrong_has_the_name_that_the_client_gave_it(
    ask: Callable[..., Any], llm: ScriptedLLM
) -> None:
    def param(field: str, **fields: Any) -> Any:
        llm.write = lambda *_: SchemaError("no", field)
        return ask(status=400, **fields)["error"]["param"]

    shape = {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}
    assert param("schema", text={"format": shape}) == "text.format.schema"
    assert param("tools[0].parameters", tools=[{"type": "web_search"}, WEATHER]) == "tools[1].parameters"


def stored(name: str, **fields: Any) -> StoredResponse:
    parts: dict[str, Any] = {"body": {}, "input_items": [], "history": [], "preface": []} | fields
    return StoredResponse.of(**parts | {"body": {"id": name, **parts["body"]}})


def test_the_store_is_bounded_in_number() -> None:
    store = ResponseStore(max_responses=2)
    for name in ("a", "b"):
        store.put("", stored(name))
    store.get("", "a")
    store.put("", stored("c"))
    assert len(store) == 2 and store.get("", "a")
    with pytest.raises(ApiError, match="'b' is not stored"):
        store.get("", "b")


BIG = "x" * 100_000
PLACES: dict[str, dict[str, Any]] = {
    "metadata": {"body": {"metadata": {"a": BIG}}},
    "many small values": {"body": {"metadata": {str(i): "x" for i in range(10_000)}}},
    "instructions": {"body": {"instructions": BIG}},
    "tools": {"body": {"tools": [{"type": "web_search", "x": BIG}]}},
    "output": {"body": {"output": [{"id": "o", "text": BIG}]}},
    "items": {"input_items": [{"id": "i", "extra": BIG}]},
    "many items": {"input_items": [{"id": f"item_{i}"} for i in range(2_000)]},
    "history": {"history": [Message.user(BIG)]},
    "wide characters": {"history": [Message.user("\U0001f600" * 25_000)]},
    "tokens": {"history": [Message("assistant", "x", channel="final", token_ids=(1,) * 3_000)]},
    "many messages": {"history": [Message.user("x")] * 200},
    "preface": {"preface": [BIG]},
}


@pytest.mark.parametrize("place", PLACES)
def test_the_store_is_bounded_in_bytes_wherever_they_are(place: str) -> None:
    store = ResponseStore(max_responses=100, max_bytes=500_000)
    for number in range(20):
        store.put("", stored(f"r{number}", **PLACES[place]))
    assert 1 <= len(store) <= 5
    for number in range(20):
        store.put("", stored(f"small {number}"))
    assert len(store) >= 20, "room is made by those used longest ago"


def test_the_bytes_that_are_counted_are_those_that_are_taken() -> None:
    metadata = {f"key {i}": f"value {i}" for i in range(300)}
    history = [Message.user(f"text {i} " * 20) for i in range(50)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = [
            stored(f"r{n}", body={"metadata": metadata}, history=[replace(m, name=f"{n}") for m in history])
            for n in range(50)
        ]
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    counted = sum(response.size for response in kept)
    assert taken < 1.2 * counted
