"""Built-in tools in a Session's loop, over a scripted model and the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_gptoss.errors import ToolError
from mlx_gptoss.harmony import MessageDone, Tool, ToolCall
from mlx_gptoss.tools import builtin_tools
from mlx_gptoss.tools.browser import BrowserTool
from mlx_gptoss.tools.call import RunnableTool
from mlx_gptoss.tools.pages import FolderPages
from tests.support.scripted_model import scripted_engine


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def said_last(context: str) -> str:
    return context.rsplit("<|message|>", 1)[1].split("<|end|>")[0]


def script(context: str) -> str:
    """Search, then add, then answer."""
    if "browser.search to=assistant" not in context:
        return '<|channel|>analysis to=browser.search code<|message|>{"query":"bees"}<|call|>'
    if "functions.add to=assistant" not in context:
        return '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a":1,"b":2}<|call|>'
    return f"<|channel|>final<|message|>The sum is {said_last(context)}.<|return|>"


def test_built_in_tools_and_functions_run_in_one_loop(tmp_path: Path) -> None:
    (tmp_path / "bees.md").write_text("# Bees\n\nBees make honey.")
    llm, model = scripted_engine(script)
    with llm:
        chat = llm.chat(tools=[*builtin_tools(["browser"], folder=tmp_path), add])
        events = list(chat.stream("What of bees?"))
    results = [e.message for e in events if isinstance(e, MessageDone) and e.message.role == "tool"]
    assert [m.name for m in results] == ["browser.search", "functions.add"]
    assert [m.channel for m in results] == ["analysis", "commentary"]
    assert "【0†Bees†bees.md】 Bees make honey." in results[0].content
    assert chat.history[-1].content == "The sum is 3."
    assert "namespace browser" in model.contexts[0]


def test_what_a_tool_raises_is_its_result() -> None:
    class Broken(BrowserTool):
        def handle(self, call: ToolCall) -> str:
            raise RuntimeError("no pages today")

    llm, _ = scripted_engine(script)
    with llm:
        chat = llm.chat(tools=[Broken(FolderPages(".")), add])
        chat.send("?")
    assert chat.history[2].content == "error: RuntimeError: no pages today"


def test_a_tool_of_any_origin_runs_as_a_record() -> None:
    asked: list[str] = []

    def handle(call: ToolCall) -> object:
        asked.append(call.arguments)
        return {"sum": 3, "unit": "\ud83d"}  # half a surrogate pair, which no prompt can hold

    schema = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
    llm, model = scripted_engine(script)
    with llm:
        chat = llm.chat(tools=[BrowserTool(FolderPages(".")), RunnableTool(Tool("add", "", schema), handle)])
        reply = chat.send("?")
    assert asked == ['{"a":1,"b":2}']
    assert reply.text == 'The sum is {"sum": 3, "unit": "\ufffd"}.'
    assert "type add = (_: {" in model.contexts[0]


def test_a_request_declares_what_a_session_would_run() -> None:
    llm, model = scripted_engine(script)
    with llm:
        llm.respond("?", tools=[BrowserTool(FolderPages(".")), add])
    assert "namespace browser" in model.contexts[0] and "type add = (_: {" in model.contexts[0]


def test_two_tools_of_one_name_are_refused() -> None:
    llm, _ = scripted_engine(script)
    with llm, pytest.raises(ToolError, match="'browser' is declared twice"):
        llm.chat(tools=[BrowserTool(FolderPages(".")), BrowserTool(FolderPages("."))])
