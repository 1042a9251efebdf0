"""Tools that are run here: one value per tool, and a call of it made into the message of its result."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from mlx_gptoss.errors import ToolError
from mlx_gptoss.harmony import Message, Tool, ToolCall, ToolNamespace
from mlx_gptoss.harmony.types import FUNCTIONS
from mlx_gptoss.tools import BuiltinTool


@dataclass(frozen=True)
class RunnableTool:
    """A tool with what runs it.

    declaration: what the model is shown, a function or a namespace of built-in ones. handle: what a call
    gives, or a coroutine function of the call; what is no text is shown as JSON.
    """

    declaration: Tool | ToolNamespace
    handle: Callable[[ToolCall], Any]

    @property
    def name(self) -> str:
        """As it is declared, a function's without "functions."."""
        return self.declaration.name

    @property
    def builtin(self) -> bool:
        """Whether the model is shown it in the system message and calls it while it reasons."""
        return isinstance(self.declaration, ToolNamespace)

    @property
    def is_async(self) -> bool:
        """Whether `handle` is a coroutine function, which only `arun` can run."""
        return inspect.iscoroutinefunction(self.handle)

    def require_sync(self) -> None:
        """Raise ToolError for an async tool."""
        if self.is_async:
            raise ToolError(
                f"tool {self.name!r} is async: await the answer with asend or astream, or give a "
                "plain function",
                "tools",
            )

    def run(self, call: ToolCall) -> Message:
        """The result as a message; an exception becomes text for the model to deal with.

        Raises ToolError for an async tool.
        """
        self.require_sync()
        return self._result(call, self._text(call))

    async def arun(self, call: ToolCall) -> Message:
        """The result as a message, as from `run`. A tool that is not async runs in a worker thread meanwhile,
        and to its end even when the task that waits for it is cancelled.
        """
        if not self.is_async:
            return self._result(call, await asyncio.to_thread(self._text, call))
        try:
            text = _shown(await self.handle(call))
        except Exception as error:
            text = _told(error)
        return self._result(call, text)

    def _text(self, call: ToolCall) -> str:
        try:
            return _shown(self.handle(call))
        except Exception as error:
            return _told(error)

    def _result(self, call: ToolCall, text: str) -> Message:
        # Half a surrogate pair cannot be encoded, and so not shown to the model.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        channel = "analysis" if self.builtin else "commentary"
        return Message.tool_result(text, name=call.recipient or None, call_id=call.call_id, channel=channel)


AnyTool = TypeVar("AnyTool", bound=RunnableTool)
ToolLike: TypeAlias = Tool | Mapping[str, Any] | Callable[..., Any] | BuiltinTool | RunnableTool


def as_tool(item: ToolLike) -> Tool | RunnableTool:
    """A tool as a value: a Tool or a dict is only declared, everything else can be run. Raises ToolError."""
    if isinstance(item, Tool | RunnableTool):
        return item
    if isinstance(item, BuiltinTool):
        return RunnableTool(item.namespace, item.handle)
    if isinstance(item, Mapping):
        return Tool.from_dict(item)
    from mlx_gptoss.tools.functions import read_function

    tool, bind = read_function(item)
    if not inspect.iscoroutinefunction(item):
        return RunnableTool(tool, lambda call: item(**bind(call.arguments or "{}")))

    async def handle(call: ToolCall) -> Any:
        return await item(**bind(call.arguments or "{}"))

    return RunnableTool(tool, handle)


def tool_for(call: ToolCall, tools: Sequence[AnyTool]) -> AnyTool | None:
    """The tool that a call goes to: "browser.open" to a namespace, "functions.f" to a function, and a bare
    name to a namespace before a function.
    """
    if not call.recipient.startswith(f"{FUNCTIONS}."):
        root = call.name.split(".")[0]
        for tool in tools:
            if tool.builtin and tool.name == root:
                return tool
    return next((tool for tool in tools if not tool.builtin and tool.name == call.name), None)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _told(error: Exception) -> str:
    try:
        return f"error: {type(error).__name__}: {error}"
    except Exception:  # its own __str__ raised
        return f"error: {type(error).__name__}"
