"""From harmony events to the choices of a chat completion, and to the deltas of its stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import monotonic
from typing import Any

from mlx_gptoss.harmony import events
from mlx_gptoss.sampling import PromptProgress
from mlx_gptoss.server.openai.chat_executed import Executed
from mlx_gptoss.server.openai.chat_request import ChatRequest
from mlx_gptoss.server.openai.choices import ChoicesWriter, usage_body
from mlx_gptoss.server.running.answer import Json
from mlx_gptoss.server.running.logprobs import AnswerScores
from mlx_gptoss.tokenizer import Tokenizer


class Choice:
    """One answer as it comes: takes harmony events, gives OpenAI's deltas, and adds up to a message.

    A preamble is part of the content, as it is meant for the user; where a format was asked for it goes to
    the reasoning, because the content must be nothing but that format. executed: of the server's own tools.
    """

    def __init__(
        self,
        scores: AnswerScores | None,
        *,
        structured: bool,
        shows_reasoning: bool,
        executed: Executed | None = None,
    ) -> None:
        self._executed = executed
        self.usage = events.Usage()
        self.finish_reason: str | None = None
        self.logprobs: list[Json] = []
        self._scores = scores
        self._structured = structured
        self._shows_reasoning = shows_reasoning
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[Json] = []
        self._gap = ""  # what parts the preamble from the answer

    def take(self, event: Any) -> tuple[Json, list[Json] | None] | None:
        """The delta of an event with its log-probabilities, or None when it has no delta."""
        entries = None
        match event:
            case events.PreambleDelta(text) if not self._structured:
                self._gap = "\n\n"
                delta = self._say(text)
            case events.ReasoningDelta() | events.PreambleDelta() if not self._shows_reasoning:
                return None
            case events.ReasoningDelta(text) | events.PreambleDelta(text):
                self._reasoning.append(text)
                delta = {"reasoning": text, "reasoning_content": text}
            case events.TextDelta(text, scored):
                entries = self._scores.entries(text, scored) if self._scores is not None else None
                if not text and not entries:
                    return None
                self.logprobs += entries or ()
                delta = self._say(self._gap + text)
                self._gap = ""
            case events.ToolCallDelta() if self._executed is not None and self._executed.owns(event):
                return None
            case events.ToolCall() if self._executed is not None and self._executed.owns(event):
                delta = self._executed.called(event)
                for call in delta.get("tool_calls", ()):
                    self._calls.append({key: call[key] for key in call if key != "index"})
            case events.MessageDone(message) if self._executed is not None and message.role == "tool":
                delta = self._executed.ended(message) or {}
            case events.ToolCallDelta(index, call_id, name, ""):
                call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
                self._calls.append(call)
                delta = {"tool_calls": [{"index": index, **call}]}
            case events.ToolCallDelta(index, _, _, more):
                self._calls[-1]["function"]["arguments"] += more
                delta = {"tool_calls": [{"index": index, "function": {"arguments": more}}]}
            case events.Done(reason, usage):
                # What was cancelled from outside has, for its client, just stopped.
                self.finish_reason, self.usage = "stop" if reason == "cancelled" else reason, usage
                delta = {}
            case _:
                return None
        return delta, entries

    def _say(self, text: str) -> Json:
        self._content.append(text)
        return {"content": text}

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._content)

    def message(self) -> Json:
        """The message of a response that is not streamed."""
        content = self.text or (None if self._calls else "")
        message: Json = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        if self._reasoning:
            message |= dict.fromkeys(("reasoning", "reasoning_content"), "".join(self._reasoning))
        if self._executed is not None and self._executed.entries:
            message["executed_tools"] = self._executed.entries
        return message | {"tool_calls": self._calls} if self._calls else message


class ChatWriter(ChoicesWriter):
    """A chat completion. structured: its content has to follow a format. executed: the server's own tools."""

    def __init__(
        self,
        request: ChatRequest,
        model: str,
        tokenizer: Tokenizer,
        *,
        structured: bool,
        executed: Executed | None = None,
    ) -> None:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        super().__init__("chatcmpl", kind, model, request)
        self.choices = [
            Choice(
                AnswerScores(tokenizer) if request.logprobs else None,
                structured=structured,
                shows_reasoning=request.shows_reasoning,
                executed=executed,
            )
            for _ in range(request.n or 1)
        ]
        self._began = monotonic()

    def opening(self) -> Iterable[Json]:
        """A chunk with the role for each choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self.chunk(self._choice(index, None, delta=delta)) for index in range(len(self.choices))]

    def take(self, index: int, event: Any) -> Iterator[Json]:
        """The chunk of an event, if it has a delta."""
        if isinstance(event, PromptProgress):
            yield self._progress(index, event)
        elif taken := self.choices[index].take(event):
            delta, entries = taken
            yield self.chunk(self._choice(index, entries, delta=delta))

    def _progress(self, index: int, event: PromptProgress) -> Json:
        """A chunk without text that tells how much of the prompt is read, in llama.cpp's words."""
        chunk = self.chunk(self._choice(index, None, delta={"role": "assistant", "content": None}))
        progress = {
            "total": event.prompt_tokens,
            "cache": event.cached_tokens,
            "processed": event.read_tokens,
            "time_ms": round((monotonic() - self._began) * 1000),
        }
        return chunk | {"prompt_progress": progress}

    def _choice(self, index: int, entries: list[Json] | None, **said: Json) -> Json:
        """A choice in OpenAI's shape. said: its message or delta."""
        logprobs = None if entries is None else {"content": entries, "refusal": None}
        reason = self.choices[index].finish_reason
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def usage(self) -> Json:
        """Counts of tokens; the prompt is counted once."""
        usages = [choice.usage for choice in self.choices]
        completion = sum(usage.completion_tokens for usage in usages)
        reasoning = sum(usage.reasoning_tokens for usage in usages)
        body = usage_body(usages[0].prompt_tokens, usages[0].cached_tokens, completion)
        return body | {"completion_tokens_details": {"reasoning_tokens": reasoning}}

    def body(self) -> Json:
        """The completion in one piece."""
        choices = [
            self._choice(index, choice.logprobs or None, message=choice.message())
            for index, choice in enumerate(self.choices)
        ]
        return self._head | {"choices": choices, "usage": self.usage(), "service_tier": "default"}
