"""From generated tokens to the choices of a raw completion, and to the chunks of its stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlx_gptoss.chat.stops import UntilStop
from mlx_gptoss.engine.request import TokenOutput, TokensDone
from mlx_gptoss.sampling import TokenLogprobs
from mlx_gptoss.server.openai.choices import ChoicesWriter, usage_body
from mlx_gptoss.server.openai.completions_request import CompletionRequest
from mlx_gptoss.server.openai.prompt_run import PromptScores
from mlx_gptoss.server.running.answer import Json
from mlx_gptoss.server.running.logprobs import AnswerScores, Scored, finite
from mlx_gptoss.tokenizer import Tokenizer

# Where a token begins in the text, and the token; its log-probabilities: None for one that follows nothing.
Placed = tuple[int, tuple[int, TokenLogprobs | None]]


class TextChoice:
    """One completion as it comes: tokens in, pieces of text out, up to a stop text."""

    def __init__(
        self, request: CompletionRequest, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str]
    ) -> None:
        self.finish_reason: str | None = None
        self.done: TokensDone | None = None
        self.scored: list[Placed] | None = [] if request.logprobs is not None else None
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._skips_special = request.skip_special_tokens is not False
        self._letters = tokenizer.detokenizer()
        self._stop = UntilStop(stop)
        self._scores = AnswerScores(tokenizer, self._hidden)
        shown = (token for token in prompt if not self._hidden(token)) if request.echo else ()
        self.text = self.echo = tokenizer.decode(shown)

    def _hidden(self, token: int) -> bool:
        """Whether a token has no part in the text."""
        skipped = self._skips_special and self._tokenizer.is_special(token)
        return skipped or token in self._tokenizer.stop_ids

    def take(self, event: TokenOutput | TokensDone | PromptScores) -> str:
        """The text that an event adds."""
        if isinstance(event, PromptScores):
            self._take_prompt(event)
            return self.echo
        scored: list[Scored] = []
        if isinstance(event, TokensDone):
            self.done = event
            piece = self._stop.push(self._letters.finish()) + self._stop.finish()
            cut = self._stop.over or event.finish_reason == "cancelled"
            self.finish_reason = "stop" if cut else event.finish_reason
        elif self._stop.over:
            piece = ""
        else:
            hidden = self._hidden(event.token_id)
            piece = "" if hidden else self._stop.push(self._letters.push(event.token_id))
            scored = [(event.token_id, event.logprobs)] if event.logprobs is not None else []
        self.text += piece
        if self.scored is not None:
            told = self._scores.take(piece, scored)
            if self.finish_reason and not self._stop.over:  # a stop text's tokens go with it
                told += self._scores.rest()
            self.scored += [(len(self.echo) + start, token) for start, token in told]
        return piece

    def _take_prompt(self, event: PromptScores) -> None:
        assert self.scored is not None  # or nobody would have scored it
        place, letters = 0, self._tokenizer.detokenizer()
        for token, scores in zip(self._prompt, (None, *event.scores), strict=False):
            self.scored.append((place, (token, scores)))
            place += 0 if self._hidden(token) else len(letters.push(token))

    def logprobs(self, first: int = 0) -> Json | None:
        """The log-probabilities of the text, from those of a token on."""
        if self.scored is None:
            return None

        def spell(token: int) -> str:
            return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

        def likely(token: int, scores: TokenLogprobs | None) -> dict[str, float] | None:
            if scores is None:
                return None
            top = {spell(other): finite(logprob) for other, logprob in reversed(scores.top)}
            return {spell(token): finite(scores.logprob)} | top

        told = self.scored[first:]
        return {
            "tokens": [spell(token) for _, (token, _) in told],
            "token_logprobs": [scores and finite(scores.logprob) for _, (_, scores) in told],
            "top_logprobs": [likely(*token) for _, token in told],
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
        self._echoes_first = not request.scores_prompt  # else the echo comes with its scores
        self._choices = [
            TextChoice(request, tokenizer, prompt, stop) for prompt in prompts for _ in range(self._share)
        ]

    def opening(self) -> Iterable[Json]:
        """The prompts, where they are to be repeated."""
        if not self._echoes_first:
            return []
        numbered = enumerate(self._choices)
        return [self.chunk(c.body(index, c.echo, None)) for index, c in numbered if c.echo]

    def take(self, index: int, event: Any) -> Iterator[Json]:
        """The chunk of an event, if it adds text or the end."""
        choice = self._choices[index]
        told = len(choice.scored or ())
        text = choice.take(event)
        if text or choice.finish_reason or len(choice.scored or ()) > told:
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
