"""Running a call: a tool's result, or what went wrong, as the message that answers it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mlx_gptoss.harmony import Message, ToolCall
from mlx_gptoss.tools import BuiltinTool


def run_tool(function: Callable[..., Any], call: ToolCall) -> Message:
    """Call a function with the arguments the model wrote; its result, or its exception, as a message."""
    from mlx_gptoss.tools.functions import read_function

    try:
        value = function(**read_function(function)[1](call.arguments or "{}"))
        content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except Exception as error:  # whatever the tool raised is for the model to deal with
        content = f"error: {type(error).__name__}: {error}"
    return Message.tool_result(content, name=call.recipient or None, call_id=call.call_id)


def run_builtin(tool: BuiltinTool, call: ToolCall) -> Message:
    """Let a built-in tool handle a call; its result stands where the model calls such tools."""
    try:
        content = tool.handle(call)
    except Exception as error:  # as above
        content = f"error: {type(error).__name__}: {error}"
    return Message.tool_result(content, name=call.recipient, call_id=call.call_id, channel="analysis")
