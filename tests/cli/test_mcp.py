"""`--mcp` on the command line: tools in a chat, asking first, and a server that offers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mlx_gptoss.cli import run
from mlx_gptoss.cli.options import ModelSource
from mlx_gptoss.cli.terminal.approve import approved, told
from mlx_gptoss.harmony import ToolCall
from mlx_gptoss.mcp.tools import mcp_tools
from tests.support.scripted_model import scripted_engine
from tests.support.toy_mcp import make_server
from tests.support.window import Window

TOY = f"{sys.executable} -m tests.support.toy_mcp"
CALL = ToolCall(0, "c", "note", '{"text": "a"}', "functions.note")


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_a_tool_that_may_change_something_asks_each_time_until_always() -> None:
    answers = iter(["no", "yes", "always"])
    asked: list[str] = []

    def ask(server: str, call: ToolCall) -> str:
        asked.append(f"{server} {call.name}")
        return next(answers)

    with mcp_tools(make_server()) as found:
        tools = {tool.name: tool for tool in approved(found, ask)}
        results = [tools["note"].run(CALL).content for _ in range(4)]
        weather = ToolCall(0, "c", "get_weather", '{"city": "Rome"}', "functions.get_weather")
        assert tools["get_weather"].run(weather).content == "sunny in Rome"
    assert results == ["error: the user did not allow this call", *["noted: a"] * 3]
    assert asked == ["toy note"] * 3


def test_nothing_in_a_call_hides_from_who_is_asked() -> None:
    hidden = ToolCall(0, "c", "note", '{"a": "\u202e\x1b[2Jx"}\n', "functions.note")
    assert told(hidden) == 'note {"a": "\\u202e\\u001b[2Jx"}\\u000a'
    assert told(ToolCall(0, "c", "note", "x" * 9000, "")).endswith("x… (9,005 characters in all)")


def calls_note(context: str) -> str:
    if "functions.note to=assistant" in context:
        result = context.rsplit("<|message|>", 1)[1].split("<|end|>")[0]
        return f"<|channel|>final<|message|>It says: {result}<|return|>"
    return '<|channel|>commentary to=functions.note <|constrain|>json<|message|>{"text":"a"}<|call|>'


@pytest.mark.parametrize(("options", "says"), [([], "did not allow"), (["--yes"], "noted: a")])
def test_in_a_pipe_nobody_can_be_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    engine, _ = scripted_engine(calls_note)
    monkeypatch.setattr(ModelSource, "load", lambda self: engine)
    monkeypatch.setattr("mlx_gptoss.cli.chat.read_standard_input", lambda: "hello")
    assert run(["chat", "demo", "--mcp", TOY, *options]) == 0
    out, err = capsys.readouterr()
    assert says in out
    assert ("--yes allows it" in err) == (not options)


def test_in_a_terminal_a_key_answers(tmp_path: Path) -> None:
    window = Window(tmp_path, program=("-m", "tests.support.asking_app"))
    window.until("❯")
    window.type("/tools\r")
    window.until("get_weather, get_population, note")
    window.type("one\r")
    window.until('toy wants to run note {"text": "one"}')
    window.until("run it? [y]es, [n]o, [a]lways")
    window.type("n")
    assert "did not allow" in window.answers(1)
    window.type("two\r")
    window.until(lambda text: text.count("run it?") == 2)
    window.type("y")
    assert "The tool says: noted: two" in window.answers(2)
    window.type("three\r")
    window.until(lambda text: text.count("run it?") == 3)
    window.type("\x03")  # Ctrl-C stops the answer
    window.until(lambda text: "❯" in text.partition("stopped before an answer")[2])
    window.type("four\r")
    window.until(lambda text: "run it?" in text.partition('wants to run note {"text": "four"}')[2])
    window.type("a")
    window.answers(3)
    window.type("five\r")
    asked_then = window.answers(4).partition("The tool says: noted: four")[2]
    assert "The tool says: noted: five" in asked_then and "run it?" not in asked_then
    window.child.close(force=True)


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_a_wrong_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {"x": {"args": []}}}))
    assert run([command, "demo", "--mcp", str(path)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {path}: server 'x': expected either")


def test_a_browser_without_pages_cannot_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "demo", "--tool", "browser"]) == 1
    assert "folder of pages" in capsys.readouterr().err
