"""Log-probabilities in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mlx_gptoss.sampling import TokenLogprobs
from mlx_gptoss.tokenizer import Tokenizer

Scored = tuple[int, TokenLogprobs]  # a token id with its log-probabilities


def finite(logprob: float) -> float:
    """JSON has no infinity: a token that a constraint ruled out has OpenAI's stand-in for "never"."""
    return max(logprob, -9999.0)


class AnswerScores:
    """The log-probabilities of an answer's tokens, given out as far as its text is.

    Text that a stop text may begin with is held back by the engine, and the scores of its tokens are not.
    hidden: the tokens that have no part in the text.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: Callable[[int], bool] = lambda token_id: False) -> None:
        self._tokenizer = tokenizer
        self._letters = tokenizer.detokenizer()
        self._hidden = hidden
        self._shown = 0
        self._scored = 0
        self._held: list[tuple[int, Scored]] = []

    def take(self, text: str, scored: Iterable[Scored] | None) -> list[tuple[int, Scored]]:
        """More text and more tokens; the tokens whose text has begun, each with where it begins."""
        self._shown += len(text)
        for token in scored or ():
            self._held.append((self._scored, token))
            if not self._hidden(token[0]):
                self._scored += len(self._letters.push(token[0]))
        count = sum(start < self._shown for start, _ in self._held)
        ready = self._held[:count]
        del self._held[:count]
        return ready

    def rest(self) -> list[tuple[int, Scored]]:
        """The tokens that are still held back."""
        ready, self._held = self._held, []
        return ready

    def entries(self, text: str, scored: Iterable[Scored] | None) -> list[dict[str, Any]]:
        """The same, as chats and responses show it: each token with its alternatives."""

        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            spelled = self._tokenizer.token_bytes(token_id)
            token = spelled.decode("utf-8", "replace")
            return {"token": token, "logprob": finite(logprob), "bytes": list(spelled)}

        return [
            entry(token_id, scores.logprob) | {"top_logprobs": [entry(*pair) for pair in scores.top]}
            for _, (token_id, scores) in self.take(text, scored)
        ]
