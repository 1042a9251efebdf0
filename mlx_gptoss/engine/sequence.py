"""A sequence: a request on its way through the scheduler; and its share of one forward."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gptoss.engine.request import Request
from mlx_gptoss.engine.runner import KVCache, Pending
from mlx_gptoss.engine.sampler import Sampler
from mlx_gptoss.engine.speculate import Speculation
from mlx_gptoss.model.sequence_cache import WindowState


class Sequence:
    """A request on its way: its tokens so far, its caches and its sampler.

    `cache` is None while it waits. `next` is a token, int32 [1], that was sampled and has not been read.
    """

    def __init__(self, request: Request, sampler: Sampler) -> None:
        self.request = request
        self.sampler = sampler
        self.tokens = list(request.prompt)
        self.prompt = np.array(request.prompt, np.int32)
        self.cache: KVCache | None = None
        self.states: list[WindowState] = []
        self.last_state = 0  # where the last window state ended
        self.branch = 0  # where this timeline left another one
        self.next: mx.array | None = None
        self.logprobs: tuple[mx.array, mx.array, mx.array] | None = None
        self.undrawn = sampler.state  # the sampler's before `next` was drawn
        self.sampled = 0
        self.flight: Flight | None = None  # the forward under way that ends with its next token
        self.launched = 0  # the number of the last forward that it was in
        self.alone = False  # runs by itself, after a forward with it failed
        self.speculation: Speculation | None = None

    @property
    def decoding(self) -> bool:
        return self.next is not None

    @property
    def live(self) -> KVCache:
        """The caches of a sequence that is not waiting."""
        assert self.cache is not None
        return self.cache


@dataclass(frozen=True)
class Piece:
    """A sequence's share of one forward; `wants` its last row's logits, and those of a draft's rows."""

    sequence: Sequence
    tokens: mx.array
    length: int
    wants: bool
    draft: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Of how many rows, the last ones, the logits are wanted."""
        return len(self.draft) + 1 if self.wants else 0


@dataclass(frozen=True, eq=False)
class Flight:
    """A forward under way whose logits are wanted."""

    pieces: list[Piece]
    pending: Pending
