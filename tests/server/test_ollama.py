"""Ollama's API and LM Studio's model list on a scripted LLM: lines, options, tools, formats, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mlx_gptoss.errors import ContextLengthError, RequestError
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.server.ollama.models_routes import ollama_name
from mlx_gptoss.server.settings import seconds_of
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM

pytest_plugins = ["tests.support.server_fixtures"]

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
HI = [{"role": "user", "content": "hi"}]
Post = Callable[..., Any]


@pytest.fixture
def post(scripted: TestClient) -> Post:
    """Post a request to /api/...; its object, or its lines when it is streamed."""

    def send(path: str, *, status: int = 200, **fields: Any) -> Any:
        reply = scripted.post(f"/api/{path}", json={"model": "gpt-oss:20b", "stream": False, **fields})
        assert reply.status_code == status, reply.text
        if fields.get("stream", False) is False or status != 200:
            return reply.json()
        assert reply.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in reply.text.splitlines()]

    return send


def test_a_chat_answers_with_thinking_and_counts(post: Post) -> None:
    body = post("chat", messages=[*HI, {"role": "system", "content": "Be brief."}])
    assert body["message"] == {
        "role": "assistant",
        "content": "You said: Be brief.",
        "thinking": "The user asks.",
    }
    assert (body["model"], body["done"], body["done_reason"]) == ("gpt-oss:20b", True, "stop")
    assert datetime.fromisoformat(body["created_at"]).tzinfo is not None
    assert body["prompt_eval_count"] == len("hiBe brief.") and body["prompt_eval_cached_count"] == 3
    assert body["eval_count"] > 0
    times = [body[f"{part}_duration"] for part in ("load", "prompt_eval", "eval", "total")]
    assert all(isinstance(time, int) and time >= 0 for time in times)
    assert sum(times[:3]) == pytest.approx(times[3], abs=1000)


def test_chat_streams_unless_told_otherwise(scripted: TestClient) -> None:
    reply = scripted.post("/api/chat", json={"model": "any", "messages": HI})
    *pieces, last = [json.loads(line) for line in reply.text.splitlines()]
    assert all(piece["done"] is False for piece in pieces) and last["done"] is True
    assert "".join(piece["message"].get("thinking", "") for piece in pieces) == "The user asks."
    assert "".join(piece["message"]["content"] for piece in pieces) == "You said: hi"
    assert last["message"] == {"role": "assistant", "content": ""} and last["eval_count"] > 0


@pytest.mark.parametrize(
    ("think", "effort", "shown"),
    [
        (None, "medium", True),
        (True, "medium", True),
        (False, "low", False),
        ("low", "low", True),
        ("high", "high", True),
        ("none", "low", False),
    ],
)
def test_think_is_the_effort_and_whether_thinking_is_shown(
    post: Post, llm: ScriptedLLM, think: Any, effort: str, shown: bool
) -> None:
    for path, fields in (("chat", {"messages": HI}), ("generate", {"prompt": "hi"})):
        body = post(path, think=think, **fields)
        assert llm.seen[-1][0].reasoning_effort == effort
        assert ("thinking" in body.get("message", body)) == shown


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("named", ["id", "tool_name", "order"])
def test_a_tool_loop_goes_on_from_the_calls_that_clients_send_back(
    post: Post, llm: ScriptedLLM, stream: bool, named: str
) -> None:
    asked = {"role": "user", "content": "weather?"}
    first = post("chat", messages=[asked], tools=[WEATHER], stream=stream)
    if stream:
        [message] = [line["message"] for line in first if line["message"].get("tool_calls")]
    else:
        message = first["message"]
        assert first["done_reason"] == "stop"
    [call] = message["tool_calls"]
    assert call["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}
    result = {"role": "tool", "content": "sunny"}
    match named:
        case "id":
            result["tool_call_id"] = call["id"]
        case "tool_name":
            result["tool_name"] = "get_weather"
            del call["id"]
        case _:
            del call["id"]
    body = post("chat", messages=[asked, message, result], tools=[WEATHER])
    assert body["message"]["content"] == "The tool says: sunny"
    history = llm.seen[-1][0].messages
    assert [m.content for m in history if m.role == "assistant" and m.recipient] == [
        '{"city": "Paris"}' if named == "id" else '{"city":"Paris"}'
    ]
    assert any(m.token_ids for m in history) == (named == "id"), "the sampled tokens, where they are known"


def test_results_find_their_calls_by_name(post: Post, llm: ScriptedLLM) -> None:
    calls: list[Any] = [{"function": {"name": name, "arguments": {}}} for name in ("one", "two")]
    results = [{"role": "tool", "content": name, "tool_name": name} for name in ("two", "one")]
    post("chat", messages=[*HI, {"role": "assistant", "content": "", "tool_calls": calls}, *results])
    made = {m.call_id: m.recipient for m in llm.seen[-1][0].messages if m.role == "assistant"}
    told = {m.call_id: m.content for m in llm.seen[-1][0].messages if m.role == "tool"}
    assert {made[call]: text for call, text in told.items()} == {
        "functions.one": "one",
        "functions.two": "two",
    }


def test_formats_are_asked_of_the_llm(post: Post, llm: ScriptedLLM) -> None:
    assert json.loads(post("chat", messages=HI, format=SCHEMA)["message"]["content"]) == {"city": "Paris"}
    assert llm.seen[-1][1]["schema"] == SCHEMA
    assert post("generate", prompt="hi", format="json")["response"] == '{"answer": 42}'
    assert post("generate", prompt="hi", format="")["response"] == "You said: hi"


def test_options_reach_the_llm_under_their_own_names(post: Post, llm: ScriptedLLM) -> None:
    options = {
        "num_predict": 7.0,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": 3,
        "stop": ["END", ""],
        "repeat_penalty": 1.1,
        "num_ctx": 8192,
        "mirostat": 0,
    }
    post("chat", messages=HI, options=options)
    params = llm.seen[-1][1]["params"]
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.5, 0.9, 40)
    assert (params.min_p, params.seed, params.stop, params.repetition_penalty) == (0.1, 3, ("END",), 1.1)
    for unlimited in (-1, -2, 0):
        post("chat", messages=HI, options={"num_predict": unlimited})
        assert llm.seen[-1][1]["params"].max_tokens is None


def test_the_end_says_why(post: Post, llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(text="so much", finish_reason="length")
    assert post("generate", prompt="hi")["done_reason"] == "length"
    llm.write = lambda *_: Script(text="much text", fail_after=3)
    assert post("chat", messages=HI, stream=True)[-1] == {"error": "the engine failed"}
    assert "error" in post("chat", messages=HI, status=500)


def test_generate_has_a_system_message_and_logprobs(post: Post, llm: ScriptedLLM) -> None:
    body = post("generate", prompt="why?", system="Be brief.", logprobs=True, top_logprobs=1)
    assert (body["response"], body["thinking"]) == ("You said: why?", "The user asks.")
    assert llm.seen[-1][0].instructions == "Be brief."
    assert "".join(entry["token"] for entry in body["logprobs"]) == body["response"]
    assert body["logprobs"][0]["top_logprobs"][0]["logprob"] == -0.5
    lines = post("generate", prompt="why?", stream=True)
    assert "".join(line["response"] for line in lines) == "You said: why?"


def test_a_raw_prompt_is_continued_token_by_token(
    post: Post, llm: ScriptedLLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    submit = llm.submit

    def spy(tokens: Any, *args: Any, **options: Any) -> Any:
        seen.append(list(tokens))
        return submit(tokens, *args, **options)

    monkeypatch.setattr(llm, "submit", spy)
    prompt = "<|start|>user<|message|>hi"
    options = {"num_predict": 5, "stop": ["de"]}
    assert post("generate", prompt=prompt, raw=True, options=options)["response"] == "abc"
    special = tokenizer.special
    assert seen[-1] == [special.start, *tokenizer.encode("user"), special.message, *tokenizer.encode("hi")]
    lines = post("generate", prompt="x", raw=True, stream=True, options={"num_predict": 3}, logprobs=True)
    assert [line["response"] for line in lines] == ["a", "b", "c", ""]
    assert (lines[-1]["done_reason"], lines[-1]["eval_count"]) == ("length", 3)
    assert lines[0]["logprobs"][0]["token"] == "a"


def test_an_empty_request_only_asks_for_the_model(post: Post) -> None:
    for path in ("chat", "generate"):
        body = post(path, keep_alive="5m")
        assert (body["done"], body["done_reason"]) == (True, "load")
        assert post(path, keep_alive=0)["done_reason"] == "load"  # this server keeps its model


def test_the_model_is_listed_and_shown(scripted: TestClient) -> None:
    [model] = scripted.get("/api/tags").json()["models"]
    assert model["name"] == model["model"] == "scripted:latest"
    assert model["size"] > 3e6 and len(model["digest"]) == 64
    assert model["details"]["family"] == "gptoss" and model["details"]["quantization_level"] == "MXFP4"
    assert model["details"]["parameter_size"] == "3.2M"
    datetime.fromisoformat(model["modified_at"])
    shown = scripted.post("/api/show", json={"model": "whatever:latest"}).json()
    assert {"completion", "tools", "thinking"} <= set(shown["capabilities"])
    info = shown["model_info"]
    assert info["general.architecture"] == "gptoss" and info["gptoss.context_length"] == 4096
    [running] = scripted.get("/api/ps").json()["models"]
    assert running["name"] == model["name"] and running["size_vram"] > 0
    assert datetime.fromisoformat(running["expires_at"]).year == 2318
    assert tuple(map(int, scripted.get("/api/version").json()["version"].split("."))) >= (0, 13, 4)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gpt-oss-20b", "gpt-oss:20b"),
        ("gpt-oss-120b-MXFP4-Q8", "gpt-oss:120b"),
        ("gpt-oss-safeguard-20b", "gpt-oss-safeguard:20b"),
        ("my-tune", "my-tune:latest"),
        ("my-tune:v2", "my-tune:v2"),
    ],
)
def test_openais_models_have_the_names_that_ollama_gives_them(name: str, told: str) -> None:
    assert ollama_name(name) == told


def test_lm_studio_lists_the_model_with_its_details(scripted: TestClient) -> None:
    [model] = scripted.get("/api/v0/models").json()["data"]
    assert model["id"] == "scripted" and model["state"] == "loaded" and model["type"] == "llm"
    assert (model["quantization"], model["compatibility_type"]) == ("MXFP4", "mlx")
    assert (model["max_context_length"], model["loaded_context_length"]) == (131072, 4096)
    assert scripted.get("/api/v0/models/scripted").json() == model
    missing = scripted.get("/api/v0/models/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"messages": [{"role": "user", "content": "look", "images": ["aGk="]}]}, "text only"),
    ("chat", {"messages": [{"role": "nobody", "content": "hi"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "tool", "content": "hi"}]}, "no earlier call"),
    ("chat", {"messages": HI, "options": {"temperature": -1}}, "options.temperature"),
    ("chat", {"messages": HI, "options": {"stop": ["x"] * 17}}, "options.stop"),
    ("chat", {"messages": HI, "think": "very"}, "think"),
    ("chat", {"messages": HI, "format": "xml"}, "format"),
    ("chat", {"messages": HI, "keep_alive": "soon"}, "keep_alive"),
    ("chat", {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("generate", {"prompt": "hi", "images": ["aGk="]}, "text only"),
    ("generate", {"prompt": "hi", "suffix": "there"}, "suffix"),
    ("generate", {"prompt": "hi", "template": "{{ .Prompt }}"}, "template"),
    ("generate", {"prompt": "hi", "context": [1, 2]}, "context"),
    ("generate", {"prompt": "hi", "raw": True, "format": "json"}, "format"),
    ("nothing", {}, "/api/nothing"),
]


@pytest.mark.parametrize(("path", "fields", "told"), WRONG)
def test_what_is_wrong_is_told_in_ollamas_shape(
    post: Post, path: str, fields: dict[str, Any], told: str
) -> None:
    body = post(path, status=404 if path == "nothing" else 400, **fields)
    assert list(body) == ["error"] and told in body["error"]


def test_empty_fields_say_nothing(post: Post) -> None:
    body = post("generate", prompt="hi", suffix="", template="", context=[], images=[], system="")
    assert body["response"] == "You said: hi"


def test_prompts_that_are_too_long_are_told(post: Post, llm: ScriptedLLM) -> None:
    llm.write = lambda *_: ContextLengthError(9, 4)
    assert "9 tokens" in post("chat", messages=HI, status=400)["error"]
    long = "x" * (70_000)
    assert "at least" in post("generate", prompt=long, raw=True, status=400)["error"]


def test_bodies_need_no_content_type(scripted: TestClient, tokenizer: Tokenizer) -> None:
    """As Ollama's own examples for curl send them."""
    body = json.dumps({"model": "any", "prompt": "hi", "stream": False})
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert scripted.post("/api/generate", content=body, headers=form).json()["response"] == "You said: hi"
    assert scripted.post("/v1/completions", content=body, headers=form).status_code == 400
    locked = create_app(ScriptedLLM(tokenizer), ServerSettings(api_key="k"))  # type: ignore[arg-type]
    client = TestClient(locked, base_url="http://localhost")
    refused = client.get("/api/tags")
    assert refused.status_code == 401 and list(refused.json()) == ["error"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("90", 90), ("1h30m", 5400), ("1.5s", 1.5), ("250ms", 0.25), ("-1", -1), ("2d", 172800)],
)
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert seconds_of(text, "idle") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "m", "5 minutes", "1h 30m", "5m30", "٥m", "1" * 400])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="expected a time such as"):
        seconds_of(text, "idle")
