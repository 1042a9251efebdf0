"""Tools of MCP servers in a chat; servers that die, hang, say too much, stay or are not there."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import mlx_gptoss
from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.harmony import Message, ToolCall
from mlx_gptoss.mcp.config import read_servers
from mlx_gptoss.mcp.connection import Connections, log_file
from mlx_gptoss.mcp.results import MAX_RESULT
from mlx_gptoss.mcp.tools import McpTool, mcp_tools, server_tools
from tests.support.scripted_model import scripted_engine
from tests.support.server_help import wait_until
from tests.support.toy_mcp import make_many, make_server

TOY = [sys.executable, "-m", "tests.support.toy_mcp"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def entry(*arguments: str, **fields: Any) -> dict[str, Any]:
    """The toy in an mcp.json."""
    return {"command": TOY[0], "args": [*TOY[1:], *arguments], "cwd": str(ROOT), **fields}


def servers(**entries: Any) -> dict[str, Any]:
    return {"mcpServers": entries}


@pytest.fixture(scope="module")
def http() -> Iterator[str]:
    """A toy over HTTP."""
    process = subprocess.Popen([*TOY, "--http"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        yield url
    finally:
        process.terminate()
        process.wait(20)


def named(tools: Sequence[McpTool], name: str) -> McpTool:
    return next(tool for tool in tools if tool.name == name)


def call(tools: Sequence[McpTool], name: str, arguments: str = "{}") -> str:
    """The result of a call as the model gets it."""
    recipient = name if name.split(".")[0] in ("python", "browser") else f"functions.{name}"
    bare = recipient.removeprefix("functions.")
    return named(tools, name.split(".")[0]).run(ToolCall(0, "call_1", bare, arguments, recipient)).content


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def asks_for(name: str, arguments: dict[str, Any]) -> Any:
    """A model that calls a tool, and says what came of it."""

    def script(context: str) -> str:
        if "to=assistant" in context.rsplit("<|start|>user", 1)[1]:
            result = context.rsplit("<|message|>", 1)[1].split("<|end|>")[0]
            return f"<|channel|>final<|message|>It says: {result}<|return|>"
        header = f"<|channel|>commentary to=functions.{name} <|constrain|>json"
        return f"{header}<|message|>{json.dumps(arguments)}<|call|>"

    return script


def test_a_chat_calls_a_tool_of_a_server_in_this_process() -> None:
    llm, model = scripted_engine(asks_for("get_weather", {"city": "Rome"}))
    with llm, mcp_tools(make_server()) as tools:
        reply = llm.chat(tools=[*tools]).send("weather?")
    assert reply.text == "It says: sunny in Rome"
    assert "// The weather in a city.\ntype get_weather = (_: {\n" in model.contexts[0]
    assert named(tools, "get_weather").read_only and not named(tools, "note").read_only


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_tools_over_a_transport_answer(transport: str, http: str) -> None:
    source = servers(toy=entry() if transport == "stdio" else {"url": http})
    with mcp_tools(source) as tools:
        assert call(tools, "get_population", '{"city": "Rome"}') == "2800000"
        assert call(tools, "get_population", '{"city": "Nowhere"}').startswith("error: ")
        assert call(tools, "get_population", "nonsense") == "error: ToolError: the arguments are not JSON"
        assert call(tools, "get_population", "[]") == "error: ToolError: the arguments are not a JSON object"
        assert call(tools, "picture").splitlines() == [
            "a title",
            "[left out: image of type image/png; only text can be read]",
        ]


def test_headers_and_variables_reach_their_server(http: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    both = servers(
        web={"url": http, "headers": {"X-Key": "${SECRET}"}}, local=entry(env={"KEY": "${SECRET}"})
    )
    with mcp_tools(both) as tools:
        assert call(tools, "web__header", '{"name": "x-key"}') == "s3cret"
        assert call(tools, "local__variable", '{"name": "KEY"}') == "s3cret"
        assert call(tools, "local__variable", '{"name": "SECRET"}') == "unset", "the environment stays here"


def test_a_reference_server_tells_the_time() -> None:
    pytest.importorskip("mcp_server_time")
    with mcp_tools(f"{sys.executable} -m mcp_server_time --local-timezone UTC") as tools:
        assert {tool.name for tool in tools} == {"get_current_time", "convert_time"}
        found = json.loads(call(tools, "get_current_time", '{"timezone": "Europe/Rome"}'))
    assert found["timezone"] == "Europe/Rome"
    assert re.match(r"20\d\d-\d\d-\d\dT", found["datetime"])


def test_names_that_clash_get_their_servers_name_before_them() -> None:
    second = make_server("second")
    with mcp_tools(make_server(), second) as tools:
        names = [tool.name for tool in tools]
        assert len(set(names)) == len(names) == 2 * 10
        assert {"toy__note", "second__note"} <= set(names)
        assert call(tools, "second__note", '{"text": "a"}') == "noted: a"


def test_names_that_functions_cannot_have_are_made_such() -> None:
    server = make_many(0)
    for name in ("a b", "a.b", "a/b", "x" * 100):
        server.add_tool(lambda: "done", name=name, description="")
    with mcp_tools(server) as tools:
        assert [tool.name for tool in tools] == ["many__a_b", "many__a_b_2", "many__a_b_3", "x" * 64]
        assert call(tools, "many__a_b_2") == "done"


def test_allow_lists_choose_among_the_tools(caplog: pytest.LogCaptureFixture) -> None:
    with mcp_tools(servers(toy=entry(allowed_tools=["note", "none_such"]))) as tools:
        assert [tool.name for tool in tools] == ["note"]
    assert "has no tool 'none_such' to allow" in caplog.text
    with mcp_tools(servers(toy=entry(excludeTools=["note"]))) as tools:
        assert "note" not in [tool.name for tool in tools] and len(tools) == 9


def test_a_server_called_browser_speaks_for_the_models_own() -> None:
    from mcp.server import MCPServer

    server = MCPServer("browser", instructions="Look things up.")

    @server.tool()
    def search(query: str) -> str:
        """Search."""
        return f"found {query}"

    code = MCPServer("python", instructions="Runs Python.")

    @code.tool()
    def python(code: str) -> str:
        return f"ran {code}"

    def script(context: str) -> str:
        if "browser.search to=assistant" not in context:
            return '<|channel|>analysis to=browser.search code<|message|>{"query":"bees"}<|call|>'
        if "python to=assistant" not in context:
            return "<|channel|>analysis to=python code<|message|>print(1)<|call|>"
        return "<|channel|>final<|message|>Done.<|return|>"

    llm, model = scripted_engine(script)
    with llm, mcp_tools(server, code) as tools:
        chat = llm.chat(tools=[*tools])
        chat.send("?")
    results = [(m.name, m.content, m.channel) for m in chat.history if m.role == "tool"]
    assert results == [
        ("browser.search", "found bees", "analysis"),
        ("python", "ran print(1)", "analysis"),
    ]
    assert "## browser\n\n// Look things up.\nnamespace browser {\n" in model.contexts[0]
    assert "## python\n\nRuns Python." in model.contexts[0]


def test_sixty_tools_can_be_offered_and_called() -> None:
    llm, _ = scripted_engine(asks_for("tool_59", {}))
    with llm, mcp_tools(make_many(60)) as tools:
        assert len(tools) == 60
        assert llm.chat(tools=[*tools]).send("?").text == "It says: done"


def test_a_schema_that_cannot_be_enforced_stops_no_chat() -> None:
    server = make_server()
    odd = {"type": "object", "properties": {"city": {"type": "string", "format": "city-name"}}}
    llm, _ = scripted_engine(asks_for("get_weather", {"city": "Rome"}))
    with mcp_tools(server) as tools:
        tool = named(tools, "get_weather")
        bent = mlx_gptoss.Tool("get_weather", "", odd, strict=False)
        with llm:
            chat = llm.chat(tools=[McpTool(bent, tool.handle, tool.server, tool.listed)])
            assert chat.send("?").text == "It says: sunny in Rome"
            with pytest.raises(RequestError, match="city-name"):
                llm.chat(tools=[mlx_gptoss.Tool("get_weather", "", odd)]).send("?")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (servers(gone={"command": "no-such-program"}), "there is no program 'no-such-program' to run"),
        (servers(gone={"url": "http://127.0.0.1:9/mcp"}), "All connection attempts failed"),
        (servers(gone={"command": sys.executable, "args": ["-c", "print(1/0)"]}), "ZeroDivisionError"),
    ],
)
def test_a_server_that_is_not_there_is_left_out_with_one_line(
    source: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with mcp_tools(source, make_server()) as tools:
        assert len(tools) == 10
        assert list(tools.failed) == ["gone"]
        assert says in tools.failed["gone"] and "\n" not in tools.failed["gone"]
    assert [r.levelno for r in caplog.records if says in r.getMessage()] == [logging.WARNING]


def test_a_server_that_never_speaks_is_given_up_and_ended() -> None:
    silent = servers(silent={"command": sys.executable, "args": ["-c", "import time; time.sleep(600)"]})
    with mcp_tools(silent, timeout=0.5) as tools:
        assert tools.failed == {
            "silent": "the MCP server 'silent' is not there: it did not answer within 0.5 seconds"
        }


def test_the_chat_goes_on_when_a_server_dies_in_the_middle_of_a_call() -> None:
    with mcp_tools(servers(toy=entry())) as tools:
        llm, _ = scripted_engine(asks_for("die", {}))
        with llm:
            chat = llm.chat(tools=[*tools])
            first = chat.send("?").text
            assert first == "It says: error: ToolError: the MCP server 'toy': Connection closed"
            assert chat.send("again").text == first, "it was started again"
        pid = int(call(tools, "pid"))
        assert alive(pid), "and once more"
    assert not alive(pid)


def test_a_killed_server_ends_its_call_and_is_started_again() -> None:
    with mcp_tools(servers(toy=entry())) as tools:
        before = int(call(tools, "pid"))
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: not alive(before))
        assert call(tools, "pid") == "error: ToolError: the MCP server 'toy': Connection closed"
        assert int(call(tools, "pid")) != before


def test_a_call_that_hangs_ends_at_its_deadline_and_the_chat_goes_on() -> None:
    llm, _ = scripted_engine(asks_for("hang", {}))
    connections = Connections(read_servers([make_server()]), timeout=60)
    with llm, closing(connections):
        tools = server_tools(connections, "toy")
        connections.timeout = 0.5  # for what never answers alone
        reply = llm.chat(tools=tools).send("?")
        assert reply.text == "It says: error: ToolError: hang did not answer within 0.5 seconds"
        connections.timeout = 60
        assert call(tools, "note", '{"text": "a"}') == "noted: a"


def test_a_result_of_ten_megabytes_is_cut_to_its_ends() -> None:
    with mcp_tools(servers(toy=entry())) as tools:
        text = call(tools, "large", '{"characters": 10000000}')
    assert len(text) < MAX_RESULT + 100
    assert "[… 9,980,000 characters left out …]" in text


def test_nothing_is_left_of_a_server_that_will_not_end() -> None:
    with mcp_tools(servers(toy=entry("--stubborn"))) as tools:
        pid = int(call(tools, "pid"))
        assert alive(pid)
    wait_until(lambda: not alive(pid))


def test_tools_that_are_forgotten_close_their_connections() -> None:
    tools = [*mcp_tools(servers(toy=entry(allowed_tools=["pid"])))]
    pid = int(tools[0].run(ToolCall(0, "c", "pid", "{}", "functions.pid")).content)
    gc.collect()
    assert alive(pid), "one of them is in use"
    del tools
    gc.collect()
    wait_until(lambda: not alive(pid))


HOST = """
import sys
from mlx_gptoss.harmony import ToolCall
from mlx_gptoss import mcp_tools
command, how = sys.argv[1:]
tools = [*mcp_tools(command)]
pid = next(tool for tool in tools if tool.name == "pid")
print(pid.run(ToolCall(0, "c", "pid", "{}", "functions.pid")).content, flush=True)
if how == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["end", "wait"])
def test_no_server_outlives_its_host(how: str) -> None:
    command = " ".join([*TOY, "--stubborn"])
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, command, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert host.stdout is not None
    pid = int(host.stdout.readline())
    if how == "wait":
        assert alive(pid)
        host.kill()
    host.wait(30)
    wait_until(lambda: not alive(pid))


