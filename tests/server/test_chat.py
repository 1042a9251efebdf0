"""/v1/chat/completions on a scripted LLM: translation both ways, and streams as OpenAI types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.sampling import PromptProgress
from tests.support.scripted_llm import Script, ScriptedLLM, answer
from tests.support.server_help import read_events

pytest_plugins = ["tests.support.server_fixtures"]

PATH = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def ask(scripted: TestClient) -> Callable[..., Any]:
    """Post a chat; the parsed answer. Messages may be one text."""
    client = scripted

    def post(messages: Any = "hi", *, status: int = 200, **fields: Any) -> Any:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        response = client.post(PATH, json={"model": "any", "messages": messages, **fields})
        assert response.status_code == status, response.text
        return response.text if fields.get("stream") and status == 200 else response.json()

    return post


def error_of(body: Any) -> tuple[str, str]:
    """(param, code) of an error in OpenAI's shape."""
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["param"], body["error"]["code"]


def accumulate(text: str) -> tuple[dict[int, dict[str, Any]], list[ChatCompletionChunk]]:
    """The messages that a stream's deltas add up to, by choice; checks order and types on the way."""
    events = [data for _, data in read_events(text)]
    assert events[-1] == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(data, strict=True) for data in events[:-1]]
    assert len({chunk.id for chunk in chunks}) == 1
    messages: dict[int, dict[str, Any]] = {}
    for data in events[:-1]:
        for choice in data["choices"]:
            index, delta = choice["index"], choice["delta"]
            if index not in messages:
                assert delta["role"] == "assistant"
                messages[index] = {
                    "content": "",
                    "reasoning": "",
                    "calls": {},
                    "finish": None,
                    "logprobs": [],
                }
            message = messages[index]
            assert message["finish"] is None, "a delta came after the finish reason"
            assert delta.get("reasoning") == delta.get("reasoning_content")
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning") or ""
            message["logprobs"] += (choice["logprobs"] or {}).get("content") or []
            for call in delta.get("tool_calls", ()):
                known = message["calls"].setdefault(call["index"], {"arguments": ""})
                known |= {k: call[k] for k in ("id", "type") if k in call}
                known |= {"name": call["function"]["name"]} if "name" in call["function"] else {}
                known["arguments"] += call["function"]["arguments"]
            message["finish"] = choice["finish_reason"]
    return messages, chunks


def test_an_answer_has_text_reasoning_and_usage(ask: Callable[..., Any]) -> None:
    body = ask("hello")
    completion = ChatCompletion.model_validate(body, strict=True)
    message = completion.choices[0].message
    assert message.content == "You said: hello"
    assert body["choices"][0]["message"]["reasoning"] == "The user asks."
    assert body["choices"][0]["message"]["reasoning_content"] == "The user asks."
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert (
        completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    )
    assert completion.usage.prompt_tokens_details.cached_tokens == 3


@pytest.mark.parametrize("tools", [None, [WEATHER]])
def test_a_stream_adds_up_to_the_answer_in_one_piece(ask: Callable[..., Any], tools: Any) -> None:
    fields = {"tools": tools} if tools else {}
    whole = ask("hello", **fields)["choices"][0]
    messages, _ = accumulate(ask("hello", stream=True, **fields))
    assert messages[0]["content"] == (whole["message"]["content"] or "")
    assert messages[0]["reasoning"] == whole["message"]["reasoning"]
    assert messages[0]["finish"] == whole["finish_reason"]
    calls = [
        {"name": c["function"]["name"], "arguments": c["function"]["arguments"]}
        for c in whole["message"].get("tool_calls", ())
    ]
    assert [{k: c[k] for k in ("name", "arguments")} for c in messages[0]["calls"].values()] == calls


