"""From a caller's keyword arguments to a conversation and how its next turn is generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.errors import RequestError, ToolError, did_you_mean
from mlx_gptoss.grammar import ResponseFormat, ToolChoice, json_schema_of
from mlx_gptoss.harmony import Conversation, Message, ReasoningEffort, Tool, ToolNamespace
from mlx_gptoss.harmony.types import check_type
from mlx_gptoss.sampling import SamplingKeywords, SamplingParams
from mlx_gptoss.tools.call import RunnableTool, ToolLike, as_tool


class RequestKeywords(SamplingKeywords, total=False):
    """What a request may say beside its prompt, tools and schema.

    params: a SamplingParams in place of its single fields. max_tokens: None for the effort's own bound (see
    TurnOptions). instructions, reasoning_effort, current_date, builtin, response_name, knowledge_cutoff,
    identity: see Conversation. tool_choice, strict_tools, reasoning_budget, adapter: see TurnOptions;
    progress, too, for streams: a reply has no use for it. regex, lark, choices, json_object: what the answer
    must be; at most one of them, or a schema.
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
    progress: bool
    adapter: str | None
    regex: str | None
    lark: str | None
    choices: Sequence[str] | None
    json_object: bool


_SAMPLING = frozenset(f.name for f in fields(SamplingParams))
_CONVERSATION = frozenset(f.name for f in fields(Conversation)) - {"messages", "response_schema"}
_FORMATS = frozenset(("schema", "regex", "lark", "choices", "json_object"))
_TURN = frozenset(("tool_choice", "strict_tools", "reasoning_budget", "progress", "adapter"))
_KNOWN = _SAMPLING | _CONVERSATION | _FORMATS | _TURN | {"params"}
# What other libraries call them.
_OTHER_NAMES = {
    **dict.fromkeys(("system", "system_prompt", "system_instruction", "developer"), "instructions"),
    **dict.fromkeys(
        ("max_new_tokens", "max_output_tokens", "max_completion_tokens", "num_predict"), "max_tokens"
    ),
    **dict.fromkeys(("reasoning", "effort", "think", "thinking"), "reasoning_effort"),
    **dict.fromkeys(("response_format", "response_model", "output_type", "json_schema", "format"), "schema"),
    **dict.fromkeys(("temp",), "temperature"),
    **dict.fromkeys(("functions",), "tools"),
    **dict.fromkeys(("top_logprobs",), "logprobs"),
    **dict.fromkeys(("stop_sequences", "stop_strings"), "stop"),
    **dict.fromkeys(("repeat_penalty",), "repetition_penalty"),
    **dict.fromkeys(("guided_regex",), "regex"),
    **dict.fromkeys(("guided_choice", "enum"), "choices"),
}


def split_request(
    messages: Sequence[Message], request: Mapping[str, Any]
) -> tuple[Conversation, TurnOptions]:
    """Keyword arguments of a request -> the conversation, and how its next turn is generated.

    Raises RequestError naming an argument that nothing takes, SchemaError or ToolError.
    """
    for name in request:
        if name not in _KNOWN:
            near = did_you_mean(name, _KNOWN, _OTHER_NAMES) or f": expected {', '.join(sorted(_KNOWN))}"
            raise RequestError(f"{name} is not an argument of a request{near}", name)
    params = request.get("params")
    check_type(params, SamplingParams | None, "params", "a SamplingParams")
    sampling = {k: v for k, v in request.items() if k in _SAMPLING}
    if sampling and params is not None:
        raise RequestError("params and single sampling arguments were given together: give one", "params")
    response_format = ResponseFormat.of(**{k: v for k, v in request.items() if k in _FORMATS})
    about = {k: v for k, v in request.items() if k in _CONVERSATION}
    tools = as_tools(about.get("tools"))
    shown = [tool.declaration if isinstance(tool, RunnableTool) else tool for tool in tools]
    about["tools"] = [tool for tool in shown if isinstance(tool, Tool)]
    about["builtin"] = [*(about.get("builtin") or ()), *(s for s in shown if isinstance(s, ToolNamespace))]
    if request.get("schema") is not None:
        about["response_schema"] = json_schema_of(request["schema"])
    options = TurnOptions(
        params or SamplingParams(**sampling),
        response_format,
        **{k: v for k, v in request.items() if k in _TURN},
    )
    return Conversation(list(messages), **about), options


def with_instructions(request: Mapping[str, Any], more: str | None) -> Mapping[str, Any]:
    """A request's keyword arguments with instructions that came with the prompt, after its own."""
    if more is None:
        return request
    given = request.get("instructions")
    return {**request, "instructions": f"{given}\n\n{more}" if given else more}


def as_tools(tools: Sequence[ToolLike] | None) -> list[Tool | RunnableTool]:
    """Tools as values (see as_tool). Raises ToolError, also for one that is not in a list."""
    if tools is None:
        return []
    if isinstance(tools, str | Mapping | Tool | RunnableTool) or not isinstance(tools, Iterable):
        raise ToolError(f"tools is {tools!r:.80}: expected a list, also of one tool", "tools")
    return [as_tool(item) for item in tools]
