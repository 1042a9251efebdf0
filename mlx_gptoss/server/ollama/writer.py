"""From what is generated to Ollama's responses: one JSON object, or a line for every piece of it."""

from __future__ import annotations

import datetime
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlx_gptoss.chat.stops import UntilStop
from mlx_gptoss.engine.request import TokenOutput, TokensDone
from mlx_gptoss.harmony import events
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.ollama.request import GenerationRequest
from mlx_gptoss.server.running import sse
from mlx_gptoss.server.running.answer import Json, Writer, arguments_object
from mlx_gptoss.server.running.logprobs import AnswerScores, Scored
from mlx_gptoss.tokenizer import Tokenizer


def ollama_error(error: ApiError) -> Json:
    """The body of an error in Ollama's shape."""
    return {"error": error.message}


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


def line(model: str, fields: Json) -> Json:
    """A response that is not over; model: as the client called it."""
    return {"model": model, "created_at": now(), **fields, "done": False}


def settled(model: str, fields: Json, *, loaded: bool) -> Json:
    """The response to a request that asks for no answer, but to have the model loaded, or not."""
    return line(model, fields) | {"done": True, "done_reason": "load" if loaded else "unload"}


class OllamaWriter(Writer):
    """A response to either endpoint; how a piece of it is written is the subclass's.

    load_seconds: what the request waited for the model. Durations in the response are nanoseconds.
    """

    media_type = "application/x-ndjson"

    def __init__(
        self, request: GenerationRequest, tokenizer: Tokenizer, load_seconds: float, *, structured: bool
    ) -> None:
        self._model = request.model
        self._shows_thinking = request.shows_thinking
        self._structured = structured
        self._scores = AnswerScores(tokenizer) if request.logprobs else None
        self._load = round(load_seconds * 1e9)
        self._began = time.monotonic_ns()
        self._first: int | None = None  # when the first piece came
        self._end: Json = {}
        self.text = ""
        self._thinking = ""
        self._calls: list[Json] = []
        self._logprobs: list[Json] = []
        self._gap = ""  # what parts a preamble from the answer
        self.heartbeat = self.frame(self._line(self.piece()))

    @staticmethod
    def frame(event: Json) -> bytes:
        """A line."""
        return f"{sse.dumps(event)}\n".encode()

    @abstractmethod
    def piece(self, text: str = "", thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        """The fields that hold a piece of the answer."""

    def take(self, index: int, event: Any) -> Iterator[Json]:
        """The lines of an event: at most one."""
        if self._first is None:
            self._first = time.monotonic_ns()
        match event:
            case events.PreambleDelta(text) if not self._structured:
                self._gap = "\n\n"
                yield self._say(text)
            case events.ReasoningDelta(text) | events.PreambleDelta(text):
                if self._shows_thinking:
                    self._thinking += text
                    yield self._line(self.piece(thinking=text))
            case events.TextDelta(text, scored):
                entries = self._scores.entries(text, scored) if self._scores is not None else None
                if text or entries:
                    yield self._say(self._gap + text, entries)
                    self._gap = ""
            case events.ToolCall(number, call_id, name, arguments):
                function = {"index": number, "name": name, "arguments": arguments_object(arguments)}
                self._calls.append({"id": call_id, "function": function})
                yield self._line(self.piece(calls=self._calls[-1:]))
            case events.Done(reason, usage):
                self._finish(reason, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    def closing(self) -> Iterable[Json]:
        """The last line: the counts."""
        yield self._line(self.piece()) | self._end

    def failure(self, error: ApiError) -> Iterable[Json]:
        """The error as the last line."""
        yield ollama_error(error)

    def body(self) -> Json:
        """The response in one piece."""
        whole = self._line(self.piece(self.text, self._thinking, self._calls)) | self._end
        return whole | {"logprobs": self._logprobs} if self._scores is not None else whole

    def _say(self, text: str, entries: list[Json] | None = None) -> Json:
        self.text += text
        self._logprobs += entries or ()
        line = self._line(self.piece(text))
        return line | {"logprobs": entries} if entries is not None else line

    def _line(self, fields: Json) -> Json:
        return line(self._model, fields)

    def _finish(self, reason: str, prompt: int, cached: int, completion: int) -> None:
        end = time.monotonic_ns()
        first = end if self._first is None else self._first
        self._end = {
            "done": True,
            "done_reason": "length" if reason == "length" else "stop",
            "total_duration": end - self._began + self._load,
            "load_duration": self._load,
            "prompt_eval_count": prompt,
            "prompt_eval_cached_count": cached,
            "prompt_eval_duration": first - self._began,
            "eval_count": completion,
            "eval_duration": end - first,
        }


class ChatWriter(OllamaWriter):
    """The response of /api/chat."""

    def piece(self, text: str = "", thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        """A message with what there is of it."""
        message: Json = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = list(calls)
        return {"message": message}


class GenerateWriter(OllamaWriter):
    """The response of /api/generate in the chat format."""

    def piece(self, text: str = "", thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        """The response with what there is of it."""
        return {"response": text, "thinking": thinking} if thinking else {"response": text}


class RawWriter(GenerateWriter):
    """The response of /api/generate to a raw prompt: all that the model writes, markup spelled out."""

    def __init__(
        self, request: GenerationRequest, tokenizer: Tokenizer, load_seconds: float, stop: Sequence[str]
    ) -> None:
        super().__init__(request, tokenizer, load_seconds, structured=False)
        self._stop_ids = tokenizer.stop_ids
        self._letters = tokenizer.detokenizer()
        self._until = UntilStop(stop)

    def take(self, index: int, event: TokenOutput | TokensDone) -> Iterator[Json]:
        """The line of a token, if it adds text."""
        if self._first is None:
            self._first = time.monotonic_ns()
        scored: list[Scored] = []
        if isinstance(event, TokensDone):
            text = self._until.push(self._letters.finish()) + self._until.finish()
            reason = "stop" if self._until.over else event.finish_reason
            self._finish(reason, event.prompt_tokens, event.cached_tokens, event.completion_tokens)
        elif self._until.over or event.token_id in self._stop_ids:
            return
        else:
            text = self._until.push(self._letters.push(event.token_id))
            scored = [(event.token_id, event.logprobs)] if event.logprobs is not None else []
        entries = self._scores.entries(text, scored) if self._scores is not None else None
        if text or entries:
            yield self._say(text, entries)