def test_the_last_chunk_has_the_usage_only_when_asked_for(ask: Callable[..., Any]) -> None:
    _, plain = accumulate(ask(stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)
    _, counted = accumulate(ask(stream=True, stream_options={"include_usage": True}))
    assert counted[-1].choices == [] and counted[-1].usage is not None
    assert all(chunk.usage is None for chunk in counted[:-1])


def test_several_answers_are_told_apart_and_the_prompt_is_counted_once(
    ask: Callable[..., Any], llm: ScriptedLLM
) -> None:
    body = ask(n=3, seed=5)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == len("hi")
    assert [options["params"].seed for _, options in llm.seen] == [5, 6, 7]
    messages, _ = accumulate(ask(n=3, stream=True))
    assert {index: m["content"] for index, m in messages.items()} == dict.fromkeys(range(3), "You said: hi")


def test_logprobs_spell_the_tokens_of_the_answer(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    body = ask("né", logprobs=True, top_logprobs=1)
    entries = body["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "You said: né"
    assert all(len(entry["top_logprobs"]) == 1 for entry in entries)
    assert llm.seen[-1][1]["params"].logprobs == 1
    messages, _ = accumulate(ask("né", logprobs=True, top_logprobs=1, stream=True))
    assert messages[0]["logprobs"] == entries
    assert ask()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(("stop", "said"), [("defz", "abcdefgh"), ("de", "abc"), ("a", "")])
def test_logprobs_are_those_of_the_text_streamed_or_not(
    ask: Callable[..., Any], llm: ScriptedLLM, stop: str, said: str
) -> None:
    llm.write = lambda *_: Script(text="abcdefgh")
    fields = {"logprobs": True, "stop": stop}
    choice = ask(**fields)["choices"][0]
    assert choice["message"]["content"] == said
    assert "".join(entry["token"] for entry in (choice["logprobs"] or {}).get("content", ())) == said
    messages, _ = accumulate(ask(stream=True, **fields))
    assert messages[0]["content"] == said
    assert "".join(entry["token"] for entry in messages[0]["logprobs"]) == said


def test_system_and_developer_messages_are_the_instructions(
    ask: Callable[..., Any], llm: ScriptedLLM
) -> None:
    ask(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c"},
            {"role": "system", "content": "Now shout."},
            {"role": "user", "content": "d"},
        ]
    )
    conversation, _ = llm.seen[-1]
    assert conversation.instructions == "Be brief.\n\nBe kind."
    assert [(m.role, m.content) for m in conversation.messages] == [
        ("user", "a\nb"),
        ("assistant", "c"),
        ("developer", "Now shout."),
        ("user", "d"),
    ]


def test_a_tool_loop_is_rendered_with_the_sampled_tokens(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    asked = [{"role": "user", "content": "weather?"}]
    message = ask(asked, tools=[WEATHER])["choices"][0]["message"]
    assert message["content"] is None
    call = message["tool_calls"][0]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    body = ask([*asked, message, result], tools=[WEATHER])
    assert body["choices"][0]["message"]["content"] == "The tool says: sunny"
    messages = llm.seen[-1][0].messages
    assert [(m.role, m.channel) for m in messages] == [
        ("user", None),
        ("assistant", "analysis"),
        ("assistant", "commentary"),
        ("tool", "commentary"),
    ]
    assert all(m.token_ids for m in messages if m.role == "assistant")
    final = body["choices"][0]["message"]
    ask([*asked, message, result, final, {"role": "user", "content": "thanks"}], tools=[WEATHER])
    assert llm.seen[-1][0].messages[-2].token_ids, "the answer's own tokens"


def test_an_edited_turn_is_rendered_anew(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    asked = [{"role": "user", "content": "weather?"}]
    message = ask(asked, tools=[WEATHER])["choices"][0]["message"]
    message["tool_calls"][0]["function"]["arguments"] = '{"city": "Rome"}'
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    ask([*asked, message, result], tools=[WEATHER])
    sent = llm.seen[-1][0].messages
    assert [m.content for m in sent] == ["weather?", "I need the tool.", '{"city": "Rome"}', "sunny"]
    assert not any(m.token_ids for m in sent)


def test_arguments_that_a_client_wrote_anew_still_name_the_sampled_turn(
    ask: Callable[..., Any], llm: ScriptedLLM
) -> None:
    asked = [{"role": "user", "content": "weather?"}]
    message = ask(asked, tools=[WEATHER])["choices"][0]["message"]
    function = message["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(json.loads(function["arguments"]), indent=2)
    del message["reasoning"], message["reasoning_content"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    ask([*asked, message, result], tools=[WEATHER])
    assert [bool(m.token_ids) for m in llm.seen[-1][0].messages] == [False, True, True, False]


def test_unknown_history_is_accepted_with_its_reasoning(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    call = {"id": "call_x", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    ask(
        [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "One moment.", "reasoning_content": "Hm.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_x", "content": [{"type": "text", "text": "sunny"}]},
        ],
        tools=[WEATHER],
    )
    sent = llm.seen[-1][0].messages[1:]
    assert [(m.channel, m.recipient, m.content) for m in sent] == [
        ("analysis", None, "Hm."),
        ("commentary", None, "One moment."),
        ("commentary", "functions.get_weather", "{}"),
        ("commentary", "assistant", "sunny"),
    ]


def test_a_preamble_is_content_but_never_breaks_a_format(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(preamble="Let me see.", text="{}")
    assert ask()["choices"][0]["message"]["content"] == "Let me see.\n\n{}"
    message = ask(response_format={"type": "json_object"})["choices"][0]["message"]
    assert message["content"] == "{}"
    assert "Let me see." in message["reasoning"]


def test_formats_reach_the_llm(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    body = ask(response_format={"type": "json_schema", "json_schema": {"name": "count", "schema": schema}})
    assert json.loads(body["choices"][0]["message"]["content"]) == {"n": 7}
    conversation, options = llm.seen[-1]
    assert options["schema"] == schema
    assert (conversation.response_schema, conversation.response_name) == (schema, "count")
    ask(response_format={"type": "json_object"})
    assert llm.seen[-1][1]["json_object"] is True


SHAPE = {"type": "object", "properties": {"n": {"type": "integer"}}}
GRAMMAR = 'start: "yes" | "no"'
SPELLINGS: list[tuple[dict[str, Any], tuple[str, Any]]] = [
    ({"guided_json": SHAPE}, ("schema", SHAPE)),
    ({"guided_json": json.dumps(SHAPE)}, ("schema", SHAPE)),
    ({"guided_regex": "yes|no"}, ("regex", "yes|no")),
    ({"guided_choice": ["yes", "no"]}, ("choices", ["yes", "no"])),
    ({"guided_grammar": GRAMMAR}, ("lark", GRAMMAR)),
    ({"structured_outputs": {"json": SHAPE}}, ("schema", SHAPE)),
    ({"structured_outputs": {"regex": "yes|no"}}, ("regex", "yes|no")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, ("choices", ["yes", "no"])),
    ({"structured_outputs": {"grammar": GRAMMAR}}, ("lark", GRAMMAR)),
    ({"structured_outputs": {"json_object": True}}, ("json_object", True)),
    ({"response_format": {"type": "text"}, "guided_regex": "yes"}, ("regex", "yes")),
]


@pytest.mark.parametrize(("fields", "form"), SPELLINGS)
def test_forms_reach_the_llm_in_the_spelling_of_vllms_clients(
    ask: Callable[..., Any], llm: ScriptedLLM, fields: dict[str, Any], form: tuple[str, Any]
) -> None:
    ask(**fields)
    shape = llm.seen[-1][1]["response_format"]
    assert (shape.kind, shape.value) == form


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("schema", {"guided_json": SHAPE}, "guided_json"),
        ("regex", {"guided_regex": "("}, "guided_regex"),
        ("choices", {"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ("lark", {"structured_outputs": {"grammar": "?"}}, "structured_outputs.grammar"),
    ],
)
def test_a_form_that_cannot_be_used_is_named_as_it_was_sent(
    ask: Callable[..., Any], llm: ScriptedLLM, kind: str, fields: dict[str, Any], param: str
) -> None:
    llm.write = lambda *_: SchemaError(f"{kind}: no", kind)
    error = ask(status=400, **fields)["error"]
    assert (error["param"], error["message"]) == (param, f"{param}: no")


@pytest.mark.parametrize(
    ("fields", "effort", "budget", "shown"),
    [
        ({"reasoning": {"effort": "high"}}, "high", None, True),
        ({"reasoning": {"effort": "high"}, "reasoning_effort": "low"}, "low", None, True),
        ({"reasoning": {"max_tokens": 100}}, "medium", 100, True),
        ({"reasoning": {"enabled": False}}, "low", None, True),
        ({"reasoning": {"exclude": True}}, "medium", None, False),
        ({"include_reasoning": False}, "medium", None, False),
    ],
)
def test_reasoning_is_asked_for_as_openrouters_clients_do(
    ask: Callable[..., Any],
    llm: ScriptedLLM,
    fields: dict[str, Any],
    effort: str,
    budget: int | None,
    shown: bool,
) -> None:
    message = ask(**fields)["choices"][0]["message"]
    conversation, options = llm.seen[-1]
    assert (conversation.reasoning_effort, options["reasoning_budget"]) == (effort, budget)
    assert ("reasoning" in message) == shown
    messages, _ = accumulate(ask(stream=True, **fields))
    assert messages[0]["content"] == "You said: hi"
    assert bool(messages[0].get("reasoning")) == shown


@pytest.mark.parametrize("stream", [True, False])
def test_a_schema_that_cannot_be_enforced_is_shown_unless_it_is_strict(
    ask: Callable[..., Any], llm: ScriptedLLM, stream: bool
) -> None:
    def write(conversation: Any, options: dict[str, Any]) -> Any:
        return SchemaError("schema: no", "schema") if options["schema"] else answer(conversation, options)

    llm.write = write
    shape = {"name": "tags", "schema": {"type": "object", "not": {"required": ["a"]}}}

    def asked(strict: bool | None, status: int) -> Any:
        wanted = {"type": "json_schema", "json_schema": shape | {"strict": strict}}
        return ask(status=status, stream=stream, response_format=wanted)

    for strict in (None, False):
        body = asked(strict, 200)
        said = accumulate(body)[0][0] if stream else body["choices"][0]["message"]
        assert json.loads(said["content"]) == {"answer": 42}
        conversation, options = llm.seen[-1]
        assert (options["schema"], options["json_object"]) == (None, True)
        assert conversation.response_schema == shape["schema"]
    assert asked(True, 400)["error"]["code"] == "invalid_schema"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "get_weather"}}, ("named", "get_weather")),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            },
            "required",
        ),
    ],
)
def test_tool_choices_reach_the_llm(
    ask: Callable[..., Any], llm: ScriptedLLM, choice: Any, expected: Any
) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    ask(tools=[WEATHER, other], **({"tool_choice": choice} if choice else {}))
    conversation, options = llm.seen[-1]
    assert options["tool_choice"] == expected
    names = [tool.name for tool in conversation.tools]
    allowed = isinstance(choice, dict) and choice["type"] == "allowed_tools"
    assert names == (["get_weather"] if allowed else ["get_weather", "other"])


def test_sampling_reaches_the_llm_under_its_own_names(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    ask(
        temperature=0,
        top_p=0.5,
        seed=3,
        stop=["x"],
        logit_bias={"5": -100},
        presence_penalty=1,
        frequency_penalty=-1,
        max_completion_tokens=9,
        max_tokens=5,
        reasoning_effort="minimal",
    )
    conversation, options = llm.seen[-1]
    params = options["params"]
    assert (params.temperature, params.top_p, params.seed, params.stop) == (0, 0.5, 3, ("x",))
    assert (params.max_tokens, dict(params.logit_bias)) == (9, {5: -100})
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert conversation.reasoning_effort == "low"


def test_a_top_p_of_0_is_greedy(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    ask("hello", top_p=0, temperature=1)
    assert llm.seen[-1][1]["params"].temperature == 0


def test_a_call_that_broke_off_is_the_same_in_one_piece(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(calls=[("get_weather", '{"city": "Par')], finish_reason="length")
    choice = ask("hello", tools=[WEATHER])["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Par'


def test_a_cut_answer_says_length(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(text="so", finish_reason="length")
    assert ask()["choices"][0]["finish_reason"] == "length"
    messages, _ = accumulate(ask(stream=True))
    assert messages[0]["finish"] == "length"


def test_a_failure_in_a_stream_ends_it_with_an_error(ask: Callable[..., Any], llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(text="so much text", fail_after=5)
    events = read_events(ask(stream=True))
    assert events[-1][1]["error"]["code"] == "engine_error"
    assert "[DONE]" not in [data for _, data in events]
    assert ask(status=500)["error"]["message"] == "the engine failed"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "tool", "tool_call_id": "no", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 17}, "n"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "nope"}}, "tools": [WEATHER]}, "tool_choice"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "x"}, "guided_regex"),
    ({"guided_json": {}, "structured_outputs": {"regex": "x"}}, "structured_outputs.regex"),
    ({"guided_json": "{"}, "guided_json"),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"functions": []}, "functions"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"stream": "yes"}, "stream"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[param for _, param in WRONG])
