"""Tools that the server runs for requests that name them: through both OpenAI APIs, on a scripted LLM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types.responses import Response

from mlx_gptoss.harmony import Conversation
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.server.tools.loop import MAX_CALLS
from mlx_gptoss.tokenizer import Tokenizer
from tests.server.test_responses import replay
from tests.support.scripted_llm import Script, ScriptedLLM, Write
from tests.support.served_tools import Maker, served_tools
from tests.support.server_help import live, read_events, wait_until

pytest_plugins = ["tests.support.server_fixtures"]

WEATHER = ("get_weather", '{"city": "Rome"}')
NOTE = ("note", '{"text": "a"}')
TOY = {"type": "mcp", "server_label": "toy"}
UNASKED = TOY | {"require_approval": "never"}
ROOT = Path(__file__).resolve().parents[2]


def calls(*made: tuple[str, str]) -> Write:
    """A model that makes these calls one after the other, and then says what the last gave."""

    def write(conversation: Conversation, options: dict[str, Any]) -> Script:
        at = max(i for i, m in enumerate(conversation.messages) if m.role == "user")
        results = [m.content for m in conversation.messages[at:] if m.role == "tool"]
        if len(results) < len(made) and options["tool_choice"] != "none":
            return Script(reasoning="A tool will know.", calls=[made[len(results)]])
        return Script(reasoning="Now I know.", text=f"It says: {results[-1] if results else 'nothing'}")

    return write


class Served:
    """A server with tools."""

    def __init__(self, tokenizer: Tokenizer, *sources: Any, **options: Any) -> None:
        self.llm = ScriptedLLM(tokenizer)
        self.maker = Maker()
        self._tools = served_tools(self.maker, *sources, **options)
        app = create_app(self.llm, None, self._tools.__enter__())  # type: ignore[arg-type]
        self.client = TestClient(app, base_url="http://localhost")

    def close(self) -> None:
        self._tools.__exit__(None, None, None)

    def respond(self, given: Any = "?", *, status: int = 200, **fields: Any) -> Any:
        reply = self.client.post("/v1/responses", json={"input": given, **fields})
        assert reply.status_code == status, reply.text
        if status != 200:
            return reply.json()["error"]
        body = replay(reply.text) if fields.get("stream") else reply.json()
        Response.model_validate(body, strict=True)
        return body

    def chat(self, messages: Any = "?", *, status: int = 200, **fields: Any) -> Any:
        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        reply = self.client.post("/v1/chat/completions", json={"messages": said, **fields})
        assert reply.status_code == status, reply.text
        return reply.json()["error"] if status != 200 else reply.json()["choices"][0]


@pytest.fixture(scope="module")
def _served(tokenizer: Tokenizer) -> Iterator[Served]:
    served = Served(tokenizer, {"mcpServers": {"gone": {"command": "no-such-program"}}})
    yield served
    served.close()


@pytest.fixture
def served(_served: Served) -> Served:
    _served.llm.seen.clear()
    return _served


def types(body: Any) -> list[str]:
    return [item["type"] for item in body["output"]]


def test_what_can_be_asked_for_is_listed(served: Served) -> None:
    python, toy, gone = served.client.get("/v1/tools").json()["data"]
    assert python == {"type": "code_interpreter", "name": "python"}
    assert toy["server_label"] == "toy" and toy["error"] is None
    assert {"name": "get_weather", "description": "The weather in a city.", "read_only": True} in toy["tools"]
    assert gone["tools"] == [] and "no-such-program" in gone["error"]


def test_nothing_is_offered_to_requests_that_do_not_ask(served: Served) -> None:
    served.llm.write = calls()
    served.respond()
    served.chat()
    for conversation, _ in served.llm.seen:
        assert not conversation.tools and not conversation.builtin


@pytest.mark.parametrize("stream", [False, True])
def test_a_read_only_tool_runs_at_once_when_the_client_waives_approval(served: Served, stream: bool) -> None:
    served.llm.write = calls(WEATHER)
    body = served.respond(tools=[UNASKED], stream=stream)
    assert types(body) == ["mcp_list_tools", "reasoning", "mcp_call", "reasoning", "message"]
    listed, _, call, _, message = body["output"]
    assert listed["server_label"] == "toy" and len(listed["tools"]) == 10
    assert call | {"id": ""} == {
        "id": "",
        "type": "mcp_call",
        "status": "completed",
        "server_label": "toy",
        "name": "get_weather",
        "arguments": '{"city": "Rome"}',
        "approval_request_id": None,
        "output": "sunny in Rome",
        "error": None,
    }
    assert message["content"][0]["text"] == "It says: sunny in Rome"
    assert body["usage"]["output_tokens"] > 20, "of both steps"


@pytest.mark.parametrize("approval", [None, "always", {"never": {"tool_names": ["note"]}}])
def test_approval_is_asked_for_by_default(served: Served, approval: Any) -> None:
    served.llm.write = calls(WEATHER)
    body = served.respond(tools=[TOY | {"require_approval": approval}])
    assert types(body) == ["mcp_list_tools", "reasoning", "mcp_approval_request"]
    assert body["status"] == "completed"
    assert body["output"][-1]["arguments"] == '{"city": "Rome"}'


def test_a_client_cannot_waive_approval_of_what_may_change_something(
    served: Served, tokenizer: Tokenizer
) -> None:
    served.llm.write = calls(NOTE)
    assert types(served.respond(tools=[UNASKED]))[-1] == "mcp_approval_request"
    assert served.chat(tools=[UNASKED])["finish_reason"] == "tool_calls"
    trusting = Served(tokenizer, trusting=True)
    trusting.llm.write = calls(NOTE)
    body = trusting.respond(tools=[UNASKED])
    trusting.close()
    assert body["output"][2]["output"] == "noted: a", "the person who runs the server can"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kept_by", ["server", "client"])
@pytest.mark.parametrize("approve", [True, False])
def test_an_approval_is_followed(served: Served, approve: bool, kept_by: str, stream: bool) -> None:
    served.llm.write = calls(NOTE)
    first = served.respond(tools=[TOY])
    asked = first["output"][-1]
    says = {"type": "mcp_approval_response", "approval_request_id": asked["id"], "approve": approve}
    if kept_by == "server":
        body = served.respond([says], previous_response_id=first["id"], tools=[TOY], stream=stream)
    else:
        history = [{"role": "user", "content": "?"}, *first["output"], says]
        body = served.respond(history, tools=[TOY], stream=stream)
    if approve:
        assert types(body) == ["mcp_call", "reasoning", "message"]
        call = body["output"][0]
        assert call["output"] == "noted: a" and call["approval_request_id"] == asked["id"]
        assert body["output"][-1]["content"][0]["text"] == "It says: noted: a"
    else:
        assert types(body) == ["reasoning", "message"]
        assert "error: the user did not allow this call" in body["output"][-1]["content"][0]["text"]
    roles = [m.role for m in served.llm.seen[-1][0].messages]
    assert roles[-2:] == ["assistant", "tool"], "the call and its result, once"
    served.llm.write = calls()
    items = [
        {"role": "user", "content": "?"},
        *first["output"],
        says,
        *body["output"],
        {"role": "user", "content": "more"},
    ]
    assert served.respond(items, tools=[TOY])["status"] == "completed", "what came back can be sent again"


@pytest.mark.parametrize(
    ("items", "tools", "param"),
    [
        ([{"type": "mcp_approval_response", "approval_request_id": "mcpr_x", "approve": True}], [TOY], 0),
        ([{"type": "mcp_approval_response", "approval_request_id": "ASKED"}], [TOY], "approve"),
        ([{"type": "mcp_approval_response", "approval_request_id": "ASKED", "approve": True}], [], "tools"),
        (
            [
                {"type": "mcp_approval_response", "approval_request_id": "ASKED", "approve": True},
                {"role": "user", "content": "and then"},
            ],
            [TOY],
            "input",
        ),
    ],
)
def test_wrong_approvals_are_refused(served: Served, items: Any, tools: Any, param: Any) -> None:
    served.llm.write = calls(NOTE)
    first = served.respond(tools=[TOY])
    given = json.loads(json.dumps(items).replace("ASKED", first["output"][-1]["id"]))
    ran = len(served.llm.seen)
    error = served.respond(given, previous_response_id=first["id"], tools=tools, status=400)
    wanted = "input[0].approval_request_id" if param == 0 else param
    assert error["param"].endswith(wanted) and len(served.llm.seen) == ran


def test_a_call_that_is_not_approved_is_never_run_later(served: Served) -> None:
    served.llm.write = calls(NOTE)
    first = served.respond(tools=[TOY])
    served.llm.write = calls()
    body = served.respond("forget it", previous_response_id=first["id"], tools=[TOY])
    assert types(body) == ["reasoning", "message"]


@pytest.mark.parametrize(
    ("tool", "param", "says"),
    [
        ({"server_label": "none"}, "server_label", "this server's MCP servers are toy, gone"),
        ({"server_label": "toy", "server_url": "http://x.test/mcp"}, "server_url", "--mcp-remote x.test"),
        ({"server_label": "a", "server_url": "http://x.test:81/mcp"}, "server_url", "--mcp-remote x.test:81"),
        ({"server_label": "a", "server_url": "file:///etc/passwd"}, "server_url", "expected http"),
        ({"server_label": "a", "connector_id": "connector_gmail"}, "connector_id", "no connectors"),
        ({"server_label": "toy", "require_approval": "maybe"}, "require_approval", "'always' or 'never'"),
        ({"server_label": "toy", "allowed_tools": 3}, "allowed_tools", "valid"),
        ({}, "server_label", "required"),
    ],
)
@pytest.mark.parametrize("api", ["respond", "chat"])
def test_what_is_not_offered_is_refused_by_name(
    served: Served, api: str, tool: Any, param: str, says: str
) -> None:
    error = getattr(served, api)(tools=[{"type": "mcp", **tool}], status=400)
    assert error["param"] == f"tools[0].{param}" and says in error["message"]
    assert "\n" not in error["message"]


def test_without_mcp_servers_the_cure_is_said(scripted: TestClient) -> None:
    body = {"input": "?", "tools": [TOY]}
    error = scripted.post("/v1/responses", json=body).json()["error"]
    assert error["param"] == "tools[0].server_label" and "--mcp FILE" in error["message"]
    chat = {"messages": [{"role": "user", "content": "?"}], "tools": [{"type": "code_interpreter"}]}
    error = scripted.post("/v1/chat/completions", json=chat).json()["error"]
    assert error["param"] == "tools[0].type" and "--tool python" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_not_there_is_told_and_the_answer_goes_on(served: Served, stream: bool) -> None:
    served.llm.write = calls()
    body = served.respond(tools=[{"type": "mcp", "server_label": "gone"}], stream=stream)
    assert types(body) == ["mcp_list_tools", "reasoning", "message"]
    assert "no-such-program" in body["output"][0]["error"]


def test_a_tool_that_fails_is_told_and_the_answer_goes_on(served: Served) -> None:
    served.llm.write = calls(("get_population", '{"city": "Nowhere"}'))
    call = served.respond(tools=[UNASKED])["output"][2]
    assert call["status"] == "failed" and call["error"]["type"] == "mcp_tool_execution_error"


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (["note"], {"note"}),
        ({"tool_names": ["note", "pid"]}, {"note", "pid"}),
        ({"read_only": True}, {"get_weather", "get_population"}),
    ],
)
def test_allowed_tools_choose(served: Served, allowed: Any, names: set[str]) -> None:
    served.llm.write = calls()
    body = served.respond(tools=[TOY | {"allowed_tools": allowed}])
    assert {tool["name"] for tool in body["output"][0]["tools"]} == names
    assert {tool.name for tool in served.llm.seen[0][0].tools} == names


@pytest.mark.parametrize("stream", [False, True])
def test_python_runs_as_the_code_interpreter(served: Served, stream: bool) -> None:
    served.llm.write = calls(("python", "print(1)"), ("python", "print(2)"))
    made = len(served.maker.made)
    body = served.respond(tools=[{"type": "code_interpreter", "container": {"type": "auto"}}], stream=stream)
    runs = [item for item in body["output"] if item["type"] == "code_interpreter_call"]
    assert [item["code"] for item in runs] == ["print(1)", "print(2)"]
    assert runs[1]["outputs"] == [{"type": "logs", "logs": "cell 2: print(2)"}], "one notebook an answer"
    assert [n.name for n in served.llm.seen[0][0].builtin] == ["python"]
    (notebook,) = served.maker.made[made:]
    wait_until(notebook.closed.is_set)


def test_the_browser_runs_as_web_search(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from mlx_gptoss.server.tools.toolbox import Toolbox
    from mlx_gptoss.tools import builtin_tools

    (tmp_path / "bees.md").write_text("# Bees\n\nBees make honey.")
    llm = ScriptedLLM(
        tokenizer, calls(("browser.search", '{"query": "bees"}'), ("browser.open", '{"id": 0}'))
    )
    toolbox = Toolbox({"browser": lambda: builtin_tools(["browser"], folder=tmp_path)[0]})
    client = TestClient(create_app(llm, None, toolbox), base_url="http://localhost")  # type: ignore[arg-type]
    reply = client.post(
        "/v1/responses", json={"input": "?", "stream": True, "tools": [{"type": "web_search_preview"}]}
    )
    body = replay(reply.text)
    Response.model_validate(body, strict=True)
    searches = [item["action"] for item in body["output"] if item["type"] == "web_search_call"]
    assert searches[0] == {"type": "search", "query": "bees", "queries": ["bees"]}
    assert searches[1]["type"] == "open_page"
    assert "Bees make honey." in body["output"][-1]["content"][0]["text"]


def test_chat_completions_tell_what_was_run(served: Served) -> None:
    served.llm.write = calls(WEATHER, ("python", "1"))
    choice = served.chat(tools=[UNASKED, {"type": "code_interpreter"}])
    assert choice["finish_reason"] == "stop"
    message = choice["message"]
    assert message["content"] == "It says: cell 1: 1" and "tool_calls" not in message
    first, second = message["executed_tools"]
    assert first | {"id": ""} == {
        "index": 0,
        "id": "",
        "type": "mcp",
        "server_label": "toy",
        "name": "get_weather",
        "arguments": '{"city": "Rome"}',
        "output": "sunny in Rome",
    }
    assert second["type"] == "code_interpreter" and second["output"] == "cell 1: 1"


def test_a_stream_of_chat_completions_adds_up_to_the_same(served: Served) -> None:
    served.llm.write = calls(WEATHER)
    asked = {"messages": [{"role": "user", "content": "?"}], "tools": [UNASKED], "stream": True}
    text = served.client.post("/v1/chat/completions", json=asked).text
    deltas = [data["choices"][0]["delta"] for _, data in read_events(text) if data != "[DONE]"]
    told = [entry for delta in deltas for entry in delta.get("executed_tools", ())]
    assert told[0]["name"] == "get_weather" and told[0]["output"] is None
    assert told[1] == {"index": 0, "id": told[0]["id"], "output": "sunny in Rome"}
    assert "".join(delta.get("content", "") for delta in deltas) == "It says: sunny in Rome"


def test_in_chat_completions_a_call_is_approved_by_sending_it_back(served: Served) -> None:
    served.llm.write = calls(NOTE)
    choice = served.chat(tools=[TOY])
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["server_label"] == "toy" and call["function"]["name"] == "note"
    user = {"role": "user", "content": "?"}
    again = served.chat([user, choice["message"]], tools=[TOY])
    assert again["message"]["content"] == "It says: noted: a"
    assert again["message"]["executed_tools"][0]["id"] == call["id"]
    refused = {"role": "tool", "tool_call_id": call["id"], "content": "error: no"}
    answer = served.chat([user, choice["message"], refused], tools=[TOY])["message"]
    assert answer["content"] == "It says: error: no" and "executed_tools" not in answer


def test_steps_that_come_back_have_their_sampled_tokens(served: Served) -> None:
    served.llm.write = calls(WEATHER)
    message = served.chat(tools=[UNASKED])["message"]
    (ran,) = message["executed_tools"]
    function = {"name": ran["name"], "arguments": ran["arguments"]}
    served.llm.write = calls()
    served.chat(
        [
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "tool_calls": [{"id": ran["id"], "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": ran["id"], "content": ran["output"]},
            {"role": "assistant", "content": message["content"]},
            {"role": "user", "content": "thanks"},
        ],
        tools=[UNASKED],
    )
    history = served.llm.seen[-1][0].messages
    assert [m.token_ids is not None for m in history if m.role == "assistant"] == [True] * 4


def test_client_functions_and_server_tools_go_together(served: Served) -> None:
    mine = {"type": "function", "function": {"name": "mine", "parameters": {"type": "object"}}}
    served.llm.write = calls(WEATHER, ("mine", "{}"))
    choice = served.chat(tools=[UNASKED, mine])
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["mine"]
    assert [ran["name"] for ran in choice["message"]["executed_tools"]] == ["get_weather"]
    clash = {"type": "function", "function": {"name": "get_weather"}}
    assert "twice" in served.chat(tools=[UNASKED, clash], status=400)["message"]
    python = {"type": "function", "function": {"name": "python"}}
    assert "python" in served.chat(tools=[{"type": "code_interpreter"}, python], status=400)["message"]


@pytest.mark.parametrize(("limit", "ran"), [(None, MAX_CALLS), (2, 2)])
def test_a_model_that_only_calls_tools_has_to_answer_in_the_end(
    served: Served, limit: int | None, ran: int
) -> None:
    served.llm.write = calls(*[WEATHER] * 100)
    body = served.respond(tools=[UNASKED], max_tool_calls=limit)
    assert types(body).count("mcp_call") == ran and types(body)[-1] == "message"


def test_a_call_that_had_to_be_made_is_made_once(served: Served) -> None:
    served.llm.write = calls(WEATHER)
    served.respond(tools=[UNASKED], tool_choice="required")
    assert [options["tool_choice"] for _, options in served.llm.seen] == ["required", "auto"]


def test_more_than_one_choice_is_refused(served: Served) -> None:
    assert served.chat(tools=[UNASKED], n=2, status=400)["param"] == "n"


def test_the_same_tool_twice_is_refused(served: Served) -> None:
    assert "twice" in served.respond(tools=[TOY, TOY], status=400)["message"]


def test_what_only_the_mcp_server_is_to_know_is_told_nobody(served: Served) -> None:
    served.llm.write = calls()
    body = served.respond(tools=[TOY | {"headers": {"X": "s3cret"}, "authorization": "s3cret"}])
    assert "s3cret" not in json.dumps(body)
    assert "s3cret" not in served.client.get(f"/v1/responses/{body['id']}").text


@pytest.fixture(scope="module")
def http() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.support.toy_mcp", "--http"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(20)


def test_a_url_is_asked_only_at_an_allowed_host_and_with_the_clients_headers(
    tokenizer: Tokenizer, http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    host = http.removeprefix("http://").split("/")[0]
    served = Served(tokenizer, remote_hosts=[host], trusting=True)
    remote = {"type": "mcp", "server_label": "far", "server_url": http, "require_approval": "never"}

    def header(name: str, **fields: Any) -> str:
        served.llm.write = calls(("header", json.dumps({"name": name})))
        return str(served.respond(tools=[remote | fields])["output"][2]["output"])

    assert header("authorization", authorization="tok") == "Bearer tok"
    assert header("x-a", headers={"X-A": "${SECRET}"}) == "${SECRET}", "requests read no variables"
    for url in (http.replace("127.0.0.1", "localhost"), "http://127.0.0.1/mcp", http.replace("//", "//a@")):
        error = served.respond(tools=[remote | {"server_url": url}], status=400)
        assert error["param"] == "tools[0].server_url"
    served.close()


def test_a_client_that_goes_away_ends_the_tool_it_waits_for(tokenizer: Tokenizer) -> None:
    import httpx

    llm, maker = ScriptedLLM(tokenizer, calls(("python", "wait"))), Maker()
    with (
        served_tools(maker) as toolbox,
        live(create_app(llm, ServerSettings(port=0), toolbox)) as url,  # type: ignore[arg-type]
    ):
        body = {"input": "?", "tools": [{"type": "code_interpreter"}], "stream": True}
        with httpx.stream("POST", url + "/v1/responses", json=body, timeout=30) as stream:
            for line in stream.iter_lines():
                if "interpreting" in line:
                    break
        notebook = maker.made[-1]
        wait_until(notebook.closed.is_set)
