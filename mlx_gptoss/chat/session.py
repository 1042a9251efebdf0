"""Session: a conversation that keeps its history as tokens, and runs tools: Python functions and built-ins.

What the model sampled is never rendered again from text, so the engine finds the whole conversation in its
prefix store at every turn, also after `undo`, `rewind` or an edit.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from mlx_gptoss.errors import RequestError
from mlx_gptoss.harmony import (
    Conversation,
    Done,
    Event,
    Message,
    MessageDone,
    Reply,
    Tool,
    ToolCall,
    Usage,
    render,
)
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.tools import BuiltinTool

if TYPE_CHECKING:
    from mlx_gptoss.chat.generation import Generation
    from mlx_gptoss.llm import Engine

_SAMPLING = frozenset(f.name for f in fields(SamplingParams))
_CONVERSATION = frozenset(f.name for f in fields(Conversation)) - {"messages", "response_schema"}
_START = frozenset(
    ("tool_choice", "strict_tools", "schema", "regex", "lark", "choices", "json_object", "reasoning_budget")
)

ToolLike = Tool | Callable[..., Any] | dict[str, Any] | BuiltinTool


def declare(
    tools: Sequence[ToolLike],
) -> tuple[list[Tool], dict[str, Callable[..., Any]], dict[str, BuiltinTool]]:
    """Tools to show to the model, by name the functions among them, and by namespace the built-in tools.

    Raises ToolError.
    """
    shown: list[Tool] = []
    functions: dict[str, Callable[..., Any]] = {}
    builtin: dict[str, BuiltinTool] = {}
    for item in tools:
        if isinstance(item, Tool):
            shown.append(item)
        elif isinstance(item, BuiltinTool):
            builtin[item.namespace.name] = item
        elif isinstance(item, dict):
            shown.append(Tool.from_dict(item))
        else:
            from mlx_gptoss.tools.functions import tool_from_function

            shown.append(tool_from_function(item))
            functions[shown[-1].name] = item
    return shown, functions, builtin


def split_request(
    messages: Sequence[Message], request: dict[str, Any]
) -> tuple[Conversation, dict[str, Any]]:
    """Keyword arguments of a request -> the conversation, and what Engine.start takes beside it.

    Raises RequestError naming an argument that nothing takes.
    """
    known = _SAMPLING | _CONVERSATION | _START | {"params"}
    for name in request:
        if name not in known:
            raise RequestError(
                f"{name} is no argument of a request: expected {', '.join(sorted(known))}", name
            )
    sampling = {k: v for k, v in request.items() if k in _SAMPLING}
    if sampling and request.get("params") is not None:
        raise RequestError("params and single sampling arguments were given together: give one", "params")
    about = {k: v for k, v in request.items() if k in _CONVERSATION}
    about["tools"], _, builtin = declare(about.get("tools") or ())
    about["builtin"] = [*(about.get("builtin") or ()), *(tool.namespace for tool in builtin.values())]
    if request.get("schema") is not None:
        from mlx_gptoss.grammar import json_schema_of

        about["response_schema"] = json_schema_of(request["schema"])
    start = {k: v for k, v in request.items() if k in _START}
    start["params"] = request.get("params") or SamplingParams(**sampling)
    return Conversation(list(messages), **about), start


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """A prompt as messages. Raises RequestError when there is none."""
    messages = [Message.user(prompt)] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise RequestError("the prompt holds no messages: give at least one", "prompt")
    return messages


def events_of(generation: Generation) -> Iterator[Event]:
    """The events of a generation; leaving the iteration, or never starting it, cancels it."""
    events = _events(generation)
    # The finally of a generator that never started does not run.
    weakref.finalize(events, generation.cancel).atexit = False
    return events


def _events(generation: Generation) -> Iterator[Event]:
    try:
        yield from generation
    finally:
        generation.cancel()


class Session:
    """One conversation with a model.

    tools: Python functions and built-in tools (mlx_gptoss.tools) are run and their results given back to the
    model, at most `max_steps` model turns for one answer; an exception becomes the call's result. Other
    tools are left to the caller: the reply holds their calls, and `send` takes their results as messages.
    The other arguments are those of Engine.respond, for every turn.
    """

    def __init__(
        self, engine: Engine, *, tools: Sequence[ToolLike] = (), max_steps: int = 8, **request: Any
    ) -> None:
        if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
            raise RequestError(f"max_steps is {max_steps!r}: expected a whole number >= 1", "max_steps")
        self.history: list[Message] = []
        self.usage = Usage()
        self._engine = engine
        self._tools = list(tools)
        _, self._functions, self._builtin = declare(tools)
        self._max_steps = max_steps
        self._request = request
        split_request([], {**request, "tools": self._tools})

    @property
    def tokens(self) -> list[int]:
        """The conversation so far as the next turn will render it."""
        conversation, _ = self._split(self.history)
        return render(conversation, self._engine.tokenizer, for_completion=False)

    def send(self, prompt: str | Sequence[Message]) -> Reply:
        """Say something (or give messages, such as tool results); the whole reply."""
        reply: Reply | None = None
        for event in self.stream(prompt):
            if isinstance(event, Done):
                reply = event.reply
        assert reply is not None
        return reply

    def stream(self, prompt: str | Sequence[Message]) -> Iterator[Event]:
        """Like `send`, as events; results of tools that were run come as MessageDone.

        The last is one Done: its reply has the messages of all steps, and usage that adds them up (of the
        prompt, the last step's). The history grows when the turn is over: leaving the iteration early, or
        an error, leaves it as it was.
        """
        history = [*self.history, *as_messages(prompt)]
        said = len(history)
        completion = reasoning = 0
        for left in reversed(range(self._max_steps)):
            conversation, start = self._split(history)
            for event in events_of(self._engine.start(conversation, **start)):
                if isinstance(event, Done):
                    done = event
                else:
                    yield event
            history += done.reply.messages
            completion += done.usage.completion_tokens
            reasoning += done.usage.reasoning_tokens
            calls = done.reply.tool_calls
            if done.finish_reason != "tool_calls" or not all(map(self._can_run, calls)) or not left:
                break
            for call in calls:
                result = self._run(call)
                history.append(result)
                yield MessageDone(result)
        self.history = history
        usage = replace(done.usage, completion_tokens=completion, reasoning_tokens=reasoning)
        self.usage = Usage(
            self.usage.prompt_tokens + usage.prompt_tokens,
            self.usage.cached_tokens + usage.cached_tokens,
            self.usage.completion_tokens + completion,
            self.usage.reasoning_tokens + reasoning,
        )
        reply = replace(done.reply, messages=tuple(history[said:]), usage=usage)
        yield Done(done.finish_reason, usage, reply)

    def undo(self) -> list[Message]:
        """Take back the last thing the user said and all that followed; the messages removed."""
        at = max((i for i, m in enumerate(self.history) if m.role == "user"), default=len(self.history))
        removed = self.history[at:]
        del self.history[at:]
        return removed

    def rewind(self, position: int) -> None:
        """Keep the first `position` messages of the history. Raises RequestError when there are fewer."""
        if not 0 <= position <= len(self.history):
            raise RequestError(
                f"position is {position}: the history has {len(self.history)} messages", "position"
            )
        del self.history[position:]

    def _builtin_of(self, call: ToolCall) -> BuiltinTool | None:
        if call.recipient.startswith("functions."):
            return None
        return self._builtin.get(call.name.split(".")[0])

    def _can_run(self, call: ToolCall) -> bool:
        return self._builtin_of(call) is not None or call.name in self._functions

    def _run(self, call: ToolCall) -> Message:
        builtin = self._builtin_of(call)
        return run_builtin(builtin, call) if builtin else run_tool(self._functions[call.name], call)

    def _split(self, history: Sequence[Message]) -> tuple[Conversation, dict[str, Any]]:
        return split_request(history, {**self._request, "tools": self._tools})


def run_tool(function: Callable[..., Any], call: ToolCall) -> Message:
    """Call a function with the arguments the model wrote; its result, or its exception, as a message."""
    from mlx_gptoss.tools.arguments import bind_arguments

    try:
        arguments = json.loads(call.arguments or "{}")
        if not isinstance(arguments, dict):
            raise TypeError(f"the arguments are {call.arguments!r}: expected a JSON object")
        value = function(**bind_arguments(function, arguments))
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
