"""Whatever is sent: a malformed body is answered 4xx in OpenAI's shape, and no request of any shape 5xx."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import ScriptedLLM

pytest_plugins = ["tests.support.server_fixtures"]

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "tools": [TOOL],
        "tool_choice": "auto",
        "temperature": 0.5,
        "max_tokens": 5,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}},
        },
        "stop": ["x"],
        "logit_bias": {"1": 2},
        "stream_options": {"include_usage": True},
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "max_tokens": 5,
        "system": [{"type": "text", "text": "s"}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "thinking": {"type": "enabled", "budget_tokens": 5},
    },
    "/v1/completions": {"prompt": "hi", "max_tokens": 3, "logprobs": 1, "n": 1},
}
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "\u0000",
    "x" * 999,
    [],
    {},
    [[]],
    [None],
    {"type": "x"},
    {"": {}},
]


def mutated(value: Any, random_: random.Random) -> Any:
    """A copy with one place replaced by junk, removed, or put under another key."""
    value = json.loads(json.dumps(value))
    spots: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)):
            spots.append((part, key))
            if isinstance(part[key], dict | list):
                walk(part[key])

    walk(value)
    parent, key = random_.choice(spots)
    action = random_.random()
    if action < 0.75:
        parent[key] = random_.choice(JUNK)
    elif action < 0.9:
        del parent[key]
    elif isinstance(parent, dict):
        parent[random_.choice(["stream", "n", "messages", "x"])] = parent.pop(key)
    return value


def broken(text: bytes, random_: random.Random) -> bytes:
    """The text with bytes cut out, put in or changed, so that it is (nearly always) no JSON any more."""
    data = bytearray(text)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data))
        match random_.randrange(3):
            case 0:
                del data[at : at + random_.randint(1, 30)]
            case 1:
                data[at:at] = random_.choice(
                    [b"\xff", b"{", b"]", b'"', b"\\u12", b"NaN", b"\x00", b"9" * 5000]
                )
            case _:
                data[at] = random_.randrange(256)
        data = data or bytearray(b"{")
    return bytes(data)


def check(response: Any, sent: bytes) -> None:
    assert response.status_code < 500, (sent, response.text)
    if response.status_code >= 400:
        error = response.json()["error"]
        assert {"message", "type", "param", "code"} <= set(error), (sent, response.text)
        assert error["message"] and error["type"] == "invalid_request_error", (sent, response.text)


@pytest.mark.parametrize("path", GOOD)
def test_malformed_bodies_are_refused_in_the_usual_shape(scripted: TestClient, path: str) -> None:
    """500 bodies for each API, 2,000 in all: half of them no JSON, half JSON of a wrong shape."""
    random_ = random.Random(path)
    good = json.dumps(GOOD[path]).encode()
    headers = {"Content-Type": "application/json"}
    assert scripted.post(path, content=good, headers=headers).status_code == 200
    refused = 0
    for number in range(500):
        body = broken(good, random_) if number % 2 else json.dumps(mutated(GOOD[path], random_)).encode()
        response = scripted.post(path, content=body, headers=headers)
        check(response, body)
        refused += response.status_code >= 400
    assert refused > 250


def test_the_openapi_document_holds_no_request_that_breaks_the_server(tokenizer: Tokenizer) -> None:
    """schemathesis makes requests out of the document, right ones and wrong ones, for each operation."""
    settings_ = ServerSettings(allowed_hosts=("testserver",))
    app = create_app(ScriptedLLM(tokenizer), settings_)  # type: ignore[arg-type]
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses = {}
    results: Any = schema.get_all_operations()
    for operation in (result.ok() for result in results):
        statuses[operation.label] = exercise(operation)
    assert 200 in statuses["GET /v1/models"] and 400 in statuses["POST /v1/chat/completions"]


def exercise(operation: Any) -> set[int]:
    """Call an operation with generated cases; the statuses seen."""
    seen = set()
    modes = list(schemathesis.GenerationMode)
    if "/v1/messages" in operation.label:
        # schemathesis can search for minutes for a wrong one of these; those above are wrong enough.
        modes = [schemathesis.GenerationMode.POSITIVE]
    for mode in modes:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=3,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def call(case: Any) -> None:
            response = case.call()
            seen.add(response.status_code)
            assert response.status_code < 500, response.text

        # Not every operation has wrong requests: /health takes nothing.
        with contextlib.suppress(Unsatisfiable):
            call()
    return seen
