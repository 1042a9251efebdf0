"""Memory is given back while the system is short of it, and taken again once that is over for a while.

Kept prefixes go first: they cost a prompt its reading. Then slots of experts, which cost every token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from mlx_gptoss.device import release_memory
from mlx_gptoss.engine.prefix_store import PrefixStore
from mlx_gptoss.engine.runner import ModelRunner

logger = logging.getLogger("mlx_gptoss.engine")

# Seconds between two looks at the system, and of plenty before slots are taken again.
EVERY = 1.0
CALM = 60.0
# Prefixes of fewer bytes are left alone.
FEW = 16 * 2**20


class Pressure:
    """Asked between steps. short: whether the system is short of memory."""

    def __init__(
        self,
        short: Callable[[], bool],
        store: PrefixStore,
        runner: ModelRunner,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._short, self._store, self._runner, self._now = short, store, runner, now
        self._planned = runner.expert_slots
        self._looked = self._changed = now()

    def relieve(self) -> None:
        """Give some memory back, or take some again, if it is time to."""
        now = self._now()
        if now - self._looked < EVERY:
            return
        self._looked = now
        slots = self._runner.expert_slots
        if self._short():
            self._changed = now
            if self._store.nbytes > FEW:
                self._store.shrink(self._store.nbytes // 2)
            elif slots > self._runner.experts_per_token:
                self._resize(max(self._runner.experts_per_token, slots * 3 // 4))
            release_memory()
        elif slots < self._planned and now - self._changed >= CALM:
            self._changed = now
            self._resize(min(self._planned, slots + max(1, self._planned // 8)))

    def _resize(self, slots: int) -> None:
        logger.warning("%d experts of a layer are in memory now, %d were planned", slots, self._planned)
        self._runner.resize_experts(slots)
