"""Running a call: which tool it goes to, and a result that never raises."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_gptoss.errors import ToolError
from mlx_gptoss.harmony import BROWSER, Message, Tool, ToolCall, ToolNamespace
from mlx_gptoss.tools import BUILTIN, BuiltinTool
from mlx_gptoss.tools.browser import BrowserTool
from mlx_gptoss.tools.call import RunnableTool, as_tool, tool_for
from mlx_gptoss.tools.pages import FolderPages


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


def call(recipient: str, arguments: str = "{}") -> ToolCall:
    return ToolCall(0, "c1", recipient.removeprefix("functions."), arguments, recipient)


def run(function: Any, arguments: str = "{}") -> Message:
    tool = as_tool(function)
    assert isinstance(tool, RunnableTool)
    return tool.run(call(f"functions.{tool.name}", arguments))


def returning(value: Any) -> RunnableTool:
    return RunnableTool(Tool("f"), lambda call: value)


def raising(error: Exception) -> RunnableTool:
    def handle(call: ToolCall) -> str:
        raise error

    return RunnableTool(Tool("f"), handle)


def test_a_functions_result_answers_the_call_by_its_name_and_id() -> None:
    expected = Message.tool_result("3", name="functions.add", call_id="c1", channel="commentary")
    assert run(add, '{"a": 2}') == expected


def test_a_built_in_tools_result_stands_in_the_reasoning(tmp_path: Path) -> None:
    tool = as_tool(BrowserTool(FolderPages(tmp_path)))
    assert isinstance(tool, RunnableTool)
    result = tool.run(call("browser.search", '{"query": "x"}'))
    assert (result.name, result.channel, result.call_id) == ("browser.search", "analysis", "c1")
    assert "No results for `x`" in result.content


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("plain", "plain"),
        ({"é": [1, None]}, '{"é": [1, null]}'),
        (None, "null"),
        (Path("a"), '"a"'),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        (["\udc00"], '["\ufffd"]'),
        ("two halves: \ud83d\ude00", "two halves: 😀"),
    ],
)
def test_a_result_is_text_or_json_that_can_be_encoded(value: Any, content: str) -> None:
    result = returning(value).run(call("functions.f")).content
    assert result == content and result.encode()


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Unwritable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("tool", "content"),
    [
        (raising(KeyError("x")), "error: KeyError: 'x'"),
        (raising(Mute()), "error: Mute"),
        (raising(ValueError("\ud800")), "error: ValueError: \ufffd"),
        (returning(Unwritable()), "error: RuntimeError: no text"),
        (returning({(1, 2): 3}), "error: TypeError: keys must be str, int, float, bool or None, not tuple"),
    ],
)
def test_whatever_goes_wrong_is_text_for_the_model(tool: RunnableTool, content: str) -> None:
    assert tool.run(call("functions.f")).content == content


def test_wrong_arguments_are_text_for_the_model() -> None:
    assert run(add).content == "error: ToolError: wrong arguments: missing a; expected a, b"
    assert run(add, '{"a": "1"}').content == 'error: ToolError: a is "1": expected a valid integer'
    assert run(add, "{").content.startswith("error: ToolError: the arguments are")


async def wait_and_add(a: int, b: int = 1) -> int:
    """Add two numbers, after a while."""
    await asyncio.sleep(0)
    return a + b


async def fail() -> None:
    """Fails."""
    raise KeyError("x")


@pytest.mark.parametrize(
    ("function", "arguments", "content"),
    [
        (add, '{"a": 2}', "3"),
        (wait_and_add, '{"a": 2}', "3"),
        (wait_and_add, "{}", "error: ToolError: wrong arguments: missing a; expected a, b"),
        (fail, "", "error: KeyError: 'x'"),
    ],
)
def test_async_and_plain_functions_are_awaited_alike(function: Any, arguments: str, content: str) -> None:
    tool = as_tool(function)
    assert isinstance(tool, RunnableTool)
    result = asyncio.run(tool.arun(call(f"functions.{tool.name}", arguments)))
    assert result == Message.tool_result(content, name=f"functions.{tool.name}", call_id="c1")


def test_only_a_plain_function_leaves_the_event_loops_thread() -> None:
    async def here() -> int:
        return threading.get_ident()

    def elsewhere() -> int:
        return threading.get_ident()

    async def both() -> list[str]:
        results = [
            await t.arun(call("f")) for t in map(as_tool, (here, elsewhere)) if isinstance(t, RunnableTool)
        ]
        return [result.content for result in results]

    on_loop, in_thread = asyncio.run(both())
    assert on_loop == str(threading.get_ident()) != in_thread


def test_an_awaited_tool_that_stops_an_iteration_is_told_too() -> None:
    tool = raising(StopIteration())  # which no future can hold
    assert asyncio.run(tool.arun(call("f"))).content == "error: StopIteration: "


def test_an_async_tool_cannot_be_run_without_a_loop() -> None:
    with pytest.raises(ToolError, match="'fail' is async: await the answer with asend"):
        run(fail)


def test_a_call_without_arguments_is_a_call_with_none() -> None:
    def now() -> str:
        return "noon"

    assert run(now, "").content == "noon"


def test_tools_that_are_not_ours_to_run_are_only_declared() -> None:
    declared = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    assert as_tool(declared) == Tool("add", "", {"type": "object"})
    assert as_tool(Tool("add")) == Tool("add")
    with pytest.raises(ToolError):
        as_tool({"name": ""})


def test_a_runnable_tool_stays_what_it_is() -> None:
    tool = as_tool(add)
    assert isinstance(tool, RunnableTool) and as_tool(tool) is tool
    assert isinstance(tool.declaration, Tool) and tool.declaration.description == "Add two numbers."


def python() -> None: ...


@pytest.mark.parametrize(
    ("recipient", "kind"),
    [
        ("browser", ToolNamespace),
        ("browser.open", ToolNamespace),
        ("python", ToolNamespace),
        ("functions.python", Tool),
        ("functions.add", Tool),
        ("add", Tool),
        ("functions.browser", None),
        ("functions.browser.open", None),
        ("add.more", None),
        ("nobody", None),
    ],
)
def test_a_call_finds_its_tool(recipient: str, kind: type | None) -> None:
    tools = [as_tool(add), as_tool(python)]
    tools += [RunnableTool(BROWSER, lambda call: ""), RunnableTool(ToolNamespace("python"), lambda call: "")]
    found = tool_for(call(recipient), [tool for tool in tools if isinstance(tool, RunnableTool)])
    assert (found and type(found.declaration)) == kind
    assert found is None or found.name == recipient.removeprefix("functions.").split(".")[0]


def test_a_built_in_tool_is_recognised_by_what_it_has(tmp_path: Path) -> None:
    assert isinstance(BrowserTool(FolderPages(tmp_path)), BuiltinTool)
    assert not isinstance(add, BuiltinTool)


def test_the_command_line_offers_the_built_in_tools_of_the_table() -> None:
    from mlx_gptoss.cli.chat import chat

    (option,) = [p for p in chat.params if p.name == "tools"]
    assert isinstance(option.type, click.Choice) and list(option.type.choices) == list(BUILTIN)


@pytest.mark.parametrize("module", ["mlx_gptoss.tools", "mlx_gptoss.tools.call", "mlx_gptoss.chat.session"])
def test_pydantic_is_imported_when_a_function_becomes_a_tool(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps([m for m in sys.modules if 'pydantic' in m]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
