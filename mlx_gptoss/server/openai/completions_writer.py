"""From generated tokens to the choices of a raw completion, and to the chunks of its stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlx_gptoss.chat.stops import UntilStop
from mlx_gptoss.engine.request import TokenOutput, TokensDone
from mlx_gptoss.server.openai.choices import ChoicesWriter, usage_body
from mlx_gptoss.server.openai.completions_request import CompletionRequest
from mlx_gptoss.server.openai.logprobs import AnswerScores, Scored, finite
from mlx_gptoss.server.running.answer import Json
from mlx_gptoss.tokenizer import Tokenizer


class TextChoice:
    """One completion as it comes: tokens in, pieces of text out, up to a stop text."""

    def __init__(self, tokenizer: Tokenizer, echo: str, stop: Sequence[str], scored: bool) -> None:
        self.text = echo
        self.finish_reason: str | None = None
        self.done: TokensDone | None = None
        self.scored: list[tuple[int, Scored]] | None = [] if scored else None
        self._tokenizer = tokenizer
        self._letters = tokenizer.detokenizer()
        self._stop = UntilStop(stop)
        self._scores = AnswerScores(tokenizer)

    def take(self, event: TokenOutput | TokensDone) -> str:
        """The text that an event adds."""
        scored: list[Scored] = []
        if isinstance(event, TokensDone):
            self.done = event
            piece = self._stop.push(self._letters.finish()) + self._stop.finish()
            cut = self._stop.over or event.finish_reason == "cancelled"
            self.finish_reason = "stop" if cut else event.finish_reason
        elif self._stop.over or event.token_id in self._tokenizer.stop_ids:
            piece = ""
        else:
            piece = self._stop.push(self._letters.push(event.token_id))
            scored = [(event.token_id, event.logprobs)] if event.logprobs is not None else []
        self.text += piece
        if self.scored is not None:
            self.scored += self._scores.take(piece, scored)
            if self.finish_reason and not self._stop.over:  # a stop text's tokens go with it
                self.scored += self._scores.rest()
        return piece

    def logprobs(self, first: int = 0) -> Json | None:
        """The log-probabilities of the text, from those of a token on."""
        if self.scored is None:
            return None

        def spell(token: int) -> str:
            return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

        told = self.scored[first:]
        return {
            "tokens": [spell(token) for _, (token, _) in told],
            "token_logprobs": [finite(scores.logprob) for _, (_, scores) in told],
            "top_logprobs": [{spell(t): finite(p) for t, p in scores.top} for _, (_, scores) in told],
            "text_offset": [start for start, _ in told],
        }

    def body(self, index: int, text: str, logprobs: Json | None) -> Json:
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
        echoes = [tokenizer.decode(tokens) if request.echo else "" for tokens in prompts]
        self._choices = [
            TextChoice(tokenizer, echo, stop, request.logprobs is not None)
            for echo in echoes
            for _ in range(self._share)
        ]

    def opening(self) -> Iterable[Json]:
        """The prompts, where they are to be repeated."""
        numbered = enumerate(self._choices)
        return [self.chunk(c.body(index, c.text, None)) for index, c in numbered if c.text]

    def take(self, index: int, event: Any) -> Iterator[Json]:
        """The chunk of an event, if it adds text or the end."""
        choice = self._choices[index]
        told = len(choice.scored or ())
        text = choice.take(event)
        if text or choice.finish_reason:
            yield self.chunk(choice.body(index, text, choice.logprobs(told)))

    def usage(self) -> Json:
        """Counts of tokens; each prompt is counted once."""
        ended = [choice.done for choice in self._choices if choice.done]
        cached = sum(done.cached_tokens for done in ended[:: self._share])
        return usage_body(self._prompt_tokens, cached, sum(done.completion_tokens for done in ended))

    def body(self) -> Json:
        """The completion in one piece."""
        choices = [c.body(index, c.text, c.logprobs()) for index, c in enumerate(self._choices)]
        return self._head | {"choices": choices, "usage": self.usage()}
