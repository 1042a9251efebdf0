"""From harmony events to the choices of a chat completion, and to the deltas of its stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_gptoss.harmony import (
    Done,
    PreambleDelta,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from mlx_gptoss.server.openai.chat_request import ChatRequest
from mlx_gptoss.server.openai.choices_writer import ChoicesWriter, usage_body
from mlx_gptoss.server.openai.logprobs import AnswerScores
from mlx_gptoss.server.running.answer import Json
from mlx_gptoss.tokenizer import Tokenizer


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
    logprobs: list[Json] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    finish_reason: str | None = None
    _after_preamble: bool = False

    def take(self, event: Any) -> tuple[Json, list[Json] | None] | None:
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
                self.usage = event.usage
                # What was cancelled from outside has, for its client, just stopped.
                self.finish_reason = "stop" if event.finish_reason == "cancelled" else event.finish_reason
                return {}, None
        return None

    def _say(self, text: str) -> Json:
        self.content.append(text)
        return {"content": text}

    def _reason(self, text: str) -> Json:
        self.reasoning.append(text)
        return {"reasoning": text, "reasoning_content": text}

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.content)

    def message(self) -> Json:
        """The message of a response that is not streamed."""
        message: Json = {
            "role": "assistant",
            "content": self.text or (None if self.calls else ""),
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
        return message


def _scores(entries: list[Json] | None) -> Json | None:
    return None if entries is None else {"content": entries, "refusal": None}


class ChatWriter(ChoicesWriter):
    """A chat completion. structured: its content has to follow a format."""

    def __init__(self, request: ChatRequest, model: str, tokenizer: Tokenizer, *, structured: bool) -> None:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        super().__init__("chatcmpl", kind, model, request)
        self.choices = [
            Choice(AnswerScores(tokenizer) if request.logprobs else None, structured)
            for _ in range(request.n or 1)
        ]

    def opening(self) -> Iterable[Json]:
        """A chunk with the role for each choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._delta(index, delta, None) for index in range(len(self.choices))]

    def take(self, index: int, event: Any) -> Iterator[Json]:
        """The chunk of an event, if it has a delta."""
        if (delta := self.choices[index].take(event)) is not None:
            yield self._delta(index, *delta)

    def _delta(self, index: int, delta: Json, entries: list[Json] | None) -> Json:
        reason = self.choices[index].finish_reason
        return self.chunk(
            {"index": index, "delta": delta, "logprobs": _scores(entries), "finish_reason": reason}
        )

    def usage(self) -> Json:
        """Counts of tokens; the prompt is counted once."""
        usages = [choice.usage for choice in self.choices]
        body = usage_body(
            usages[0].prompt_tokens, usages[0].cached_tokens, sum(u.completion_tokens for u in usages)
        )
        reasoning = sum(usage.reasoning_tokens for usage in usages)
        return body | {"completion_tokens_details": {"reasoning_tokens": reasoning}}

    def body(self) -> Json:
        """The completion in one piece."""
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": _scores(choice.logprobs or None),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self._head | {"choices": choices, "usage": self.usage(), "service_tier": "default"}
