"""How a reply looks at a prompt and in a notebook."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_gptoss.harmony import FinishReason, Reply, ToolCall, Usage

CALL = ToolCall(0, "c1", "get_weather", '{"city": "Oslo"}', "functions.get_weather")


def reply(
    text: str, reason: FinishReason = "stop", calls: tuple[ToolCall, ...] = (), parsed: Any = None
) -> Reply:
    return Reply(text, "thoughts", calls, (), reason, Usage(43, 0, 12, 5), parsed=parsed)


@pytest.mark.parametrize(
    ("made", "shown", "markdown"),
    [
        (reply("**Oslo**"), "<Reply '**Oslo**', stop, 43 + 12 tokens>", "**Oslo**"),
        (reply("x" * 90), f"<Reply {'x' * 60 + '…'!r}, stop, 43 + 12 tokens>", "x" * 90),
        (
            reply("", "tool_calls", (CALL,)),
            "<Reply '', tool_calls=['get_weather'], tool_calls, 43 + 12 tokens>",
            '`get_weather({"city": "Oslo"})`',
        ),
        (
            reply('{"n": 1}', parsed={"n": 1}),
            "<Reply '{\"n\": 1}', parsed=dict, stop, 43 + 12 tokens>",
            '```json\n{"n": 1}\n```',
        ),
        (
            reply("One\ntwo", "length"),
            "<Reply 'One\\ntwo', length, 43 + 12 tokens>",
            "One\ntwo\n\n*(length)*",
        ),
    ],
)
def test_a_reply_is_shown_short_and_in_a_notebook_as_markdown(made: Reply, shown: str, markdown: str) -> None:
    assert repr(made) == shown
    assert made._repr_markdown_() == markdown
