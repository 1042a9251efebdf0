"""The life of a generation: queue, first event, disconnect, time limit, shutdown."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from mlx_gptoss.errors import (
    BusyError,
    ConfigError,
    ContextLengthError,
    HostError,
    MemoryLimitError,
    ModelNotFoundError,
    RequestError,
    SchemaError,
    TokenizerError,
    ToolError,
)
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.server.http.errors import as_api_error
from mlx_gptoss.server.run import serve
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM
from tests.support.server_help import live, read_events, wait_until

pytest_plugins = ["tests.support.server_fixtures"]

CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
ENDLESS = Script(text="x" * 20_000, delay=0.005)


@pytest.fixture(scope="module")
def slow(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedLLM, FastAPI]]:
    """A live server with room for two generations, on an LLM that never ends by itself."""
    llm = ScriptedLLM(tokenizer, lambda *_: ENDLESS)
    app = create_app(llm, ServerSettings(port=0, max_active=2, heartbeat=0.2))  # type: ignore[arg-type]
    with live(app) as url:
        yield url, llm, app


def ended(llm: ScriptedLLM) -> bool:
    return all(thread.ended.is_set() for thread in llm.running)


PATHS = [
    (CHAT, HI),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", HI | {"max_tokens": 9}),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 100_000_000}),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), PATHS, ids=[path for path, _ in PATHS])
def test_a_client_that_goes_away_cancels_its_generation(
    slow: tuple[str, ScriptedLLM, FastAPI], path: str, body: dict[str, Any], stream: bool
) -> None:
    url, llm, app = slow
    started = len(llm.running)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request(
        "POST", path, json.dumps(body | {"stream": stream}), {"Content-Type": "application/json"}
    )
    if stream:
        assert connection.getresponse().read(10)
    wait_until(lambda: len(llm.running) > started)
    assert not ended(llm)
    assert connection.sock is not None or stream
    connection.close()
    if stream:  # http.client leaves the socket to the response
        del connection
    wait_until(lambda: ended(llm))
    wait_until(lambda: not app.state.server.jobs.active)


def test_one_generation_too_many_is_told_when_to_come_back(slow: tuple[str, ScriptedLLM, FastAPI]) -> None:
    url, llm, app = slow
    with httpx.Client(base_url=url) as client:
        first = client.build_request("POST", CHAT, json=HI | {"stream": True, "n": 2})
        response = client.send(first, stream=True)
        try:
            refused = client.post(CHAT, json=HI)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert client.get("/health").status_code == 200
        finally:
            response.close()
    wait_until(lambda: ended(llm) and not app.state.server.jobs.active)


def test_a_choice_that_fails_ends_the_others(tokenizer: Tokenizer) -> None:
    scripts = iter([Script(text="x" * 40, fail_after=3), ENDLESS])
    llm = ScriptedLLM(tokenizer, lambda *_: next(scripts))
    app = create_app(llm)  # type: ignore[arg-type]
    client = TestClient(app, base_url="http://localhost")
    events = read_events(client.post(CHAT, json=HI | {"stream": True, "n": 2}).text)
    assert events[-1][1]["error"]["code"] == "engine_error"
    wait_until(lambda: ended(llm) and not app.state.server.jobs.active)


def test_choices_of_which_one_cannot_begin_leave_nothing_running(tokenizer: Tokenizer) -> None:
    scripts: Iterator[Script | Exception] = iter([ENDLESS, SchemaError("no", "tools")])
    llm = ScriptedLLM(tokenizer, lambda *_: next(scripts))
    app = create_app(llm)  # type: ignore[arg-type]
    client = TestClient(app, base_url="http://localhost")
    assert client.post(CHAT, json=HI | {"n": 2}).status_code == 400
    assert not app.state.server.jobs.active
    wait_until(lambda: ended(llm))


def test_a_request_ends_when_its_time_is_up(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda *_: ENDLESS)
    app = create_app(llm, ServerSettings(request_timeout=0.3))  # type: ignore[arg-type]
    client = TestClient(app, base_url="http://localhost")
    response = client.post(CHAT, json=HI)
    assert response.status_code == 504
    streamed = read_events(client.post(CHAT, json=HI | {"stream": True}).text)
    assert "longer than 0.3 s" in streamed[-1][1]["error"]["message"]
    wait_until(lambda: ended(llm))


def test_a_waiting_stream_is_kept_alive(tokenizer: Tokenizer) -> None:
    """The answer begins when its client has seen that it is waited for."""
    seen = threading.Event()
    llm = ScriptedLLM(tokenizer, lambda *_: Script(text="late", gate=seen))
    app = create_app(llm, ServerSettings(port=0, heartbeat=0.05))  # type: ignore[arg-type]
    with live(app) as url:
        for path, fields, sign in (
            (CHAT, {}, ": waiting"),
            ("/v1/messages", {"max_tokens": 5}, "event: ping"),
        ):
            lines = list[str]()
            seen.clear()
            with httpx.stream("POST", url + path, json=HI | fields | {"stream": True}, timeout=60) as stream:
                for line in stream.iter_lines():
                    lines.append(line)
                    if lines.count(sign) >= 2:
                        seen.set()
            assert seen.is_set() and any("late" in line for line in lines), path


def stopped(tokenizer: Tokenizer, script: Script, grace: float, over: threading.Event) -> Any:
    """The last event of an answer during which the server is stopped; `over` is set when that has begun."""
    llm = ScriptedLLM(tokenizer, lambda *_: script)
    app = create_app(llm, ServerSettings(port=0, shutdown_grace=grace))  # type: ignore[arg-type]
    jobs, answers = app.state.server.jobs, list[str]()
    drain = jobs.drain

    def begun() -> None:
        drain()
        over.set()

    jobs.drain = begun

    def ask(url: str) -> None:
        answers.append(httpx.post(url + CHAT, json=HI | {"stream": True}, timeout=60).text)

    with live(app) as url:
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        wait_until(lambda: llm.running)
    thread.join(60)
    wait_until(lambda: ended(llm))
    return read_events(answers[0])[-1][1]


def test_stopping_lets_short_answers_finish_and_ends_long_ones(tokenizer: Tokenizer) -> None:
    over = threading.Event()
    assert stopped(tokenizer, Script(text="y" * 40, gate=over), 60, over) == "[DONE]"
    assert stopped(tokenizer, ENDLESS, 0.2, over)["error"]["code"] == "shutting_down"


def test_the_port_is_open_while_the_model_loads(tokenizer: Tokenizer) -> None:
    app = create_app(None, ServerSettings(port=0))
    with live(app) as url, httpx.Client(base_url=url) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        for response in (client.get("/v1/models"), client.post(CHAT, json=HI)):
            assert response.status_code == 503 and response.headers["Retry-After"]
            assert response.json()["error"]["code"] == "model_loading"
        assert client.get("/").status_code == client.get("/metrics").status_code == 200
        app.state.server.attach(ScriptedLLM(tokenizer))
        assert client.get("/health").json() == {"status": "ok", "model": "scripted", "loaded": True}
        assert client.post(CHAT, json=HI).status_code == 200


def test_what_cannot_be_loaded_stops_the_server() -> None:
    def load() -> Any:
        raise ModelNotFoundError("no model there")

    with pytest.raises(ModelNotFoundError, match="no model there"):
        serve(load, ServerSettings(port=0))


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (RequestError("m", "top_p"), 400, "invalid_value", "top_p"),
        (ContextLengthError(5000, 4096), 400, "context_length_exceeded", "messages"),
        (SchemaError("m", "tools"), 400, "invalid_schema", "tools"),
        (ToolError("m", "tools"), 400, "invalid_tool", "tools"),
        (BusyError("m", 2.5), 429, "rate_limit_exceeded", None),
        (HostError("m", 2.5), 503, "host_lost", None),
        (MemoryLimitError("m"), 503, "insufficient_memory", None),
        (TokenizerError("m"), 503, "no_tokenizer", None),
        (ConfigError("m"), 500, "engine_error", None),
        (ValueError("a secret"), 500, "internal_error", None),
    ],
)
def test_every_error_has_a_status(error: Exception, status: int, code: str, param: str | None) -> None:
    api = as_api_error(error)
    assert (api.status, api.code, api.param) == (status, code, param)
    assert "secret" not in api.message
    if isinstance(error, BusyError | HostError):
        assert api.headers["Retry-After"] == "3"
    if isinstance(error, ContextLengthError):
        assert "5,000" in api.message and "4,096" in api.message
