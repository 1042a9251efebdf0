"""A raw prompt that is scored, or not gone on from: what a token stream alone does not do."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_gptoss.engine.request import Cancellable, Sink, TokensDone
from mlx_gptoss.sampling import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM


@dataclass(frozen=True)
class PromptScores:
    """The log-probabilities of a prompt's tokens from the second on."""

    scores: tuple[TokenLogprobs, ...]


class PromptRun:
    """Gives the prompt's scores, where they are asked for, then what a token stream gives. `Cancellable`.

    top: alternatives at each place; None for no scores. params: how to go on; None not to.
    """

    def __init__(
        self, llm: LLM, tokens: list[int], top: int | None, params: SamplingParams | None, sink: Sink
    ) -> None:
        self.prompt_tokens = len(tokens)
        self._llm = llm
        self._tokens = tokens
        self._top = top
        self._params = params
        self._sink = sink
        self._cancelled = False
        self._stream: Cancellable | None = None

    def start(self, threads: Executor) -> PromptRun:
        """Run on another thread: scoring waits for the model."""
        threads.submit(self._run)
        return self

    def cancel(self) -> None:
        """End it after the chunk that is being scored, or the token that is being generated."""
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    def _run(self) -> None:
        try:
            if self._top is not None:
                going_on = self._params is not None
                scores = self._llm.score(
                    self._tokens, self._top, keep=going_on, cancelled=lambda: self._cancelled
                )
                self._sink(PromptScores(tuple(scores)))
            if self._params is None or self._cancelled:
                self._sink(TokensDone("cancelled" if self._cancelled else "length", self.prompt_tokens, 0, 0))
                return
            self._stream = self._llm.submit(self._tokens, self._params, sink=self._sink)
            if self._cancelled:
                self._stream.cancel()
        except Exception as error:  # whoever reads the events is told
            self._sink(error)
