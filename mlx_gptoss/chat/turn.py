"""The assistant's next turn: a conversation to tokens, tokens to events."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mlx_gptoss.chat.generation import Generation
from mlx_gptoss.engine.core import Engine
from mlx_gptoss.engine.request import Sink
from mlx_gptoss.grammar import ResponseFormat, ToolChoice, compile_constraint
from mlx_gptoss.harmony import Conversation, Event, Reply, render
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.tokenizer import Tokenizer


@dataclass(frozen=True)
class TurnOptions:
    """How a turn is generated.

    response_format: what the answer must be. tool_choice: "auto", "none", "required", or ("named", a tool's
    name). strict_tools: False lets a call's arguments be any JSON object where the tool's schema cannot be
    enforced. reasoning_budget: analysis tokens at most. progress: PromptProgress comes before the events.
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    response_format: ResponseFormat | None = None
    tool_choice: ToolChoice = "auto"
    strict_tools: bool = True
    reasoning_budget: int | None = None
    progress: bool = False


def start_turn(
    engine: Engine,
    tokenizer: Tokenizer,
    conversation: Conversation,
    options: TurnOptions,
    sink: Sink | None = None,
) -> Generation:
    """Queue the next turn and return at once. With a `sink` the events go there, on the engine's thread.

    Raises RequestError (SchemaError, ToolError), ContextLengthError or BusyError.
    """
    params, response_format = options.params, options.response_format
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
            engine.prefill_when_idle(lambda: render(history, tokenizer, for_completion=False))

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
        tokens, params, constraint=constraint, sink=generation.take, progress=options.progress
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
