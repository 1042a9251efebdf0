"""Who may come in, and what may be sent: each defence of the server, tried from outside."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient

from mlx_gptoss.errors import RequestError
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM
from tests.support.server_help import live

pytest_plugins = ["tests.support.server_fixtures"]

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
KEY = "sk-local-secret"


def client_of(tokenizer: Tokenizer, base: str = "http://localhost", **settings: Any) -> TestClient:
    app = create_app(ScriptedLLM(tokenizer), ServerSettings(**settings))  # type: ignore[arg-type]
    return TestClient(app, base_url=base)


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer) -> TestClient:
    """A server with a key and small limits."""
    return client_of(
        tokenizer,
        api_key=KEY,
        cors_origins=("http://editor.example",),
        max_body_bytes=20_000,
        max_json_depth=20,
        max_messages=5,
        max_tools=3,
        max_schema_bytes=500,
    )


@pytest.fixture
def authorized() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def code_of(response: Any) -> str:
    return str(response.json()["error"]["code"])


# --- addresses and keys


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(RequestError, match="--no-auth") as caught:
        ServerSettings(host=host)
    assert caught.value.field == "host"
    ServerSettings(host=host, no_auth=True)
    ServerSettings(host=host, api_key="k")


def test_loopback_needs_none() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert ServerSettings(host=host).loopback


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"x-api-key": KEY + "x"},
        {"Authorization": "Bearer é".encode("latin-1")},
    ],
)
def test_a_wrong_key_is_refused_everywhere(locked: TestClient, headers: Any) -> None:
    for method, path in (
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
    ):
        response = locked.request(method, path, headers=headers, json=HI if method == "POST" else None)
        assert response.status_code == 401
        assert code_of(response) == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/", "/health"):
        assert locked.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"x-api-key": KEY},
        {"x-api-key": KEY, "Authorization": "Bearer the-sdk's-own"},
        {"x-api-key": "the-sdk's-own", "Authorization": f"Bearer {KEY}"},
    ],
)
def test_the_key_is_taken_in_both_places(locked: TestClient, headers: dict[str, str]) -> None:
    assert locked.post(CHAT, json=HI, headers=headers).status_code == 200


def test_what_was_stored_under_one_key_is_not_found_under_another(tokenizer: Tokenizer) -> None:
    """As after a change of keys, or with several: the state outlives a key."""
    app = create_app(ScriptedLLM(tokenizer), ServerSettings(api_key="alice"))  # type: ignore[arg-type]
    client = TestClient(app, base_url="http://localhost")
    alice, bob = ({"x-api-key": name} for name in ("alice", "bob"))
    body = client.post("/v1/responses", json={"input": "hi"}, headers=alice).json()
    path, item = f"/v1/responses/{body['id']}", {"type": "item_reference", "id": body["output"][0]["id"]}
    assert client.get(path, headers=alice).status_code == 200
    app.state.server.settings = replace(app.state.server.settings, api_key="bob")
    for answered in (
        client.get(path, headers=bob),
        client.get(f"{path}/input_items", headers=bob),
        client.delete(path, headers=bob),
        client.post("/v1/responses", json={"input": "x", "previous_response_id": body["id"]}, headers=bob),
        client.post("/v1/responses", json={"input": [item]}, headers=bob),
    ):
        assert answered.status_code == 404
    app.state.server.settings = replace(app.state.server.settings, api_key="alice")
    assert client.get(path, headers=alice).json() == body


def test_a_refusal_that_left_the_body_unread_closes_the_connection(locked: TestClient) -> None:
    for headers in ({}, {"Host": "evil.example"}, {"Host": "a b"}, {"Origin": "http://evil.example"}):
        response = locked.post(CHAT, json=HI, headers=headers)
        assert response.status_code in (400, 401, 403)
        assert response.headers["connection"] == "close"


def test_a_refusal_of_a_body_that_was_read_keeps_the_connection(scripted: TestClient) -> None:
    for body in (b"\xff", b"[" * 1000, b"{}"):
        response = scripted.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert "connection" not in response.headers


# --- Host and Origin


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "a b",
        "",
        "x@localhost",
        "[::1]evil",
        "[::1]evil:80",
        "evil[::1]",
        "localhost:99999",
        "localhost:8x",
        "localhost\\evil",
        "localhost/evil",
        "localhost..",
        "\u212aocalhost",
    ],
)
def test_a_host_that_is_not_ours_is_refused(scripted: TestClient, host: str) -> None:
    response = scripted.post(CHAT, json=HI, headers={b"Host": host.encode()})
    assert response.status_code in (400, 403)
    assert code_of(response) in ("invalid_host", "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST", "localhost."])
def test_our_own_hosts_are_served(scripted: TestClient, host: str) -> None:
    assert scripted.get("/v1/models", headers={"Host": host}).status_code == 200


def test_an_open_server_takes_addresses_and_the_names_it_was_given(tokenizer: Tokenizer) -> None:
    client = client_of(tokenizer, host="0.0.0.0", api_key=KEY, allowed_hosts=("mac.lan",))
    for host, status in (("192.168.1.5:8000", 200), ("mac.lan", 200), ("evil.example", 403)):
        assert client.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:3000", "https://localhost.evil.example"]
)
def test_other_origins_are_refused_without_cors_headers(scripted: TestClient, origin: str) -> None:
    for method in ("POST", "GET", "OPTIONS"):
        response = scripted.request(method, CHAT, headers={"Origin": origin})
        assert response.status_code == 403
        assert code_of(response) == "origin_not_allowed"
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_requests_of_other_sites_without_an_origin_are_refused(scripted: TestClient) -> None:
    cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert scripted.get("/v1/models", headers=cross).status_code == 403
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert scripted.get("/", headers=followed).status_code == 200


@pytest.mark.parametrize("own_first", [True, False])
@pytest.mark.parametrize("name", ["Origin", "Sec-Fetch-Site"])
def test_headers_that_decide_who_calls_may_not_contradict_themselves(
    scripted: TestClient, own_first: bool, name: str
) -> None:
    values = {"Origin": ["http://localhost", "http://evil.example"], "Sec-Fetch-Site": ["none", "cross-site"]}
    pair = values[name] if own_first else values[name][::-1]
    response = scripted.post(CHAT, json=HI, headers=[(name, value) for value in pair])
    assert (response.status_code, code_of(response)) == (403, "origin_not_allowed")


def test_our_own_page_may_call(scripted: TestClient) -> None:
    response = scripted.post(CHAT, json=HI, headers={"Origin": "http://localhost"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_an_allowed_origin_gets_cors_headers(locked: TestClient, authorized: dict[str, str]) -> None:
    origin = {"Origin": "http://editor.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = locked.options(CHAT, headers=origin | asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "http://editor.example"
    assert preflight.headers["access-control-allow-headers"] == "authorization"
    for headers, status in ((origin | authorized, 200), (origin, 401)):
        response = locked.post(CHAT, json=HI, headers=headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "http://editor.example"


# --- what is sent


def test_a_body_that_is_too_large_is_refused(locked: TestClient, authorized: dict[str, str]) -> None:
    big = {"messages": [{"role": "user", "content": "x" * 30_000}]}
    response = locked.post(CHAT, json=big, headers=authorized)
    assert (response.status_code, code_of(response)) == (413, "body_too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    response = locked.post(CHAT, content=chunks(), headers=authorized)
    assert (response.status_code, code_of(response)) == (413, "body_too_large")


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return (
        '{"messages": [{"role": "user", "content": "[[{{"}], "x": ' + opening * depth + closing * depth + "}"
    )


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}"), ('["\\"[",', "]")])
def test_json_that_is_too_deep_is_refused_before_it_is_parsed(
    locked: TestClient, authorized: dict[str, str], brackets: tuple[str, str]
) -> None:
    headers = authorized | {"Content-Type": "application/json"}
    opening, closing = brackets
    inner = nested(30, opening, closing)
    response = locked.post(CHAT, content=inner, headers=headers)
    assert (response.status_code, code_of(response)) == (400, "json_too_deep")
    shallow = nested(10, "[", "]")
    assert locked.post(CHAT, content=shallow, headers=headers).status_code == 200


def test_scanning_json_for_its_depth_takes_linear_time(
    locked: TestClient, authorized: dict[str, str]
) -> None:
    """Escaped quotes in a string that never ends are the bad case for a pattern."""
    from mlx_gptoss.server.http.bodies import check_structure

    check_structure(b'["' + rb"\"" * 2_000_000 + b"[" * 100, ServerSettings())


COUNTED = {
    "messages": '{"messages": [' + '{"role":"user","content":""},' * 60_000 + "{}]}",
    "ignored objects": '{"messages": [], "x": [' + "{}," * 600_000 + "1]}",
    "ignored numbers": '{"messages": [], "x": [' + "1," * 1_200_000 + "1]}",
    "content parts": '{"messages": [{"role": "user", "content": ['
    + '{"type":"text","text":""},' * 60_000
    + "{}]}]}",
}


@pytest.mark.parametrize("name", COUNTED)
def test_json_of_too_many_parts_is_refused_before_it_is_parsed(
    scripted: TestClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was parsed")

    headers = {"Content-Type": "application/json"}
    with monkeypatch.context() as patch:
        patch.setattr("mlx_gptoss.server.http.bodies.json.loads", parse)
        response = scripted.post(CHAT, content=COUNTED[name], headers=headers)
    assert (response.status_code, code_of(response)) == (400, "json_too_large")


def test_brackets_and_commas_in_texts_are_not_counted(scripted: TestClient, llm: ScriptedLLM) -> None:
    llm.write = lambda *_: Script(text="short")
    text = '[{,\\",' * 200_000
    response = scripted.post(CHAT, json={"messages": [{"role": "user", "content": text}]})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": [0.5] * 400_000}),
        ("/v1/completions", {"prompt": "a", "stop": [1] * 400_000}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): "x" for i in range(200_000)}}),
        ("/v1/responses", {"input": [1] * 400_000}),
        ("/v1/responses", {"input": "a", "metadata": {str(i): 1 for i in range(200_000)}}),
        ("/v1/messages", {"max_tokens": 1, "messages": [1] * 400_000}),
        (CHAT, {"messages": [{"role": "user", "content": [1] * 400_000}]}),
    ],
)
def test_a_list_of_wrong_values_is_refused_at_the_first(
    scripted: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    problems: list[int] = []
    errors = RequestValidationError.errors

    def counted(error: RequestValidationError) -> Sequence[Any]:
        found = errors(error)
        problems.append(len(found))
        return found

    monkeypatch.setattr(RequestValidationError, "errors", counted)
    response = scripted.post(path, json=fields)
    assert response.status_code == 400
    assert len(response.content) < 1000
    assert sum(problems) < 20


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\udc00\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\\\ud83d\\ude00"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        '{"messages": [{"role": "user", "content": "x"}]}'.encode("utf-16"),
        b'{"messages": [{"role": "user", "content": "\x00"}]}',
    ],
)
def test_text_that_is_not_unicode_is_refused(scripted: TestClient, body: bytes) -> None:
    response = scripted.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, code_of(response)) == (400, "invalid_json")


def test_escaped_pairs_of_surrogates_are_characters(scripted: TestClient) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00 \\\\ud800"}]}'
    response = scripted.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.json()["choices"][0]["message"]["content"] == "You said: \U0001f600 \\ud800"


def test_forms_that_any_site_may_send_are_not_read(scripted: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = scripted.post(CHAT, content=json.dumps(HI), headers={"Content-Type": kind})
        assert response.status_code == 400


def test_messages_tools_and_schemas_are_bounded(locked: TestClient, authorized: dict[str, str]) -> None:
    def tool(name: str, text: str = "") -> dict[str, Any]:
        schema = {"type": "object", "description": text}
        return {"type": "function", "function": {"name": name, "parameters": schema}}

    for body in (
        {"messages": HI["messages"] * 6},
        HI | {"tools": [tool(str(i)) for i in range(4)]},
        HI | {"tools": [tool("a", "x" * 600)]},
        HI | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"title": "x" * 600}}}},
    ):
        assert locked.post(CHAT, json=body, headers=authorized).status_code == 400


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics", "/nowhere", CHAT])
def test_head_is_get_without_the_body(scripted: TestClient, path: str) -> None:
    head, get = scripted.head(path), scripted.get(path)
    assert head.status_code == get.status_code
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.content == b"" and get.content


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/static/index.html",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/static/..%2fapp.py",
    ],
)
def test_no_file_but_the_page_is_served(scripted: TestClient, path: str) -> None:
    response = scripted.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


def test_the_page_may_run_only_its_own_script(scripted: TestClient) -> None:
    response = scripted.get("/")
    policy = dict(
        part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert (
        "http://" not in response.text.replace("http://www.w3.org/", "") and "https://" not in response.text
    )


def test_prompts_are_logged_only_when_asked_for(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    secret = {"messages": [{"role": "user", "content": "my secret"}], "temperature": "my secret"}
    with caplog.at_level(logging.DEBUG):
        client_of(tokenizer).post(CHAT, json=HI | {"user": "my secret"})
        client_of(tokenizer).post(CHAT, json=secret)
    assert "secret" not in caplog.text and CHAT in caplog.text
    with caplog.at_level(logging.INFO):
        client_of(tokenizer, log_prompts=True).post(CHAT, json=secret)
    assert "my secret" in caplog.text


def test_nothing_that_a_client_sends_can_write_log_lines_or_steer_a_terminal(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of(tokenizer, log_prompts=True)
    with caplog.at_level(logging.INFO):
        client.get("/nowhere%0d%0a2026 INFO GET / 200%1b[2J%e2%80%ae%c2%9b")
        client.post(CHAT, content=b'{"messages":\n[],"x":"\x1b[2J\x7f\xe2\x80\xa8"}')
    told = [record.getMessage() for record in caplog.records if record.name == "mlx_gptoss.server"]
    assert len(told) == 3
    assert all(line.isprintable() for line in told), told


def test_the_log_names_paths_that_do_not_exist_in_moderation(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of(tokenizer)
    with caplog.at_level(logging.INFO):
        client.get("/v2/chat")
        client.get("/" + "x" * 5000)
    lines = [record.getMessage() for record in caplog.records if record.name == "mlx_gptoss.server"]
    assert lines[0].startswith("GET /v2/chat 404")
    assert all(len(line) < 300 for line in lines)
    assert "v2" not in client.get("/metrics").text


def test_a_failure_in_the_log_keeps_to_its_own_lines() -> None:
    from mlx_gptoss.server.http.logs import LogFormatter

    try:
        raise ValueError("bad\n2026 INFO forged\x1b[2J")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "it failed: %s", ("a\nb",), info)
    first, *rest = LogFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert first == "ERROR it failed: a\\x0ab"
    assert rest and all(line.startswith("  ") and line.isprintable() for line in rest)


def test_large_bodies_wait_for_room_and_small_ones_do_not(tokenizer: Tokenizer) -> None:
    """Three at a time where two have room: all are answered, and while two stall a small one is, too."""
    size = 300_000
    settings = ServerSettings(port=0, max_body_bytes=size, max_bodies_bytes=2 * size, body_timeout=20)
    with live(create_app(ScriptedLLM(tokenizer), settings)) as url:  # type: ignore[arg-type]
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "hi", "max_tokens": 1, "x": "y" * (size - 1000)}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        with contextlib.ExitStack() as stack:
            stalled = [stack.enter_context(socket.create_connection((host, int(port)), 20)) for _ in range(2)]
            for connection in stalled:
                connection.sendall(head + body[:-1])
            small = send((host, int(port)), head.replace(b"%d" % len(body), b"15") + b'{"prompt": "a"}')
            assert b"HTTP/1.1 200" in small
            waiting = stack.enter_context(socket.create_connection((host, int(port)), 20))
            waiting.sendall(head + body)
            waiting.settimeout(0.3)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            waiting.settimeout(20)
            stalled[0].sendall(body[-1:])
            for connection in (stalled[0], waiting):
                assert connection.recv(15) == b"HTTP/1.1 200 OK"


# --- on the wire


@contextlib.contextmanager
def address(tokenizer: Tokenizer, **limits: Any) -> Iterator[tuple[str, int]]:
    """That of a live server."""
    settings = ServerSettings(port=0, max_body_bytes=20_000, **limits)
    with live(create_app(ScriptedLLM(tokenizer), settings)) as url:  # type: ignore[arg-type]
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


@pytest.fixture(scope="module")
def wire(tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    with address(tokenizer) as found:
        yield found


@pytest.fixture(scope="module")
def impatient(tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    with address(tokenizer, header_timeout=0.5, body_timeout=0.5) as found:
        yield found


def send(address: tuple[str, int], data: bytes, rest: bytes = b"", pause: float = 0.0) -> bytes:
    """What a server answers to raw bytes until it closes the connection."""
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(data)
        if pause:
            time.sleep(pause)
            connection.sendall(rest)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_headers_that_never_end_are_cut_off(impatient: tuple[str, int]) -> None:
    assert send(impatient, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ") == b""
    assert send(impatient, b"") == b""


def test_a_body_that_never_ends_is_cut_off(impatient: tuple[str, int]) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    answer = send(impatient, head)
    assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer


@pytest.mark.parametrize("header", [b"Host: evil.example", b"Host: a b", b"Origin: http://evil.example"])
def test_a_refused_request_cannot_hold_its_connection_open(wire: tuple[str, int], header: bytes) -> None:
    host = b"" if header.startswith(b"Host") else b"Host: localhost\r\n"
    data = b"POST /v1/models HTTP/1.1\r\n" + host + header + b"\r\nContent-Length: 100\r\n\r\n{"
    answer = send(wire, data)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 403")) and b"connection: close" in answer.lower()


def test_a_second_request_may_be_as_late_as_keep_alive_allows(impatient: tuple[str, int]) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    answer = send(impatient, request + b"\r\n", request + b"Connection: close\r\n\r\n", pause=0.8)
    assert answer.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad Name: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000,
        b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
        b"GET /health HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_in_the_usual_shape(wire: tuple[str, int], data: bytes) -> None:
    answer = send(wire, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_no_header_can_be_injected(wire: tuple[str, int]) -> None:
    data = b"GET /v1/models/a%0d%0aSet-Cookie:%20x=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    head = send(wire, data).partition(b"\r\n\r\n")[0]
    assert head.startswith(b"HTTP/1.1 404") and b"set-cookie" not in head.lower()


def test_every_response_has_a_name_of_its_own(tokenizer: Tokenizer) -> None:
    client = client_of(tokenizer, api_key="k")
    responses = [
        client.get("/health"),
        client.get("/nowhere"),
        client.post(CHAT, json=HI),
        client.post(CHAT, json=HI, headers={"Authorization": "Bearer k"}),
        client.post(CHAT, json=HI, headers={"Host": "evil.example"}),
    ]
    assert [response.status_code for response in responses] == [200, 401, 401, 200, 403]
    names = {response.headers["request-id"] for response in responses}
    assert len(names) == len(responses)
    assert all(response.headers["x-request-id"] == response.headers["request-id"] for response in responses)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/message", "/v1/messages"),
        ("/api/tag", "/api/tags"),
        ("/v1/embeddings", None),
        ("/" + "x" * 5000, None),
    ],
)
def test_who_misses_a_path_is_told_what_there_is(tokenizer: Tokenizer, path: str, meant: str | None) -> None:
    response = client_of(tokenizer).post(path, json={})
    assert response.status_code == 404
    error = response.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert (f"did you mean {meant}?" in message) if meant else ("did you mean" not in message)
    assert "/v1/responses" in message and "/api/chat" in message and len(message) < 1000


def test_a_wrong_method_is_told_the_right_one(tokenizer: Tokenizer) -> None:
    response = client_of(tokenizer).get(CHAT)
    assert response.status_code == 405 and "takes POST" in response.json()["error"]["message"]
