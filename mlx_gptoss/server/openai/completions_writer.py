"""From generated tokens to the choices of a raw completion, and to the chunks of its stream."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlx_gptoss.chat.stops import UntilStop
from mlx_gptoss.engine.request import TokenOutput, TokensDone
from mlx_gptoss.server.openai.choices_writer import ChoicesWriter, usage_body
from mlx_gptoss.server.openai.completions_request import CompletionRequest
from mlx_gptoss.server.openai.logprobs import finite
from mlx_gptoss.server.running.answer import Json
from mlx_gptoss.tokenizer import Tokenizer


class TextChoice:
    """One completion as it comes: tokens in, pieces of text out, up to a stop text."""

    def __init__(self, tokenizer: Tokenizer, echo: str, stop: Sequence[str], scored: bool) -> None:
        self.text = echo
        self.finish_reason: str | None = None
        self.done: TokensDone | None = None
        self.logprobs: dict[str, list[Any]] | None = None
        if scored:
            self.logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._tokenizer = tokenizer
        self._letters = tokenizer.detokenizer()
        self._stop = UntilStop(stop)
        self._decoded = 0
        self._told = 0

    def take(self, event: TokenOutput | TokensDone) -> str:
        """The text that an event adds."""
        if isinstance(event, TokensDone):
            piece = self._finish(event)
        elif self._stop.over or event.token_id in self._tokenizer.stop_ids:
            piece = ""
        else:
            decoded = self._letters.push(event.token_id)
            self._score(event)
            self._decoded += len(decoded)
            piece = self._stop.push(decoded)
        self.text += piece
        return piece

    def _finish(self, done: TokensDone) -> str:
        self.done = done
        piece = self._stop.push(self._letters.finish()) + self._stop.finish()
        cut = self._stop.over or done.finish_reason == "cancelled"
        self.finish_reason = "stop" if cut else done.finish_reason
        if self.logprobs and self._stop.over:  # the stop text's tokens go with it
            count = self._scores_of(self.text + piece)
            self.logprobs = {name: values[:count] for name, values in self.logprobs.items()}
        return piece

    def _score(self, event: TokenOutput) -> None:
        if self.logprobs is None or event.logprobs is None:
            return

        def spell(token: int) -> str:
            return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

        self.logprobs["tokens"].append(spell(event.token_id))
        self.logprobs["token_logprobs"].append(finite(event.logprobs.logprob))
        self.logprobs["top_logprobs"].append({spell(t): finite(p) for t, p in event.logprobs.top})
        self.logprobs["text_offset"].append(self._decoded)

    def _scores_of(self, text: str) -> int:
        """How many of the scored tokens begin within a text."""
        return bisect_left(self.logprobs["text_offset"], len(text)) if self.logprobs else 0

    def new_scores(self) -> dict[str, list[Any]] | None:
        """The log-probabilities that no call gave before, as far as their text is there.

        Those of text that is held back, because a stop text may begin with it, wait with it.
        """
        if self.logprobs is None:
            return None
        first = self._told
        self._told = len(self.logprobs["tokens"]) if self.finish_reason else self._scores_of(self.text)
        return {name: values[first : self._told] for name, values in self.logprobs.items()}

    def body(self, index: int, text: str, logprobs: dict[str, list[Any]] | None) -> Json:
        """The choice, or the piece of it that is `text`, in OpenAI's shape."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}


class CompletionWriter(ChoicesWriter):
    """A raw completion: for each prompt as many choices as are asked for."""

    def __init__(
        self,
        request: CompletionRequest,
        model: str,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        stop: Sequence[str],
    ) -> None:
        super().__init__("cmpl", "text_completion", model, request)
        self._prompt_tokens = sum(map(len, prompts))
        self._share = request.n or 1
        self._choices = [
            TextChoice(tokenizer, echo, stop, request.logprobs is not None)
            for echo in (tokenizer.decode(tokens) if request.echo else "" for tokens in prompts)
            for _ in range(self._share)
        ]

    def opening(self) -> Iterable[Json]:
        """The prompts, where they are to be repeated."""
        numbered = enumerate(self._choices)
        return [self.chunk(c.body(index, c.text, None)) for index, c in numbered if c.text]

    def take(self, index: int, event: Any) -> Iterator[Json]:
        """The chunk of an event, if it adds text or the end."""
        choice = self._choices[index]
        text = choice.take(event)
        if text or choice.finish_reason:
            yield self.chunk(choice.body(index, text, choice.new_scores()))

    def usage(self) -> Json:
        """Counts of tokens; each prompt is counted once."""
        ended = [choice.done for choice in self._choices if choice.done]
        cached = sum(done.cached_tokens for done in ended[:: self._share])
        return usage_body(self._prompt_tokens, cached, sum(done.completion_tokens for done in ended))

    def body(self) -> Json:
        """The completion in one piece."""
        choices = [
            choice.body(index, choice.text, choice.logprobs) for index, choice in enumerate(self._choices)
        ]
        return self._head | {"choices": choices, "usage": self.usage()}
