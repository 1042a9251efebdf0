"""A scheduler stepped by hand (no thread, no clock), and clients that note what they get."""

from __future__ import annotations

import random
from typing import Any

from mlx_gptoss.engine.request import Request, TokenOutput, TokensDone
from mlx_gptoss.engine.runner import LocalRunner
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.sampling import SamplingParams

CHUNK = 16
GREEDY = SamplingParams(temperature=0.0)


class Client:
    """A request and what came of it; `at` holds how many forwards were launched before each token came."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokens: list[int],
        max_tokens: int = 4,
        params: SamplingParams = GREEDY,
        stop_ids: frozenset[int] = frozenset(),
        **more: Any,
    ) -> None:
        self.scheduler = scheduler
        self.outputs: list[TokenOutput] = []
        self.at: list[int] = []
        self.end: TokensDone | Exception | None = None
        self.after_end: list[Any] = []
        self.request = Request(tokens, params, self.take, max_tokens=max_tokens, stop_ids=stop_ids, **more)
        scheduler.add(self.request)

    @property
    def tokens(self) -> list[int]:
        return [output.token_id for output in self.outputs]

    @property
    def done(self) -> TokensDone:
        """Its end, which was no error."""
        assert isinstance(self.end, TokensDone) and not self.after_end, (self.end, self.after_end)
        return self.end

    def take(self, item: Any) -> None:
        if self.end is not None:
            self.after_end.append(item)
        elif isinstance(item, TokenOutput):
            self.outputs.append(item)
            self.at.append(self.scheduler.counters.forwards)
        else:
            self.end = item


def cache_bytes(model: Any, tokens: int, chunk: int = CHUNK) -> int:
    """Bytes of one sequence's caches with room for so many tokens."""
    return LocalRunner(model).cache_bytes(tokens, chunk)


def make(model: Any, **options: Any) -> Scheduler:
    return Scheduler(LocalRunner(model), **{"budget": 1 << 26, "chunk": CHUNK, "max_running": 8, **options})


def prompt(seed: int, n: int, vocab: int = 299) -> list[int]:
    return [random.Random(f"{seed} {i}").randrange(vocab) for i in range(n)]


def run(scheduler: Scheduler) -> None:
    for _ in range(3000):
        if not scheduler.step():
            return
    raise AssertionError("the scheduler does not come to an end")
