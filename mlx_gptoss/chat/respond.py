"""What can be asked of a model: an answer, a stream, many answers, a chat; plain, and on an event loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from mlx_gptoss.chat.generation import Generation
from mlx_gptoss.chat.many import Begin, areplies_of, replies_of
from mlx_gptoss.chat.messages import Prompt, read_prompt
from mlx_gptoss.chat.prompt import RequestKeywords, split_request, with_instructions
from mlx_gptoss.chat.session import Session
from mlx_gptoss.chat.turn import TurnOptions, aevents_of, areply_of, events_of
from mlx_gptoss.engine.core import Engine
from mlx_gptoss.engine.request import Sink
from mlx_gptoss.errors import RequestError
from mlx_gptoss.harmony import Conversation, Done, Event, Reply
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tools.call import ToolLike

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import TypeForm

Parsed = TypeVar("Parsed")


class Responder(ABC):
    """A model that answers. What it needs for that: an engine, a tokenizer, and to start a turn."""

    engine: Engine

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    @abstractmethod
    def start(
        self, conversation: Conversation, options: TurnOptions | None = None, *, sink: Sink | None = None
    ) -> Generation:
        """Queue the assistant's next turn of a conversation and return at once."""

    @overload
    def respond(
        self,
        prompt: Prompt,
        *,
        schema: TypeForm[Parsed],
        tools: Sequence[ToolLike] = ...,
        **request: Unpack[RequestKeywords],
    ) -> Reply[Parsed]: ...

    @overload
    def respond(
        self,
        prompt: Prompt,
        *,
        schema: Mapping[str, Any] | None = ...,
        tools: Sequence[ToolLike] = ...,
        **request: Unpack[RequestKeywords],
    ) -> Reply[Any]: ...

    def respond(
        self,
        prompt: Prompt,
        *,
        schema: Any = None,
        tools: Sequence[ToolLike] = (),
        **request: Unpack[RequestKeywords],
    ) -> Reply[Any]:
        """Answer a text or a list of messages (Messages, or dicts as in OpenAI's chat): the whole reply.

        schema: what the answer follows, a JSON schema or a type: a pydantic model, dataclass, TypedDict,
        enum, Literal, list[int] and so on; `reply.parsed` is its data. tools: Tools, functions or dicts; they
        are declared, not run (see `chat`). The rest: see RequestKeywords. A reply that `max_tokens` cuts, or
        the bound in its place, has the finish_reason "length".

        Raises RequestError (SchemaError, ToolError), ContextLengthError, TokenizerError or BusyError.
        """
        *_, done = self.stream(prompt, schema=schema, tools=tools, **request)
        assert isinstance(done, Done)
        return done.reply

    def stream(
        self,
        prompt: Prompt,
        *,
        schema: Any = None,
        tools: Sequence[ToolLike] = (),
        **request: Unpack[RequestKeywords],
    ) -> Iterator[Event]:
        """Like `respond`, as events: ReasoningDelta, TextDelta, ToolCallDelta, ToolCall, .., and last Done.

        With progress=True a PromptProgress comes as each part of the prompt is read. The request is checked
        and started at once; leaving the iteration cancels it.
        """
        return events_of(self.start(*_turn(prompt, {**request, "schema": schema, "tools": tools})))

    @overload
    def respond_many(
        self,
        prompts: Iterable[Prompt],
        *,
        schema: TypeForm[Parsed],
        tools: Sequence[ToolLike] = ...,
        max_concurrency: int | None = ...,
        **request: Unpack[RequestKeywords],
    ) -> Iterator[tuple[int, Reply[Parsed]]]: ...

    @overload
    def respond_many(
        self,
        prompts: Iterable[Prompt],
        *,
        schema: Mapping[str, Any] | None = ...,
        tools: Sequence[ToolLike] = ...,
        max_concurrency: int | None = ...,
        **request: Unpack[RequestKeywords],
    ) -> Iterator[tuple[int, Reply[Any]]]: ...

    def respond_many(
        self,
        prompts: Iterable[Prompt],
        *,
        schema: Any = None,
        tools: Sequence[ToolLike] = (),
        max_concurrency: int | None = None,
        **request: Unpack[RequestKeywords],
    ) -> Iterator[tuple[int, Reply[Any]]]:
        """Answer many prompts, batched: (index, reply) in the order of their ends, the index its prompt's.

        prompts are taken as there is room. max_concurrency: prompts under way at a time (default: twice
        `max_running`, which keeps the batch full). Leaving the iteration cancels what runs. What is wrong
        with the arguments is raised at once; prompts that fail end no others: BatchError tells of them after
        the last reply. The rest is as for `respond`.
        """
        asked = {**request, "schema": schema, "tools": tools}
        return replies_of(self._begin(asked), prompts, self._concurrency(max_concurrency))

    @overload
    def chat(
        self,
        *,
        schema: TypeForm[Parsed],
        tools: Sequence[ToolLike] = ...,
        max_steps: int = ...,
        **request: Unpack[RequestKeywords],
    ) -> Session[Parsed]: ...

    @overload
    def chat(
        self,
        *,
        schema: Mapping[str, Any] | None = ...,
        tools: Sequence[ToolLike] = ...,
        max_steps: int = ...,
        **request: Unpack[RequestKeywords],
    ) -> Session[Any]: ...

    def chat(
        self,
        *,
        schema: Any = None,
        tools: Sequence[ToolLike] = (),
        max_steps: int = 8,
        **request: Unpack[RequestKeywords],
    ) -> Session[Any]:
        """A conversation that keeps its timeline and runs its tools; see Session, also for asyncio."""
        return Session(self, schema=schema, tools=tools, max_steps=max_steps, **request)

    # --- on an event loop

    @overload
    async def arespond(
        self,
        prompt: Prompt,
        *,
        schema: TypeForm[Parsed],
        tools: Sequence[ToolLike] = ...,
        **request: Unpack[RequestKeywords],
    ) -> Reply[Parsed]: ...

    @overload
    async def arespond(
        self,
        prompt: Prompt,
        *,
        schema: Mapping[str, Any] | None = ...,
        tools: Sequence[ToolLike] = ...,
        **request: Unpack[RequestKeywords],
    ) -> Reply[Any]: ...

    async def arespond(
        self,
        prompt: Prompt,
        *,
        schema: Any = None,
        tools: Sequence[ToolLike] = (),
        **request: Unpack[RequestKeywords],
    ) -> Reply[Any]:
        """`respond` for asyncio (and anyio on it). Cancelling the task that waits cancels the generation."""
        conversation, options = _turn(prompt, {**request, "schema": schema, "tools": tools})
        return await areply_of(lambda sink: self.start(conversation, options, sink=sink))

    def astream(
        self,
        prompt: Prompt,
        *,
        schema: Any = None,
        tools: Sequence[ToolLike] = (),
        **request: Unpack[RequestKeywords],
    ) -> AsyncGenerator[Event, None]:
        """`stream` for asyncio: checked at once, started by the first step of the iteration.

        Leaving the iteration, or cancelling its task, cancels the generation.
        """
        conversation, options = _turn(prompt, {**request, "schema": schema, "tools": tools})
        return aevents_of(lambda sink: self.start(conversation, options, sink=sink))

    @overload
    def arespond_many(
        self,
        prompts: Iterable[Prompt],
        *,
        schema: TypeForm[Parsed],
        tools: Sequence[ToolLike] = ...,
        max_concurrency: int | None = ...,
        **request: Unpack[RequestKeywords],
    ) -> AsyncGenerator[tuple[int, Reply[Parsed]], None]: ...

    @overload
    def arespond_many(
        self,
        prompts: Iterable[Prompt],
        *,
        schema: Mapping[str, Any] | None = ...,
        tools: Sequence[ToolLike] = ...,
        max_concurrency: int | None = ...,
        **request: Unpack[RequestKeywords],
    ) -> AsyncGenerator[tuple[int, Reply[Any]], None]: ...

    def arespond_many(
        self,
        prompts: Iterable[Prompt],
        *,
        schema: Any = None,
        tools: Sequence[ToolLike] = (),
        max_concurrency: int | None = None,
        **request: Unpack[RequestKeywords],
    ) -> AsyncGenerator[tuple[int, Reply[Any]], None]:
        """`respond_many` for asyncio; cancelling the task that waits cancels what runs."""
        asked = {**request, "schema": schema, "tools": tools}
        return areplies_of(self._begin(asked), prompts, self._concurrency(max_concurrency))

    def _begin(self, asked: dict[str, Any]) -> Begin:
        split_request([], asked)  # raises what is wrong with every prompt
        return lambda prompt, sink: self.start(*_turn(prompt, asked), sink=sink)

    def _concurrency(self, asked: int | None) -> int:
        if asked is None:
            return 2 * self.engine.options.max_running
        if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
            raise RequestError(
                f"max_concurrency is {asked!r}: expected a whole number >= 1", "max_concurrency"
            )
        return asked


def _turn(prompt: Prompt, asked: dict[str, Any]) -> tuple[Conversation, TurnOptions]:
    """A prompt and the keyword arguments beside it, as the turn that they ask for."""
    instructions, messages = read_prompt(prompt)
    return split_request(messages, with_instructions(asked, instructions))
