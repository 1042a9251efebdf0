"""Speculation: guessing the next tokens cheaply, to have the model check several in one forward.

A guess never changes what is generated. The model's own sampler draws a token for every position, and a
guess counts only while it equals that draw (Leviathan et al. 2023; for a guess without a distribution of its
own, accepting it when the target draws it is the exact rule). So greedy output is the same with and without,
and sampled output follows the same distribution, with a seed the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_gptoss.engine.runner import KVCache, ModelRunner

# Longest and shortest run of tokens that prompt lookup looks for.
LONGEST, SHORTEST = 4, 2
# A request stops guessing when fewer than this share of so many guessed tokens were right ..
LEAST_RIGHT, AFTER = 0.1, 32
# .. or when, after so many rounds of each, a token costs more time with guessing than without.
ROUNDS = 8
# A draft model reads at least so many tokens a round, to overtake a timeline that grows.
LEAST_READ = 16
# With a draft model every n-th round goes without a guess, to know what a token costs then.
PLAIN_EVERY = 12


class Drafter(Protocol):
    """Guesses for one sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        ...

    @property
    def behind(self) -> bool:
        """True when the last `propose` had no guesses because it is still reading the timeline."""
        ...

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """At most `limit` guesses of what follows `tokens`; may be none. Called with growing timelines."""
        ...


class PromptLookup:
    """Guesses that a run of tokens continues as it did when it was last seen, in the prompt or the output."""

    nbytes = 0
    behind = False

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # a run of tokens -> the position after its last place
        self._known = 0

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """The continuation of the longest run that occurred before. O(1) for each new token."""
        # The run that ends with the last token is not entered yet: it would find itself.
        for end in range(max(self._known, SHORTEST), len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - n : end])] = end
        self._known = len(tokens)
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            at = self._after.get(tuple(tokens[len(tokens) - n :]))
            if at is not None:
                return tokens[at : at + limit]
        return []


class ModelDrafter:
    """Guesses with a second, smaller model of the same vocabulary, greedily."""

    def __init__(self, runner: ModelRunner, chunk: int) -> None:
        self._runner = runner
        self._chunk = max(chunk, LEAST_READ)
        self._cache: KVCache = runner.make_cache()
        self._fed: list[int] = []  # what its caches hold
        self._rounds = 0
        self.behind = False

    @property
    def nbytes(self) -> int:
        return self._cache.committed

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """`limit` guesses; none every now and then, so that their worth can be told, and none yet while it
        reads `tokens`, a chunk a call, so that nobody waits long for it.
        """
        self._rounds += 1
        self.behind = False
        if self._rounds % PLAIN_EVERY == 0:
            return []
        same = next((i for i, (a, b) in enumerate(zip(self._fed, tokens, strict=False)) if a != b), None)
        keep = min(len(self._fed), len(tokens) - 1) if same is None else min(same, len(tokens) - 1)
        # A replay that takes several calls goes on where it was.
        start = self._cache.offset if keep == len(self._fed) else self._cache.rewind(keep)
        part = tokens[start : start + self._chunk]
        self.behind = start + len(part) < len(tokens)
        rows = [] if self.behind else [len(part) - 1]
        share = [(len(part), self._cache)]
        logits = self._runner.forward(mx.array(part, mx.int32), share, rows, awaited=True)
        if self.behind:
            mx.eval(self._cache.arrays())
            self._fed = tokens[: self._cache.length]
            return []
        guesses = []
        for i in range(limit):
            assert logits is not None
            token = mx.argmax(logits, axis=-1).astype(mx.int32)
            guesses.append(token)
            if i + 1 < limit:
                logits = self._runner.forward(token, [(1, self._cache)], awaited=True)
        drafted: list[int] = np.array(mx.concatenate(guesses)).tolist()
        self._fed = [*tokens, *drafted[:-1]]
        return drafted


@dataclass
class Speculation:
    """How guessing goes for one request, and whether it goes on."""

    drafter: Drafter
    limit: int
    on: bool = True
    proposed: int = 0
    accepted: int = 0
    rounds: int = 0
    seconds: float = 0.0  # of rounds with a guess
    tokens: int = 0  # that came out of them
    plain_rounds: int = 0
    plain_seconds: float = 0.0

    def propose(self, tokens: list[int], room: int) -> list[int]:
        """Guesses for the next forward, at most `room`."""
        count = min(self.limit, room)
        return self.drafter.propose(tokens, count) if self.on and count > 0 else []

    def record(self, proposed: int, accepted: int, seconds: float) -> bool:
        """Note a round; True when it makes this request stop guessing."""
        if self.drafter.behind:
            return False  # its time went into reading
        if not proposed:
            self.plain_rounds += 1
            self.plain_seconds += seconds
            return False
        self.proposed += proposed
        self.accepted += accepted
        self.rounds += 1
        self.seconds += seconds
        self.tokens += accepted + 1
        wrong = self.proposed >= AFTER and self.accepted < LEAST_RIGHT * self.proposed
        slow = (
            min(self.rounds, self.plain_rounds) >= ROUNDS
            and self.seconds / self.tokens > self.plain_seconds / self.plain_rounds
        )
        if self.on and (wrong or slow):
            self.on = False
            return True
        return False


DrafterFactory = Callable[[], Drafter]
