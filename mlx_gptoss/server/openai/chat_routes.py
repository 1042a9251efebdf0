"""POST /v1/chat/completions: OpenAI's chat API, streamed and not."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.errors import RequestError, SchemaError, ToolError
from mlx_gptoss.grammar import ResponseFormat, ToolChoice
from mlx_gptoss.harmony import (
    Conversation,
    Done,
    PreambleDelta,
    ReasoningDelta,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.http.errors import error_body
from mlx_gptoss.server.http.openapi import ERRORS
from mlx_gptoss.server.memory.turns import AssistantTurn, Call, digest
from mlx_gptoss.server.openai.chat_request import ChatMessage, ChatRequest, naming, text_of, tool_fields
from mlx_gptoss.server.running import sse
from mlx_gptoss.server.running.jobs import Job
from mlx_gptoss.server.running.streams import collect, log_failure
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.options import (
    ConversationBuilder,
    check_schema_size,
    check_tool_count,
    choose_tools,
    effort_of,
    function_tool,
    logit_bias,
    sampling_params,
    stop_texts,
)

if TYPE_CHECKING:
    from mlx_gptoss.tokenizer import Tokenizer

SCHEMA_FIELD = "response_format.json_schema.schema"
FINGERPRINT = f"mlx_gptoss-{version('mlx-gptoss')}"


@dataclass
class ChatPlan:
    """A chat request, translated: what the engine is asked for. `fields` are the request's names for it."""

    conversation: Conversation
    params: SamplingParams
    tool_choice: ToolChoice
    fields: dict[str, str]
    schema: dict[str, Any] | None = None
    json_object: bool = False
    strict: bool = False

    @property
    def structured(self) -> bool:
        return self.schema is not None or self.json_object


def plan(request: ChatRequest, state: ServerState) -> ChatPlan:
    """Translate a request. Raises RequestError naming the field at fault."""
    request.refuse_unsupported()
    settings = state.settings
    if len(request.messages) > settings.max_messages:
        raise RequestError(
            f"messages has {len(request.messages):,} entries and this server takes {settings.max_messages:,}",
            "messages",
        )
    builder = ConversationBuilder(state.turns)
    for index, message in enumerate(request.messages):
        _add_message(builder, message, f"messages[{index}]")
    tools, choice = choose_tools(request.tool_choice, _tools(request, state))
    schema, name, json_object = _response_format(request, state)
    conversation = builder.build(
        tools=tools,
        effort=effort_of(request.reasoning_effort, "reasoning_effort"),
        schema=schema,
        schema_name=name,
        today=state.today(),
    )
    declared = [tool.function.name if tool.function else None for tool in request.tools or ()]
    fields = {"schema": SCHEMA_FIELD, **tool_fields(tools, declared, "function.parameters")}
    wanted = request.response_format.json_schema if request.response_format else None
    strict = wanted is not None and wanted.strict is True
    return ChatPlan(conversation, _params(request), choice, fields, schema, json_object, strict)


def _add_message(builder: ConversationBuilder, message: ChatMessage, where: str) -> None:
    text = text_of(message.content, f"{where}.content")
    if message.role in ("system", "developer"):
        builder.instructions(text)
    elif message.role == "user":
        builder.user(text)
    elif message.role == "tool":
        builder.tool_result(message.tool_call_id, text, f"{where}.tool_call_id")
    else:
        calls = []
        for index, call in enumerate(message.tool_calls or ()):
            if call.type != "function" or call.function is None:
                raise ToolError(
                    f"{where}.tool_calls[{index}] is of type {call.type[:40]!r}: expected a function call",
                    f"{where}.tool_calls[{index}].type",
                )
            calls.append(Call(call.id, call.function.name, call.function.arguments))
        reasoning = message.reasoning or message.reasoning_content or ""
        text = text or message.refusal or ""
        builder.assistant(
            AssistantTurn(reasoning, preamble=text, calls=calls)
            if calls
            else AssistantTurn(reasoning, text=text)
        )


def _tools(request: ChatRequest, state: ServerState) -> list[Tool]:
    declared = request.tools or []
    check_tool_count(len(declared), state.settings)
    tools = []
    for index, tool in enumerate(declared):
        if tool.type != "function" or tool.function is None:
            raise ToolError(
                f"tools[{index}] is of type {tool.type[:40]!r}: only function tools are supported here",
                f"tools[{index}].type",
            )
        tools.append(function_tool(tool.function.model_dump(), state.settings, f"tools[{index}].function"))
    return tools


