"""The assistant's next turn: a conversation to tokens, tokens to events."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field, replace

from mlx_gptoss.chat.generation import Generation
from mlx_gptoss.engine.core import Engine
from mlx_gptoss.engine.handoff import Handoff
from mlx_gptoss.engine.request import Sink
from mlx_gptoss.grammar import ResponseFormat, ToolChoice, compile_constraint
from mlx_gptoss.harmony import Conversation, Done, Event, ReasoningEffort, Reply, render
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.tokenizer import Tokenizer

# Tokens of a turn at most, where nothing else is said. High effort takes the most: of the 30 problems of AIME
# 2025 a bound of 32k cut four to five short, 64k only the longest (tenstorrent/tt-inference-server, #2825). A
# model that runs in circles stops there, not at the end of its context.
MAX_TOKENS: dict[ReasoningEffort | None, int] = {"low": 8_192, "medium": 32_768, "high": 65_536, None: 32_768}


@dataclass(frozen=True)
class TurnOptions:
    """How a turn is generated.

    params: without max_tokens a turn has those of MAX_TOKENS for its effort, or the model's own where that is
    less. response_format: what the answer must be. tool_choice: "auto", "none", "required", or ("named", a
    tool's name). strict_tools: False lets a call's arguments be any JSON object where the tool's schema
    cannot be enforced. reasoning_budget: analysis tokens at most. progress: PromptProgress comes before the
    other events. adapter: the name of the loaded adapter that answers, "base" for none (default: the
    engine's).
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    response_format: ResponseFormat | None = None
    tool_choice: ToolChoice = "auto"
    strict_tools: bool = True
    reasoning_budget: int | None = None
    progress: bool = False
    adapter: str | None = None


def start_turn(
    engine: Engine,
    tokenizer: Tokenizer,
    conversation: Conversation,
    options: TurnOptions,
    sink: Sink | None = None,
    *,
    max_tokens: int | None = None,
) -> Generation:
    """Queue the next turn and return at once. With a `sink` the events go there, on the engine's thread.

    max_tokens: the model's own bound where the options have none.
    Raises RequestError (SchemaError, ToolError), ContextLengthError or BusyError.
    """
    params, response_format = options.params, options.response_format
    if params.max_tokens is None:
        bound = MAX_TOKENS.get(conversation.reasoning_effort, MAX_TOKENS[None])
        params = replace(params, max_tokens=bound if max_tokens is None else min(bound, max_tokens))
    constraint = compile_constraint(
        tokenizer,
        tools=conversation.tools,
        builtin=conversation.builtin,
        tool_choice=options.tool_choice,
        strict_tools=options.strict_tools,
        response_format=response_format,
        reasoning_budget=options.reasoning_budget,
        called=any(m.role == "assistant" and m.recipient for m in conversation.messages),
    )

    def prepare(reply: Reply) -> None:
        """Have the history that the next turn will render, without analysis, read in a quiet moment."""
        if reply.finish_reason == "stop" and reply.usage.reasoning_tokens:
            history = replace(conversation, messages=[*conversation.messages, *reply.messages])
            engine.prefill_when_idle(
                lambda: render(history, tokenizer, for_completion=False), options.adapter
            )

    generation = Generation(
        tokenizer,
        stop=params.stop,
        want_logprobs=params.logprobs is not None,
        parse=response_format.parse if response_format is not None and response_format.is_json else None,
        sink=sink,
        on_done=prepare,
    )
    tokens = render(conversation, tokenizer, limit=engine.max_context)
    stream = engine.submit(
        tokens,
        params,
        constraint=constraint,
        sink=generation.take,
        progress=generation.take if options.progress else None,
        adapter=options.adapter,
    )
    generation.attach(stream)
    return generation


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


async def aevents_of(start: Callable[[Sink], Generation]) -> AsyncGenerator[Event, None]:
    """The events of a generation on the event loop, started there; leaving the iteration cancels it."""
    handoff = Handoff()
    try:
        await handoff.begin(0, start)
        while True:
            for _, item in handoff.take():
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Done):
                    return
            await handoff.wait()
    finally:
        handoff.cancel()


async def areply_of(start: Callable[[Sink], Generation]) -> Reply:
    """The whole reply of a generation on the event loop; cancelling the task that waits cancels it."""
    handoff = Handoff()
    try:
        await handoff.begin(0, lambda sink: start(ends_only(sink)))
        await handoff.wait()
        ((_, end),) = handoff.take()
        if isinstance(end, Exception):
            raise end
        reply: Reply = end.reply
        return reply
    finally:
        handoff.cancel()


def ends_only(sink: Sink) -> Sink:
    """A sink that passes on the end of a generation, a Done or an exception, and nothing else."""
    return lambda item: sink(item) if isinstance(item, Done | Exception) else None
