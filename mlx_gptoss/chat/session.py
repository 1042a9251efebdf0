"""Session: a conversation that keeps its history as tokens, and runs tools: Python functions and built-ins.

What the model sampled is never rendered again from text, so the engine finds the whole conversation in its
prefix store at every turn, also after `undo`, `rewind` or an edit.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, Unpack

from mlx_gptoss.chat.generation import Generation
from mlx_gptoss.chat.messages import Prompt, read_prompt
from mlx_gptoss.chat.prompt import RequestKeywords, as_tools, split_request, with_instructions
from mlx_gptoss.chat.turn import TurnOptions, aevents_of, events_of
from mlx_gptoss.engine.request import Sink
from mlx_gptoss.errors import RequestError
from mlx_gptoss.harmony import Conversation, Done, Event, Message, MessageDone, Reply, ToolCall, Usage, render
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tools.call import RunnableTool, ToolLike, tool_for

Parsed = TypeVar("Parsed")


class ChatModel(Protocol):
    """What a session needs of a model."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def start(
        self, conversation: Conversation, options: TurnOptions, *, sink: Sink | None = None
    ) -> Generation: ...


class Session(Generic[Parsed]):
    """One conversation with a model.

    tools: Python functions and built-in tools (mlx_gptoss.tools) are run and their results given back to the
    model, at most `max_steps` model turns for one answer; an exception becomes the call's result. Other
    tools are left to the caller: the reply holds their calls, and `send` takes their results as messages.
    `asend` and `astream` do the same on an event loop, and run async functions too. The other arguments are
    those of LLM.respond, for every turn.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        tools: Sequence[ToolLike] = (),
        schema: Any = None,
        max_steps: int = 8,
        **request: Unpack[RequestKeywords],
    ) -> None:
        if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
            raise RequestError(f"max_steps is {max_steps!r}: expected a whole number >= 1", "max_steps")
        self.history: list[Message] = []
        self.usage = Usage()
        self._model = model
        declared = as_tools(tools)
        self._tools = [tool for tool in declared if isinstance(tool, RunnableTool)]
        self._max_steps = max_steps
        self._request: dict[str, Any] = {**request, "tools": declared, "schema": schema}
        split_request([], self._request)

    def __repr__(self) -> str:
        return f"<Session of {len(self.history)} messages, {self.usage.completion_tokens} tokens generated>"

    @property
    def tokens(self) -> list[int]:
        """The conversation so far as the next turn will render it."""
        conversation, _ = split_request(self.history, self._request)
        return render(conversation, self._model.tokenizer, for_completion=False)

    def send(self, prompt: Prompt) -> Reply[Parsed]:
        """Say something (or give messages, such as tool results); the whole reply.

        Raises what LLM.respond does, ToolError where a tool is async, and RequestError when the history was
        changed meanwhile.
        """
        *_, done = self.stream(prompt)
        assert isinstance(done, Done)
        return done.reply

    def stream(self, prompt: Prompt) -> Iterator[Event]:
        """Like `send`, as events; results of tools that were run come as MessageDone.

        The last is one Done: its reply has the messages of all steps, and usage that adds them up (of the
        prompt, the last step's). The history grows when the turn is over: leaving the iteration early, or
        an error, leaves it as it was.
        """
        for tool in self._tools:
            tool.require_sync()
        answer = self._answer(prompt)
        while True:
            for event in events_of(self._model.start(*answer.turn())):
                if isinstance(event, Done):
                    answer.took(event)
                else:
                    yield event
            if not answer.runs:
                break
            for call, tool in answer.runs:
                yield answer.result(tool.run(call))
        yield self._end(answer)

    async def asend(self, prompt: Prompt) -> Reply[Parsed]:
        """Like `send`, on an event loop. Cancelling the task that waits cancels what it waits for."""
        async with aclosing(self.astream(prompt)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return event.reply
        raise AssertionError("a stream ends with Done")

    async def astream(self, prompt: Prompt) -> AsyncGenerator[Event, None]:
        """Like `stream`, on an event loop. A tool that is no async function runs in a worker thread."""
        answer = self._answer(prompt)

        def start(conversation: Conversation, options: TurnOptions, sink: Sink) -> Generation:
            return self._model.start(conversation, options, sink=sink)

        while True:
            async with aclosing(aevents_of(partial(start, *answer.turn()))) as events:
                async for event in events:
                    if isinstance(event, Done):
                        answer.took(event)
                    else:
                        yield event
            if not answer.runs:
                break
            for call, tool in answer.runs:
                yield answer.result(await tool.arun(call))
        yield self._end(answer)

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

    def _answer(self, prompt: Prompt) -> _Answer:
        return _Answer(prompt, self.history, self._request, self._tools, self._max_steps)

    def _end(self, answer: _Answer) -> Done:
        """Let the history grow by an answer."""
        if self.history != answer.before:
            raise RequestError(
                "the chat's history was changed while it answered: ask one thing after the other, or make a "
                "chat for each",
                "history",
            )
        done = answer.done()
        self.history, self._request = answer.history, dict(answer.request)
        self.usage = Usage(
            self.usage.prompt_tokens + done.usage.prompt_tokens,
            self.usage.cached_tokens + done.usage.cached_tokens,
            self.usage.completion_tokens + done.usage.completion_tokens,
            self.usage.reasoning_tokens + done.usage.reasoning_tokens,
        )
        return done


class _Answer:
    """An answer under way: the history it began with, and what the model's turns and the tools add to it.

    runs: the calls to run before the next turn; none when the answer is whole.
    """

    def __init__(
        self,
        prompt: Prompt,
        before: Sequence[Message],
        request: Mapping[str, Any],
        tools: Sequence[RunnableTool],
        steps: int,
    ) -> None:
        instructions, said = read_prompt(prompt)
        if instructions is not None and before:
            said.insert(0, Message("developer", instructions))
            instructions = None
        self.before = list(before)
        self.history = [*before, *said]
        self.request = with_instructions(request, instructions)
        self.runs: list[tuple[ToolCall, RunnableTool]] = []
        self._said = len(self.history)
        self._tools = tools
        self._left = steps
        self._done: Done | None = None
        self._completion = self._reasoning = 0

    def turn(self) -> tuple[Conversation, TurnOptions]:
        """The model's next turn."""
        self._left -= 1
        return split_request(self.history, self.request)

    def took(self, done: Done) -> None:
        """Take in the end of the model's turn."""
        self._done = done
        self.history += done.reply.messages
        self._completion += done.usage.completion_tokens
        self._reasoning += done.usage.reasoning_tokens
        calls = [(call, tool_for(call, self._tools)) for call in done.reply.tool_calls]
        runs = [(call, tool) for call, tool in calls if tool is not None]
        goes_on = done.finish_reason == "tool_calls" and len(runs) == len(calls) and self._left
        self.runs = runs if goes_on else []

    def result(self, message: Message) -> MessageDone:
        """Take in the result of a call."""
        self.history.append(message)
        return MessageDone(message)

    def done(self) -> Done:
        """The end, with the messages of all turns and usage that adds them up."""
        assert self._done is not None
        usage = replace(
            self._done.usage, completion_tokens=self._completion, reasoning_tokens=self._reasoning
        )
        reply = replace(self._done.reply, messages=tuple(self.history[self._said :]), usage=usage)
        return Done(self._done.finish_reason, usage, reply)
