"""A stand-in for an LLM: replays scripted answers as harmony events, on a thread of its own.

The server's tests need to choose what the model says, when, and what goes wrong. `ScriptedLLM(write)` asks
`write(conversation, options)` for a Script (or an exception) for each generation; `answer` is a sensible
default that calls the first tool, reports its result, and fits a JSON schema.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlx_gptoss.chat.stops import UntilStop
from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.engine.request import TokenOutput, TokensDone
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.harmony import (
    Conversation,
    Done,
    Event,
    Message,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    ReplyBuilder,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from mlx_gptoss.model.config import read_config
from mlx_gptoss.sampling import PromptProgress, SamplingParams, TokenLogprobs
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tools import BUILTIN

DEMO = Path(str(files("mlx_gptoss"))) / "demo_model"
PIECE = 4  # characters in a delta


@dataclass
class Script:
    """One answer. `calls` are (name, arguments as JSON text). `fail_after`: raise after so many deltas.
    `reads`: how much of the prompt is told to be read, one after the other, to those who ask.
    """

    reasoning: str = "The user asks."
    preamble: str = ""
    calls: Sequence[tuple[str, str]] = ()
    text: str = ""
    finish_reason: str = "stop"
    reads: Sequence[PromptProgress] = ()
    delay: float = 0.0  # seconds before each delta
    gate: threading.Event | None = None  # waited for before the first delta
    pause: float = 0.0  # seconds after each of the reads
    fail_after: int | None = None
    cut: bool = False  # the text ended at a stop text
    failure: Exception = field(default_factory=lambda: GptOssError("the engine failed"))


Write = Callable[[Conversation, dict[str, Any]], "Script | Exception"]


def answer(conversation: Conversation, options: dict[str, Any]) -> Script:
    """Call the first tool once, then answer with its result; fit the schema when there is one."""
    last = conversation.messages[-1] if conversation.messages else Message.user("")
    choice = options["tool_choice"]
    if conversation.tools and choice != "none" and last.role == "user":
        named = choice[1] if isinstance(choice, tuple) else conversation.tools[0].name
        tool = next(tool for tool in conversation.tools if tool.name == named)
        arguments = json.dumps(instance(tool.parameters or {"type": "object"}))
        return Script(reasoning="I need the tool.", calls=[(named, arguments)])
    if options["schema"] is not None:
        return Script(text=json.dumps(instance(options["schema"])))
    if options["json_object"]:
        return Script(text='{"answer": 42}')
    if last.role == "tool":
        return Script(text=f"The tool says: {last.content}")
    return Script(text=f"You said: {last.content}")


def instance(schema: dict[str, Any]) -> Any:
    """Some value that fits a simple schema."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {name: instance(part) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [instance(schema.get("items", {}))]
        case "string":
            return "Paris"
        case "integer" | "number":
            return 7
        case "boolean":
            return True
    return None