def _response_format(
    request: ChatRequest, state: ServerState
) -> tuple[dict[str, Any] | None, str | None, bool]:
    """(schema, its name, whether any JSON object is asked for)"""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None, None, False
    if wanted.type == "json_object":
        return None, None, True
    if wanted.json_schema is None:
        raise RequestError(
            "response_format.json_schema is missing: give {'name': …, 'schema': …}",
            "response_format.json_schema",
        )
    schema = wanted.json_schema.schema_
    check_schema_size(schema, state.settings, SCHEMA_FIELD)
    return schema, wanted.json_schema.name, False


def _params(request: ChatRequest) -> SamplingParams:
    limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    return sampling_params(
        {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "seed": request.seed,
            "max_tokens": getattr(request, limit),
            "logit_bias": logit_bias(request.logit_bias),
            "stop": stop_texts(request.stop),
            "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        },
        {"max_tokens": limit, "logprobs": "top_logprobs"},
    )


class AnswerScores:
    """The log-probabilities of an answer's tokens, given out as far as its text is.

    Text that a stop text may begin with is held back by the engine, and the scores of its tokens are not.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._letters = tokenizer.detokenizer()
        self._shown = 0
        self._scored = 0
        self._held: list[tuple[int, dict[str, Any]]] = []

    def take(self, delta: TextDelta) -> list[dict[str, Any]]:
        """The entries whose text has begun, this delta's included."""
        self._shown += len(delta.text)
        for token_id, logprobs in delta.logprobs or ():
            self._held.append((self._scored, logprob_entry(self._tokenizer, token_id, logprobs)))
            self._scored += len(self._letters.push(token_id))
        count = sum(start < self._shown for start, _ in self._held)
        ready = [entry for _, entry in self._held[:count]]
        del self._held[:count]
        return ready


@dataclass
class Choice:
    """One answer as it comes: takes harmony events, gives OpenAI's deltas, and adds up to a message.

    A preamble is part of the content, as it is meant for the user; where a format was asked for it goes to
    the reasoning, because the content must be nothing but that format.
    """

    scores: AnswerScores | None
    structured: bool
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    done: Done | None = None
    _after_preamble: bool = False

    def take(self, event: Any) -> tuple[dict[str, Any], list[dict[str, Any]] | None] | None:
        """The delta of an event with its log-probabilities, or None when it has no delta."""
        match event:
            case ReasoningDelta():
                return self._reason(event.text), None
            case PreambleDelta() if self.structured:
                return self._reason(event.text), None
            case PreambleDelta():
                self._after_preamble = True
                return self._say(event.text), None
            case TextDelta():
                entries = self.scores.take(event) if self.scores is not None else None
                if not event.text and not entries:
                    return None
                text = "\n\n" + event.text if self._after_preamble else event.text
                self._after_preamble = False
                self.logprobs += entries or ()
                return self._say(text), entries
            case ToolCallDelta(arguments=""):
                self.calls.append(ToolCall(event.index, event.call_id, event.name, ""))
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": event.call_id, "type": "function", "function": function}
                return {"tool_calls": [call]}, None
            case ToolCallDelta():
                begun = self.calls[-1]
                self.calls[-1] = replace(begun, arguments=begun.arguments + event.arguments)
                call = {"index": event.index, "function": {"arguments": event.arguments}}
                return {"tool_calls": [call]}, None
            case Done():
                self.done = event
        return None

    def _say(self, text: str) -> dict[str, Any]:
        self.content.append(text)
        return {"content": text}

    def _reason(self, text: str) -> dict[str, Any]:
        self.reasoning.append(text)
        return {"reasoning": text, "reasoning_content": text}

    @property
    def finish_reason(self) -> str:
        """OpenAI's reason: what was cancelled from outside has, for its client, just stopped."""
        reason = self.done.finish_reason if self.done else "stop"
        return "stop" if reason == "cancelled" else reason

    def body(self, index: int) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        content = "".join(self.content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not content else content,
            "refusal": None,
            "annotations": [],
        }
        if self.reasoning:
            message |= dict.fromkeys(("reasoning", "reasoning_content"), "".join(self.reasoning))
        if self.calls:
            message["tool_calls"] = [
                {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.calls
            ]
        logprobs = {"content": self.logprobs, "refusal": None} if self.logprobs else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }


def logprob_entry(tokenizer: Tokenizer, token_id: int, logprobs: Any) -> dict[str, Any]:
    """A token with its log-probability and its alternatives, in OpenAI's shape."""

    def entry(one: int, logprob: float) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(one)
        # JSON has no infinity: a token that a constraint ruled out has OpenAI's stand-in for "never".
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(spelled),
        }

    return entry(token_id, logprobs.logprob) | {"top_logprobs": [entry(*pair) for pair in logprobs.top]}


