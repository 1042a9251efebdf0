"""From a caller's keyword arguments to a conversation and how its next turn is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeAlias

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.errors import RequestError
from mlx_gptoss.grammar import ResponseFormat, ToolChoice, json_schema_of
from mlx_gptoss.harmony import Conversation, Message, ReasoningEffort, Tool, ToolNamespace
from mlx_gptoss.sampling import SamplingKeywords, SamplingParams
from mlx_gptoss.tools.call import RunnableTool, as_tool

Prompt: TypeAlias = str | Sequence[Message]


class RequestKeywords(SamplingKeywords, total=False):
    """What a request may say beside its prompt, tools and schema.

    params: a SamplingParams in place of its single fields. instructions, reasoning_effort, current_date,
    builtin, response_name, knowledge_cutoff, identity: see Conversation. tool_choice, strict_tools,
    reasoning_budget: see TurnOptions. regex, lark, choices, json_object: what the answer must be; at most one
    of them, or a schema.
    """

    params: SamplingParams | None
    instructions: str | None
    reasoning_effort: ReasoningEffort | None
    current_date: str | None
    builtin: Sequence[ToolNamespace]
    response_name: str
    knowledge_cutoff: str | None
    identity: str | None
    tool_choice: ToolChoice
    strict_tools: bool
    reasoning_budget: int | None
    regex: str | None
    lark: str | None
    choices: Sequence[str] | None
    json_object: bool


_SAMPLING = frozenset(f.name for f in fields(SamplingParams))
_CONVERSATION = frozenset(f.name for f in fields(Conversation)) - {"messages", "response_schema"}
_FORMATS = frozenset(("schema", "regex", "lark", "choices", "json_object"))
_TURN = frozenset(("tool_choice", "strict_tools", "reasoning_budget"))
_KNOWN = _SAMPLING | _CONVERSATION | _FORMATS | _TURN | {"params"}


def split_request(messages: Sequence[Message], request: dict[str, Any]) -> tuple[Conversation, TurnOptions]:
    """Keyword arguments of a request -> the conversation, and how its next turn is generated.

    Raises RequestError naming an argument that nothing takes, SchemaError or ToolError.
    """
    for name in request:
        if name not in _KNOWN:
            raise RequestError(
                f"{name} is not an argument of a request: expected {', '.join(sorted(_KNOWN))}", name
            )
    sampling = {k: v for k, v in request.items() if k in _SAMPLING}
    if sampling and request.get("params") is not None:
        raise RequestError("params and single sampling arguments were given together: give one", "params")
    response_format = ResponseFormat.of(**{k: v for k, v in request.items() if k in _FORMATS})
    about = {k: v for k, v in request.items() if k in _CONVERSATION}
    tools = [as_tool(item) for item in about.get("tools") or ()]
    shown = [tool.declaration if isinstance(tool, RunnableTool) else tool for tool in tools]
    about["tools"] = [tool for tool in shown if isinstance(tool, Tool)]
    about["builtin"] = [*(about.get("builtin") or ()), *(s for s in shown if isinstance(s, ToolNamespace))]
    if request.get("schema") is not None:
        about["response_schema"] = json_schema_of(request["schema"])
    options = TurnOptions(
        request.get("params") or SamplingParams(**sampling),
        response_format,
        **{k: v for k, v in request.items() if k in _TURN},
    )
    return Conversation(list(messages), **about), options


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """A prompt as messages. Raises RequestError when there is none."""
    messages = [Message.user(prompt)] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise RequestError("the prompt holds no messages: give at least one", "prompt")
    return messages
