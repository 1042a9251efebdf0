"""Session: a conversation that keeps its history as tokens, and runs tools: Python functions and built-ins.

What the model sampled is never rendered again from text, so the engine finds the whole conversation in its
prefix store at every turn, also after `undo`, `rewind` or an edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar, Unpack

from mlx_gptoss.chat.generation import Generation
from mlx_gptoss.chat.prompt import Prompt, RequestKeywords, as_messages, split_request
from mlx_gptoss.chat.turn import TurnOptions, events_of
from mlx_gptoss.errors import RequestError
from mlx_gptoss.grammar import Schema
from mlx_gptoss.harmony import Conversation, Done, Event, Message, MessageDone, Reply, Usage, render
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tools.call import RunnableTool, ToolLike, as_tool, tool_for

Parsed = TypeVar("Parsed")


class ChatModel(Protocol):
    """What a session needs of a model."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def start(self, conversation: Conversation, options: TurnOptions) -> Generation: ...


class Session(Generic[Parsed]):
    """One conversation with a model.

    tools: Python functions and built-in tools (mlx_gptoss.tools) are run and their results given back to the
    model, at most `max_steps` model turns for one answer; an exception becomes the call's result. Other
    tools are left to the caller: the reply holds their calls, and `send` takes their results as messages.
    The other arguments are those of LLM.respond, for every turn.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        tools: Sequence[ToolLike] = (),
        schema: Schema | None = None,
        max_steps: int = 8,
        **request: Unpack[RequestKeywords],
    ) -> None:
        if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
            raise RequestError(f"max_steps is {max_steps!r}: expected a whole number >= 1", "max_steps")
        self.history: list[Message] = []
        self.usage = Usage()
        self._model = model
        declared = [as_tool(item) for item in tools]
        self._tools = [tool for tool in declared if isinstance(tool, RunnableTool)]
        self._max_steps = max_steps
        self._request: dict[str, Any] = {**request, "tools": declared, "schema": schema}
        self._split([])

    @property
    def tokens(self) -> list[int]:
        """The conversation so far as the next turn will render it."""
        conversation, _ = self._split(self.history)
        return render(conversation, self._model.tokenizer, for_completion=False)

    def send(self, prompt: Prompt) -> Reply[Parsed]:
        """Say something (or give messages, such as tool results); the whole reply."""
        reply: Reply[Parsed] | None = None
        for event in self.stream(prompt):
            if isinstance(event, Done):
                reply = event.reply
        assert reply is not None
        return reply

    def stream(self, prompt: Prompt) -> Iterator[Event]:
        """Like `send`, as events; results of tools that were run come as MessageDone.

        The last is one Done: its reply has the messages of all steps, and usage that adds them up (of the
        prompt, the last step's). The history grows when the turn is over: leaving the iteration early, or
        an error, leaves it as it was.
        """
        history = [*self.history, *as_messages(prompt)]
        said = len(history)
        completion = reasoning = 0
        for left in reversed(range(self._max_steps)):
            conversation, options = self._split(history)
            for event in events_of(self._model.start(conversation, options)):
                if isinstance(event, Done):
                    done = event
                else:
                    yield event
            history += done.reply.messages
            completion += done.usage.completion_tokens
            reasoning += done.usage.reasoning_tokens
            calls = [(call, tool_for(call, self._tools)) for call in done.reply.tool_calls]
            runs = [(call, tool) for call, tool in calls if tool is not None]
            if done.finish_reason != "tool_calls" or len(runs) < len(calls) or not left:
                break
            for call, tool in runs:
                result = tool.run(call)
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

    def _split(self, history: Sequence[Message]) -> tuple[Conversation, TurnOptions]:
        return split_request(history, self._request)