def test_what_a_server_prints_goes_to_its_log(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('loud', file=sys.stderr); sys.exit(1)"
    with mcp_tools(servers(loud={"command": sys.executable, "args": ["-c", code]})) as tools:
        assert "(loud)" in tools.failed["loud"]
    assert "loud\n" in log_file("loud").read_text()
    assert log_file("loud").stat().st_mode & 0o077 == 0
    assert "loud\n" not in capfd.readouterr().err


def test_closed_tools_say_so() -> None:
    tools = mcp_tools(make_server())
    tools.close()
    tools.close()
    assert call(tools, "note", '{"text": "a"}') == "error: ToolError: the MCP servers were closed"


@pytest.mark.parametrize(
    ("sources", "options"), [((), {}), (("x",), {"timeout": 0}), (("x",), {"timeout": "1"})]
)
def test_wrong_arguments_are_refused(sources: Any, options: Any) -> None:
    with pytest.raises(RequestError):
        mcp_tools(*sources, **options)


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gptoss.mcp.connection.find_spec", lambda name: None)
    with pytest.raises(ToolError, match=r"pip install 'gptoss-mlx\[mcp\]'"):
        mcp_tools("x")


def test_results_are_messages_like_those_of_other_tools() -> None:
    with mcp_tools(make_server()) as tools:
        asked = ToolCall(0, "call_9", "note", '{"text": "a"}', "functions.note")
        result = named(tools, "note").run(asked)
    assert result == Message.tool_result("noted: a", name="functions.note", call_id="call_9")