def test_what_is_wrong_is_named(ask: Callable[..., Any], fields: dict[str, Any], param: str) -> None:
    messages = fields.pop("messages", "hi") if "messages" in fields else "hi"
    assert error_of(ask(messages, status=400, **fields))[0] == param
    if "messages" not in fields and messages != "hi":
        fields["messages"] = messages  # the table is shared by all runs


def test_what_the_llm_finds_wrong_has_the_name_that_the_client_gave_it(
    ask: Callable[..., Any], llm: ScriptedLLM
) -> None:
    def refused(error: SchemaError, **fields: Any) -> Any:
        llm.write = lambda *_: error
        return ask(status=400, **fields)["error"]

    shape = {"name": "n", "strict": True, "schema": {"type": "object"}}
    error = refused(
        SchemaError("schema: no", "schema"), response_format={"type": "json_schema", "json_schema": shape}
    )
    assert error["param"] == "response_format.json_schema.schema"
    assert error["message"] == "response_format.json_schema.schema: no"
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    error = refused(
        SchemaError("tools[0].parameters has no sense", "tools[0].parameters"),
        tools=[other, WEATHER],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    )
    assert error["param"] == "tools[1].function.parameters"
    assert error["message"] == "tools[1].function.parameters has no sense"


def test_unknown_and_harmless_fields_are_ignored(ask: Callable[..., Any]) -> None:
    ask(store=True, metadata={"a": "b"}, user="u", prediction=None, service_tier="auto", made_up={"x": [1]})


def test_a_model_of_any_name_is_answered_by_the_one_that_is_loaded(ask: Callable[..., Any]) -> None:
    assert ask(model="gpt-4o")["model"] == "scripted"


def test_the_progress_of_a_prompt_is_streamed_to_those_who_ask(
    ask: Callable[..., Any], llm: ScriptedLLM
) -> None:
    reads = [PromptProgress(0, 0, 3000), PromptProgress(2048, 0, 3000)]
    llm.write = lambda *_: Script(text="hello", reads=reads)
    assert "progress" not in ask("hi", stream=True)
    assert "progress" not in json.dumps(ask("hi", return_progress=True))
    text = ask("hi", stream=True, return_progress=True)
    messages, _ = accumulate(text)
    assert messages[0]["content"] == "hello"
    told = [data["prompt_progress"] for _, data in read_events(text) if "prompt_progress" in data]
    assert [(one["processed"], one["cache"], one["total"]) for one in told] == [(0, 0, 3000), (2048, 0, 3000)]
    assert 0 <= told[0]["time_ms"] <= told[1]["time_ms"]