def _pieces(text: str) -> list[str]:
    return [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


class _Thread:
    """A generation on its way. `cancelled` is set by the server."""

    def __init__(self, run: Callable[[_Thread], None], prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.cancelled = threading.Event()
        self.ended = threading.Event()
        self._run = run
        threading.Thread(target=self._go, daemon=True).start()

    def _go(self) -> None:
        try:
            self._run(self)
        finally:
            self.ended.set()

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass(frozen=True)
class ScriptedStats:
    """In the place of EngineStats."""

    running: int


class ScriptedLLM:
    """Takes the place of an LLM in the server.

    `seen` are the conversations and options it was given, `submitted` the params of raw tokens.
    """

    def __init__(self, tokenizer: Tokenizer, write: Write = answer, *, max_context: int = 4096) -> None:
        self.name = "scripted"
        self.folder = DEMO
        self.config = read_config(DEMO)[0]
        self.max_context = max_context
        self.adapters: tuple[str, ...] = ()
        self.tokenizer = tokenizer
        self.write = write
        self.seen: list[tuple[Conversation, dict[str, Any]]] = []
        self.submitted: list[SamplingParams] = []
        self.running: list[_Thread] = []
        self.closed = False
        self._calls = itertools.count(1)

    def close(self) -> None:
        self.closed = True

    def stats(self) -> ScriptedStats:
        return ScriptedStats(sum(not thread.ended.is_set() for thread in self.running))

    def start(
        self,
        conversation: Conversation,
        turn: TurnOptions,
        *,
        sink: Callable[[Any], None],
    ) -> _Thread:
        conversation.validate()
        shape, params = turn.response_format, turn.params
        options = {
            "params": params,
            "response_format": shape,
            "tool_choice": turn.tool_choice,
            "schema": shape.value if shape is not None and shape.kind == "schema" else None,
            "json_object": shape is not None and shape.kind == "json_object",
            "reasoning_budget": turn.reasoning_budget,
            "adapter": turn.adapter,
        }
        self.seen.append((conversation, options))
        script = self.write(conversation, options)
        if isinstance(script, Exception):
            raise script
        deltas, calls, found = self._deltas(script, params)
        usage = Usage(
            sum(len(m.content) for m in conversation.messages), 3, len(deltas), len(script.reasoning)
        )

        def run(thread: _Thread) -> None:
            for progress in script.reads if turn.progress else ():
                sink(progress)
                thread.cancelled.wait(script.pause)
            if script.gate is not None:
                script.gate.wait(60)
            builder = ReplyBuilder()
            reason = script.finish_reason if not calls or script.finish_reason != "stop" else "tool_calls"
            for count, event in enumerate(deltas):
                if script.delay:
                    time.sleep(script.delay)
                if thread.cancelled.is_set():
                    reason = "cancelled"
                    break
                if script.fail_after is not None and count >= script.fail_after:
                    sink(script.failure)
                    return
                builder.add([event])
                sink(event)
            stop_text = params.stop[-1] if script.cut and params.stop else found
            reply = builder.build(reason, usage, None, stop_text)  # type: ignore[arg-type]
            sink(Done(reason, usage, reply))  # type: ignore[arg-type]

        thread = _Thread(run, usage.prompt_tokens)
        self.running.append(thread)
        return thread

    def _deltas(
        self, script: Script, params: SamplingParams
    ) -> tuple[list[Event], list[ToolCall], str | None]:
        """All events but the last, the calls among them, and the stop text that ended them."""
        events: list[Event] = []
        calls: list[ToolCall] = []
        until = UntilStop(params.stop)

        def say(kind: Any, message: Message) -> None:
            if not message.content:
                return
            for piece in _pieces(message.content):
                events.append(kind(piece))
            end(message)

        def end(message: Message) -> None:
            cut = (script.cut or until.over) and message.channel == "final"
            tokens = None if cut else tuple(self.tokenizer.encode(message.content))
            sampled = Message(**{**vars(message), "token_ids": tokens})
            events.append(MessageDone(sampled))

        say(ReasoningDelta, Message.reasoning(script.reasoning))
        say(PreambleDelta, Message.preamble(script.preamble))
        for index, (name, arguments) in enumerate(script.calls):
            call_id = f"call_{next(self._calls)}"
            builtin = name.split(".")[0] in BUILTIN
            recipient = name if builtin else f"functions.{name}"
            calls.append(ToolCall(index, call_id, name, arguments, recipient))
            events.append(ToolCallDelta(index, call_id, name, ""))
            events += [ToolCallDelta(index, call_id, name, piece) for piece in _pieces(arguments)]
            events.append(calls[-1])
            call = Message.tool_call(name, arguments, call_id)
            end(replace(call, recipient=name, channel="analysis") if builtin else call)
        said = ""
        for piece in _pieces(script.text):
            delta = self._scored(piece) if params.logprobs is not None else TextDelta(piece)
            delta = replace(delta, text=until.push(piece))
            said += delta.text
            events += [delta] if delta.text or delta.logprobs else []
        if rest := until.finish():
            said += rest
            events.append(TextDelta(rest))
        if script.text:
            end(Message.assistant(said))
        if script.finish_reason == "length":  # the last message broke off
            last = events.pop()
            assert isinstance(last, MessageDone)
            events.append(replace(last, ended=False))
            if script.calls and not script.text:
                del events[-2]  # no ToolCall comes of it
        return events, calls, until.found

    def _scored(self, piece: str) -> TextDelta:
        logprobs = tuple(
            (token, TokenLogprobs(-0.5, ((token, -0.5),))) for token in self.tokenizer.encode(piece)
        )
        return TextDelta(piece, logprobs)

    def score(
        self,
        token_ids: Sequence[int],
        top: int = 0,
        *,
        keep: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[TokenLogprobs]:
        """The second token has -0.5, and every other half more."""
        return [
            TokenLogprobs(-0.5 * place, ((token, -0.5 * place),) if top else ())
            for place, token in enumerate(token_ids[1:], start=1)
        ]

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams = SamplingParams(),  # noqa: B008  (frozen)
        *,
        constraint: Any = None,
        sink: Callable[[Any], None],
        adapter: str | None = None,
    ) -> _Thread:
        """Raw tokens: the alphabet, over and over."""
        self.submitted.append(params)
        limit = params.max_tokens or 16

        def run(thread: _Thread) -> None:
            for count in range(limit):
                if limit > 1000 or params.logprobs is not None:
                    time.sleep(0.002)  # to be cancelled in between, or to come one at a time
                if thread.cancelled.is_set():
                    sink(TokensDone("cancelled", len(token_ids), 0, count))
                    return
                token = ord("a") + count % 26
                scores = TokenLogprobs(-0.25, ((token, -0.25),)) if params.logprobs is not None else None
                sink(TokenOutput(token, scores))
            sink(TokensDone("length", len(token_ids), 0, limit))

        thread = _Thread(run, len(token_ids))
        self.running.append(thread)
        return thread
