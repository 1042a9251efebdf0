"""The LLM of a server: loaded once, and with an idle time let go of and loaded again when it is asked for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlx_gptoss.server.http.errors import ApiError

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM

logger = logging.getLogger("mlx_gptoss.server")

INTERVAL = 1.0  # seconds between two looks at whether the LLM is idle


def still_loading() -> ApiError:
    """The answer to those who come before the model is there."""
    return ApiError(503, "The model is still loading.", code="model_loading", headers={"Retry-After": "5"})


class Residence:
    """Holds the LLM (None before it is there, and while it is unloaded).

    idle: seconds without requests after which it is unloaded; None to keep it. busy: whether any request
    runs. All but `attach` belongs to the event loop.
    """

    def __init__(
        self, idle: float | None, busy: Callable[[], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.llm: LLM | None = None
        self._load: Callable[[], LLM] | None = None
        self._idle = idle
        self._after = idle  # a request may ask for another time
        self._busy = busy
        self._clock = clock
        self._used = clock()
        self._lock = asyncio.Lock()

    def attach(self, llm: LLM | None, load: Callable[[], LLM] | None = None) -> None:
        """Give it an LLM; load: makes it anew, without which it is never unloaded."""
        self._used = self._clock()
        self._load = load
        self.llm = llm

    async def get(self) -> LLM:
        """The LLM; an unloaded one is loaded first. Raises ApiError 503 before the first is there."""
        self._used = self._clock()
        if self.llm is None and self._load is not None:
            # Shielded: a client that leaves must not take with it what others wait for.
            await asyncio.shield(asyncio.create_task(self._reload(self._load)))
        if self.llm is None:
            raise still_loading()
        return self.llm

    async def _reload(self, load: Callable[[], LLM]) -> None:
        async with self._lock:
            if self.llm is None:
                began = self._clock()
                self.llm = await asyncio.to_thread(load)
                self._used = self._clock()
                logger.info("the model is loaded again, in %.1f s", self._used - began)

    def keep(self, seconds: float | None) -> None:
        """Unload after another idle time, or never for a negative one, until told otherwise; None: as it was
        set at first. Does nothing where the LLM always stays.
        """
        if self._idle is not None:
            self._after = self._idle if seconds is None else seconds

    @property
    def idle_left(self) -> float | None:
        """Seconds until it is unloaded if nobody asks for it; None where it stays."""
        if self._after is None or self._after < 0:
            return None
        return max(0.0, self._used + self._after - self._clock())

    async def check(self) -> None:
        """Unload the LLM if it was idle for long enough."""
        if self._busy():
            self._used = self._clock()
        if self.llm is None or self._load is None or self._busy() or self.idle_left != 0:
            return
        async with self._lock:
            llm, self.llm = self.llm, None
            if llm is not None:
                await asyncio.to_thread(llm.close)
                logger.info("the model is unloaded: nobody asked for it")

    async def watch(self) -> None:
        """Check now and then, for ever."""
        while True:
            await asyncio.sleep(INTERVAL)
            await self.check()
