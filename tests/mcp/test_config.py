"""Where MCP servers come from: mcp.json in both forms, URLs, commands; what is wrong is told in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_gptoss.errors import ToolError
from mlx_gptoss.mcp.config import MAX_FILE, Server, read_servers


@pytest.mark.parametrize("key", ["mcpServers", "servers"])
def test_both_forms_of_the_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    monkeypatch.delenv("UNSET", raising=False)
    entries = {
        "time": {
            "type": "stdio",
            "command": "uvx",
            "args": ["mcp-server-time", "${HOME:-x}"],
            "env": {"A": "${TOKEN}"},
        },
        "web": {"url": "https://x.test/mcp", "headers": {"Authorization": "Bearer ${env:TOKEN}"}},
        "old": {"url": "http://x.test/sse"},
        "off": {"command": "x", "disabled": True, "args": ["${UNSET}"]},
        "some": {"command": "x", "allowed_tools": ["a"], "args": ["${UNSET:-b}"], "autoApprove": ["a"]},
        "few": {"command": "x", "includeTools": ["a"], "excludeTools": ["b"]},
    }
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({key: entries, "inputs": []}))
    assert read_servers([path]) == read_servers([str(path)]) == read_servers([{key: entries}])
    time, web, old, some, few = read_servers([path])
    assert time == Server("time", ("uvx", "mcp-server-time", os.environ["HOME"]), {"A": "secret"})
    assert web.headers == {"Authorization": "Bearer secret"} and not web.sse
    assert old.sse
    assert some.allowed == frozenset("a") and some.command == ("x", "b")
    assert few.allowed == frozenset("a") and few.denied == {"b"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "mcpServers"),
        ("{}", "mcpServers"),
        ('{"mcpServers": []}', "mcpServers"),
        ('{"mcpServers": {"x": {}}}', "server 'x': expected either"),
        ('{"mcpServers": {"x": 3}}', "server 'x': entry"),
        ('{"mcpServers": {"x": {"command": "a", "url": "http://b"}}}', "expected either"),
        ('{"mcpServers": {"x": {"command": 3}}}', "server 'x': command: it should be a valid string"),
        ('{"mcpServers": {"x": {"command": " "}}}', "command is empty"),
        ('{"mcpServers": {"x": {"command": "a", "args": "b"}}}', "args: it should be a valid list"),
        (
            '{"mcpServers": {"x": {"command": "a", "args": ["${NO_SUCH_VARIABLE}"]}}}',
            "NO_SUCH_VARIABLE: set it",
        ),
        ('{"mcpServers": {"x": {"url": "file:///etc/passwd"}}}', "expected http:// or https://"),
        ('{"mcpServers": {"x": {"url": "http://"}}}', "and a host"),
        ('{"mcpServers": {"x": {"url": "http://a:99999"}}}', "out of range"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_in_one_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(content)
    with pytest.raises(ToolError) as caught:
        read_servers([path])
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_file_to_read_is_refused(tmp_path: Path) -> None:
    large, pipe = tmp_path / "large.json", tmp_path / "pipe.json"
    large.write_text(" " * (MAX_FILE + 1))
    os.mkfifo(pipe)
    for path, says in ((large, "larger than"), (pipe, "regular"), (tmp_path / "none.json", "No such file")):
        with pytest.raises(ToolError, match=says):
            read_servers([path])


@pytest.mark.parametrize(
    ("source", "name", "command"),
    [
        ("uvx mcp-server-time --local-timezone UTC", "mcp-server-time", ("uvx", "mcp-server-time")),
        ("npx -y @scope/server-x", "server-x", ("npx", "-y", "@scope/server-x")),
        ("python 'my server.py'", "my_server", ("python", "my server.py")),
        ("/usr/bin/thing", "thing", ("/usr/bin/thing",)),
        ("python", "python_server", ("python",)),
    ],
)
def test_a_command_line_is_a_server_with_a_name(source: str, name: str, command: tuple[str, ...]) -> None:
    (server,) = read_servers([source])
    assert server.name == name and server.command[: len(command)] == command


def test_a_url_is_a_server_and_names_are_made_different() -> None:
    servers = read_servers(["http://localhost:1/mcp", "http://localhost:2/sse", "https://browser/"])
    assert [s.name for s in servers] == ["localhost", "localhost_2", "browser_server"]
    assert [s.sse for s in servers] == [False, True, False]


@pytest.mark.parametrize("source", ["", "'a", "http://"])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(ToolError):
        read_servers([source])
