"""Mixed requests, drawn at random, on a scheduler that is stepped by hand: the same seed, the same script.

Documents shared by prompts (and left in the middle), conversations that go on or are edited, bursts, cancels,
seeds, penalties, constraints, log-probabilities, and output that ends for several reasons.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.sampling import SamplingParams
from tests.support.scheduling import Client


class EvenTokens:
    """A constraint: even ids only."""

    def __init__(self, vocab: int) -> None:
        self._mask = np.full(-(-vocab // 32), 0x55555555, np.uint32)

    def allowed(self) -> np.ndarray | None:
        return self._mask

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == 0


class Script:
    """Who asks what, and when: decided by a seed and by what came out before."""

    def __init__(self, scheduler: Scheduler, seed: int, longest: int = 300) -> None:
        self._scheduler = scheduler
        self._rng = random.Random(seed)
        self._vocab = scheduler.runner.vocab_size
        self._documents = [self._tokens(self._rng.randrange(longest // 4, longest)) for _ in range(4)]
        self.clients: list[Client] = []

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(self._vocab) for _ in range(count)]

    def run(self, count: int) -> list[Client]:
        """So many requests, to the end of all of them."""
        rng = self._rng
        while True:
            if len(self.clients) < count and rng.random() < 0.15:
                for _ in range(min(rng.randrange(1, 5), count - len(self.clients))):
                    self.clients.append(self._ask())
            if rng.random() < 0.02 and (open_ := [c for c in self.clients if c.end is None]):
                rng.choice(open_).request.cancelled = True
            if not self._scheduler.step() and len(self.clients) == count:
                return self.clients

    def _ask(self) -> Client:
        rng = self._rng
        kind, answered = rng.random(), [c for c in self.clients if c.tokens and c.end is not None]
        if kind < 0.35 and answered:  # a conversation goes on
            before = rng.choice(answered)
            prompt = [*before.request.prompt, *before.tokens, *self._tokens(rng.randrange(1, 30))]
        elif kind < 0.5 and answered:  # or is edited
            before = rng.choice(answered)
            whole = [*before.request.prompt, *before.tokens]
            prompt = [*whole[: rng.randrange(1, len(whole) + 1)], *self._tokens(rng.randrange(1, 20))]
        else:
            document = rng.choice(self._documents)
            prompt = document[: rng.randrange(1, len(document) + 1)] + self._tokens(rng.randrange(0, 20))
        params: dict[str, Any] = {"temperature": 0.0}
        if rng.random() < 0.4:
            params = {"temperature": 0.9, "seed": rng.randrange(1 << 30), "top_p": rng.choice([1.0, 0.9])}
        if rng.random() < 0.2:
            params |= {"presence_penalty": 0.5, "repetition_penalty": 1.1}
        if rng.random() < 0.2:
            params["logprobs"] = 2
        constraint = EvenTokens(self._vocab) if rng.random() < 0.2 else None
        stops = frozenset(self._tokens(self._vocab // 40)) if rng.random() < 0.5 else frozenset[int]()
        return Client(
            self._scheduler,
            prompt[-900:],
            rng.randrange(1, 24),
            SamplingParams(**params),
            stops,
            constraint=constraint,
        )
