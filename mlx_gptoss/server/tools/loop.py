"""A turn that goes on while the model calls tools of this server: generate, run, generate, to one answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, TypeAlias

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.engine.request import Cancellable, Sink
from mlx_gptoss.harmony import Conversation, Done, Message, MessageDone, ToolCall, ToolCallDelta, Usage
from mlx_gptoss.server.tools.toolbox import ServedTool, ServedTools
from mlx_gptoss.tools.call import tool_for

Start: TypeAlias = Callable[[Conversation, TurnOptions, Sink], Cancellable]
Calls: TypeAlias = Sequence[tuple[ToolCall, ServedTool]]
MAX_CALLS = 16  # of tools for one answer; after them the model has to answer


class ToolLoop:
    """In the place of a Generation: its events are those of all steps, results of tools as MessageDone.

    The one Done at the end has the messages of all steps, and their tokens added up (of the prompt, the
    last step's). A call that needs approval ends the turn with "tool_calls". approved: the calls at the
    conversation's end that have it, which are run first.
    """

    def __init__(
        self,
        start: Start,
        conversation: Conversation,
        options: TurnOptions,
        served: ServedTools,
        sink: Sink,
        executor: Executor,
        *,
        approved: frozenset[str] = frozenset(),
        max_calls: int = MAX_CALLS,
    ) -> None:
        self._start, self._sink, self._executor = start, sink, executor
        self._conversation, self._options = conversation, options
        self._served = served
        self._left = max_calls
        self._said: list[Message] = []
        self._usage = Usage()
        self._generation: Cancellable | None = None
        self._cancelled = False
        self._approved = [
            (call, tool)
            for call in open_calls(conversation.messages)
            if call.call_id in approved and (tool := tool_for(call, served.tools)) is not None
        ]

    def begin(self) -> ToolLoop:
        """Begin; what is wrong with the request is raised here, unless approved calls are run first."""
        if self._approved:
            self._executor.submit(self._run, self._approved, True)
        else:
            self._generate()
        return self

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the step's prompt; 0 before there is one."""
        return 0 if self._generation is None else self._generation.prompt_tokens

    def cancel(self) -> None:
        """End the step. A tool's call ends if it can; what it gives is not used."""
        self._cancelled = True
        if self._generation is not None:
            self._generation.cancel()
        self._executor.submit(self._served.close)

    def _generate(self) -> None:
        self._generation = self._start(self._conversation, self._options, self._take)
        if self._cancelled:
            self._generation.cancel()

    def _take(self, event: Any) -> None:
        """An event of a step; on the engine's thread."""
        if isinstance(event, Done):
            self._step_over(event)
        elif isinstance(event, BaseException):
            self._end(event)
        else:
            self._sink(event)

    def _step_over(self, done: Done) -> None:
        before, now = self._usage, done.usage
        self._usage = replace(
            now,
            completion_tokens=before.completion_tokens + now.completion_tokens,
            reasoning_tokens=before.reasoning_tokens + now.reasoning_tokens,
        )
        self._add(done.reply.messages)
        calls = [(call, tool_for(call, self._served.tools)) for call in done.reply.tool_calls]
        runs = [(call, tool) for call, tool in calls if tool is not None and tool.unasked]
        if done.finish_reason == "tool_calls" and len(runs) == len(calls) and not self._cancelled:
            self._executor.submit(self._run, runs, False)
        else:
            reply = replace(done.reply, messages=tuple(self._said), usage=self._usage)
            self._end(Done(done.finish_reason, self._usage, reply))

    def _add(self, messages: Sequence[Message]) -> None:
        self._said += messages
        self._conversation = replace(self._conversation, messages=[*self._conversation.messages, *messages])

    def _run(self, calls: Calls, told: bool) -> None:
        """Run calls and go on; on a thread of the executor. told: tell the calls as events first."""
        try:
            for call, tool in calls:
                if told:
                    self._sink(ToolCallDelta(call.index, call.call_id, call.name, ""))
                    self._sink(ToolCallDelta(call.index, call.call_id, call.name, call.arguments))
                    self._sink(call)
                result = tool.run(call)
                self._add([result])
                self._sink(MessageDone(result))
            self._left -= len(calls)
            choice = self._options.tool_choice
            # A call that had to be made was made, and nobody calls tools for ever.
            self._options = replace(
                self._options, tool_choice="none" if self._left <= 0 or choice == "none" else "auto"
            )
            self._generate()
        except BaseException as error:
            self._end(error)

    def _end(self, event: Any) -> None:
        self._executor.submit(self._served.close)
        self._sink(event)


def open_calls(messages: Sequence[Message]) -> list[ToolCall]:
    """The calls at a conversation's end that have no result."""
    answered = {m.call_id for m in messages if m.role == "tool"}
    calls: list[ToolCall] = []
    for message in reversed(messages):
        if message.role == "tool":
            continue  # of another call of the same turn
        if message.role != "assistant" or message.channel == "final":
            break
        if message.recipient is not None and message.call_id and message.call_id not in answered:
            name = message.recipient.removeprefix("functions.")
            calls.append(ToolCall(0, message.call_id, name, message.content, message.recipient))
    return [replace(call, index=index) for index, call in enumerate(reversed(calls))]