def usage_body(choices: list[Choice]) -> dict[str, Any]:
    """Token counts; a prompt shared by several choices is counted once."""
    usages = [choice.done.usage if choice.done else Usage() for choice in choices]
    prompt = usages[0].prompt_tokens
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)},
    }


def remember(state: ServerState, choice: Choice, conversation: Conversation) -> None:
    """Keep the sampled tokens of a finished answer for when its text comes back as history."""
    if choice.done is not None and choice.done.finish_reason in ("stop", "tool_calls"):
        state.turns.remember(choice.done.reply.messages, "".join(choice.content), digest(conversation))


async def start(chat: ChatPlan, state: ServerState, count: int) -> Job:
    """Start the generations of a request; several answers with a seed get one seed each."""
    engine = state.ready()

    def begin(index: int, sink: Any) -> Any:
        params = chat.params
        if index and params.seed is not None:
            params = SamplingParams(**{**vars(params), "seed": params.seed + index})
        shape = ResponseFormat.of(schema=chat.schema, json_object=chat.json_object)
        options = TurnOptions(params, shape, chat.tool_choice, strict_tools=False)
        return engine.start(chat.conversation, options, sink=sink)

    try:
        with naming(chat.fields):
            return await state.jobs.start(*(partial(begin, index) for index in range(count)))
    except SchemaError as error:
        if chat.strict or chat.schema is None or error.field != SCHEMA_FIELD:
            raise
        # The prompt shows the schema, and without `strict` no more than an object was promised.
        chat.schema, chat.json_object = None, True
        return await start(chat, state, count)


def router(state: ServerState) -> APIRouter:
    """The route, bound to a server."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", responses=ERRORS, response_model=None)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        engine = state.ready()
        count = body.n or 1
        if count > state.settings.max_choices:
            raise RequestError(f"n is {count}: this server takes at most {state.settings.max_choices}", "n")
        chat = plan(body, state)
        choices = [
            Choice(AnswerScores(engine.tokenizer) if body.logprobs else None, chat.structured)
            for _ in range(count)
        ]
        job = await start(chat, state, count)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": state.model_name}
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            chunks = _stream(state, chat.conversation, job, choices, head, include_usage)
            return sse.EventStream(chunks, job)
        await collect(job, request, lambda index, event: choices[index].take(event))
        for choice in choices:
            remember(state, choice, chat.conversation)
        return JSONResponse(
            head
            | {
                "object": "chat.completion",
                "choices": [choice.body(index) for index, choice in enumerate(choices)],
                "usage": usage_body(choices),
                "service_tier": "default",
                "system_fingerprint": FINGERPRINT,
            }
        )

    return routes


async def _stream(
    state: ServerState,
    conversation: Conversation,
    job: Job,
    choices: list[Choice],
    head: dict[str, Any],
    include_usage: bool,
) -> AsyncIterator[bytes]:
    """The chunks of a streamed answer: roles, deltas, finish reasons, usage, [DONE]."""
    opening = sse.dumps(head | {"object": "chat.completion.chunk", "system_fingerprint": FINGERPRINT})[:-1]
    ending = ',"usage":null}\n\n' if include_usage else "}\n\n"

    def chunk(
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        reason: str | None = None,
    ) -> bytes:
        scored = None if logprobs is None else {"content": logprobs, "refusal": None}
        choice = {"index": index, "delta": delta, "logprobs": scored, "finish_reason": reason}
        return f'data: {opening},"choices":[{sse.dumps(choice)}]{ending}'.encode()

    yield b"".join(
        chunk(index, {"role": "assistant", "content": "", "refusal": None}) for index in range(len(choices))
    )
    try:
        async for batch in job.batches():
            out = [] if batch else [sse.HEARTBEAT]
            for index, event in batch:
                delta = choices[index].take(event)
                if delta is not None:
                    out.append(chunk(index, *delta))
                if isinstance(event, Done):
                    remember(state, choices[index], conversation)
                    out.append(chunk(index, {}, reason=choices[index].finish_reason))
            if out:
                yield b"".join(out)
        if include_usage:
            usage = sse.dumps(usage_body(choices))
            yield f'data: {opening},"choices":[],"usage":{usage}}}\n\n'.encode()
        yield sse.DONE
    except Exception as error:
        yield sse.data(error_body(log_failure(error)))
