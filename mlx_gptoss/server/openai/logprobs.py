"""Log-probabilities in OpenAI's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_gptoss.harmony import TextDelta
from mlx_gptoss.sampling import TokenLogprobs

if TYPE_CHECKING:
    from mlx_gptoss.tokenizer import Tokenizer


def finite(logprob: float) -> float:
    """JSON has no infinity: a token that a constraint ruled out has OpenAI's stand-in for "never"."""
    return max(logprob, -9999.0)


def logprob_entry(tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs) -> dict[str, Any]:
    """A token with its log-probability and its alternatives."""

    def entry(one: int, logprob: float) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(one)
        token = spelled.decode("utf-8", "replace")
        return {"token": token, "logprob": finite(logprob), "bytes": list(spelled)}

    return entry(token_id, logprobs.logprob) | {"top_logprobs": [entry(*pair) for pair in logprobs.top]}


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
